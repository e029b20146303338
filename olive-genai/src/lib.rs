//! olive-genai
