//! Buffers that start at a cache line.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;

/// Values whose first one lies at the start of a cache line, so that no vector load of them crosses one.
#[derive(Debug, Default)]
pub struct Aligned<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// `len` default values.
    pub fn new(len: usize) -> Self {
        let spare = LINE / size_of::<T>().max(1);
        let values = vec![T::default(); len + spare];
        // Not being aligned only costs time.
        let start = values.as_ptr().align_offset(LINE).min(spare);
        Self { values, start, len }
    }

    /// Makes it `len` values long; what they are is not defined. The buffer is kept where it is large enough.
    pub fn resize(&mut self, len: usize) {
        if self.start + len <= self.values.len() {
            self.len = len;
        } else {
            *self = Self::new(len);
        }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_have_their_length_and_start_at_a_line() {
        for len in [0, 1, 15, 16, 1000] {
            let mut floats = Aligned::<f32>::new(len);
            floats.fill(2.0);
            assert_eq!(floats.to_vec(), vec![2.0; len]);
            assert_eq!(floats.as_ptr() as usize % LINE, 0);
            let bytes = Aligned::<u8>::new(len);
            assert_eq!((bytes.len(), bytes.as_ptr() as usize % LINE), (len, 0));
            floats.resize(2 * len);
            assert_eq!((floats.len(), floats.as_ptr() as usize % LINE), (2 * len, 0));
        }
    }
}
