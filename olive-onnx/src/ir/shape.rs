//! Sizes, known or symbolic, and the declared type of a value.

use super::dtype::OnnxType;

/// One size of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    /// A number.
    Known(usize),
    /// A name that stands for the same number wherever it occurs.
    Symbol(String),
    /// Not said.
    Unknown,
}

impl From<usize> for Dim {
    fn from(size: usize) -> Self {
        Self::Known(size)
    }
}

impl From<&str> for Dim {
    fn from(symbol: &str) -> Self {
        Self::Symbol(symbol.to_owned())
    }
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Known(size) => write!(f, "{size}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// The name of a value with what is declared about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueInfo {
    /// The name.
    pub name: String,
    /// The element type; `None` where it is not declared.
    pub dtype: Option<OnnxType>,
    /// The sizes; `None` where even their number is not declared.
    pub shape: Option<Vec<Dim>>,
}

impl ValueInfo {
    /// A value of known type and rank.
    pub fn new(name: impl Into<String>, dtype: OnnxType, shape: impl Into<Vec<Dim>>) -> Self {
        Self {
            name: name.into(),
            dtype: Some(dtype),
            shape: Some(shape.into()),
        }
    }

    /// The sizes, if all are known numbers.
    pub fn known_shape(&self) -> Option<Vec<usize>> {
        let sizes = self.shape.as_ref()?.iter().map(|dim| match dim {
            Dim::Known(size) => Some(*size),
            _ => None,
        });
        sizes.collect()
    }
}

impl std::fmt::Display for ValueInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        match self.dtype {
            Some(dtype) => write!(f, ": {dtype}")?,
            None => f.write_str(": ?")?,
        }
        if let Some(shape) = &self.shape {
            let sizes: Vec<String> = shape.iter().map(Dim::to_string).collect();
            write!(f, "[{}]", sizes.join(", "))?;
        }
        Ok(())
    }
}
