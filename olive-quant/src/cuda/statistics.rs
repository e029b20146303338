//! Channel means and Gram matrices of inputs, on the device.

use olive_core::cuda::{Element, Gpu, Matrix, Product};
use olive_core::{Error, Result};

/// Statistics of one linear input `X [tokens, channels]`.
pub(super) struct DeviceStatistics {
    /// `XᵀX`, single precision.
    pub gram: Matrix,
    /// Sums of `|x|` over the rows of each call.
    parts: Vec<Matrix>,
    tokens: usize,
}

impl DeviceStatistics {
    pub fn new(gpu: &Gpu, channels: usize) -> Self {
        Self {
            gram: gpu.zeros(channels, channels, Element::F32),
            parts: Vec::new(),
            tokens: 0,
        }
    }

    /// Adds rows in bfloat16.
    pub fn add(&mut self, gpu: &Gpu, x: &Matrix) {
        let size = [x.cols, x.cols, x.rows];
        gpu.product(Product::new(size, x.t(), x.view(), self.gram.view()).accumulate());
        self.parts.push(gpu.column_totals(&gpu.abs_sums(x)));
        self.tokens += x.rows;
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The Gram matrix in host memory. `module` is whose input it is of, for messages.
    ///
    /// # Errors
    /// [`Error::NotFinite`]; those of reading from the device.
    pub fn finite_gram(&self, gpu: &Gpu, module: &str) -> Result<Vec<f32>> {
        let gram = gpu.download_f32(&self.gram)?;
        match gram.iter().filter(|v| !v.is_finite()).count() {
            0 => Ok(gram),
            found => Err(Error::NotFinite {
                what: format!("the input of `{module}`"),
                found,
            }),
        }
    }

    /// Mean of `|x|` in each channel. `what` is for messages.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if one is not finite; those of reading from the device.
    pub fn abs_means(&self, gpu: &Gpu, what: &str) -> Result<Vec<f64>> {
        let sums = column_sums(gpu, &self.parts)?;
        let means: Vec<f64> = sums.iter().map(|sum| sum / self.tokens.max(1) as f64).collect();
        match means.iter().filter(|mean| !mean.is_finite()).count() {
            0 => Ok(means),
            found => Err(Error::NotFinite {
                what: what.to_owned(),
                found,
            }),
        }
    }
}

/// The sums of the columns of some matrices one below the other.
pub(super) fn column_sums(gpu: &Gpu, parts: &[Matrix]) -> Result<Vec<f64>> {
    let mut sums = vec![0.0f64; parts.first().map_or(0, |part| part.cols)];
    for part in parts {
        for row in gpu.download_f32(part)?.chunks_exact(part.cols) {
            sums.iter_mut()
                .zip(row)
                .for_each(|(sum, v)| *sum += f64::from(*v));
        }
    }
    Ok(sums)
}
