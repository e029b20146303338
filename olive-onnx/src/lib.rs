//! olive-onnx
