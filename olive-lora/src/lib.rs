//! olive-lora
