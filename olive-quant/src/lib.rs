//! olive-quant
