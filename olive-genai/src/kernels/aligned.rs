//! Buffers that start at a cache line, large ones in large pages.
//!
//! A token reads all weights once. With pages of 4 KiB the processor looks up a page every 64 cache lines, which on a
//! virtual machine takes as long as the reading; so large buffers ask the system for pages of 2 MiB.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;
/// Buffers of so many bytes have a map of their own.
const LARGE: usize = 1 << 20;
/// Bytes of a map that several buffers share.
const CHUNK: usize = 32 << 20;

/// Values whose first one lies at the start of a cache line, so that no vector load of them crosses one.
#[derive(Debug, Default)]
pub struct Aligned<T> {
    values: Values<T>,
    start: usize,
    len: usize,
}

#[derive(Debug)]
enum Values<T> {
    Owned(Vec<T>),
    Map(MmapMut),
    Shared(Arc<Chunk>),
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self::Owned(Vec::new())
    }
}

/// A map whose parts belong to several buffers, none to two.
#[derive(Debug)]
struct Chunk {
    start: *mut u8,
    /// Keeps the memory.
    _map: MmapMut,
}

// SAFETY: the pointer is only used for parts that one buffer owns, under that buffer's borrow.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// The chunk that new buffers are taken from, and the bytes of it that are taken.
static OPEN: Mutex<Option<(Arc<Chunk>, usize)>> = Mutex::new(None);

/// Zeroed memory of its own; `None` if the system refuses.
fn map(bytes: usize) -> Option<MmapMut> {
    let map = MmapMut::map_anon(bytes).ok()?;
    // Small pages only cost time.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Some(map)
}

impl<T: Pod> Aligned<T> {
    /// `len` zeros.
    pub fn new(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        if bytes >= LARGE
            && let Some(map) = map(bytes)
        {
            return Self {
                values: Values::Map(map),
                start: 0,
                len,
            };
        }
        let spare = LINE / size_of::<T>().max(1);
        let values = vec![T::zeroed(); len + spare];
        // Not being aligned only costs time.
        let start = values.as_ptr().align_offset(LINE).min(spare);
        Self {
            values: Values::Owned(values),
            start,
            len,
        }
    }

    /// `len` zeros that stay as long as a model does: they share large pages with others, whose memory is given back
    /// together.
    pub fn lasting(len: usize) -> Self {
        let bytes = (len * size_of::<T>()).next_multiple_of(LINE);
        if !(4 * LINE..=CHUNK / 2).contains(&bytes) || align_of::<T>() > LINE {
            return Self::new(len);
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = matches!(&*open, Some((_, taken)) if taken + bytes <= CHUNK);
        if !fits {
            let Some(mut map) = map(CHUNK) else {
                return Self::new(len);
            };
            let start = map.as_mut_ptr();
            *open = Some((Arc::new(Chunk { start, _map: map }), 0));
        }
        let Some((chunk, taken)) = &mut *open else {
            return Self::new(len);
        };
        let this = Self {
            values: Values::Shared(chunk.clone()),
            start: *taken / size_of::<T>(),
            len,
        };
        *taken += bytes;
        this
    }

    /// Makes it `len` values long; what they are is not defined. The buffer is kept where it is large enough.
    pub fn resize(&mut self, len: usize) {
        let room = match &self.values {
            Values::Owned(values) => values.len() - self.start,
            Values::Map(map) => map.len() / size_of::<T>(),
            Values::Shared(_) => self.len,
        };
        if len <= room {
            self.len = len;
        } else {
            *self = Self::new(len);
        }
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.values {
            Values::Owned(values) => &values[self.start..self.start + self.len],
            Values::Map(map) => &bytemuck::cast_slice(&map[..self.len * size_of::<T>()])[..self.len],
            // SAFETY: the part lies in the chunk, starts at a cache line, was zeroed, and is of this buffer alone.
            Values::Shared(chunk) => unsafe {
                std::slice::from_raw_parts(chunk.start.cast::<T>().add(self.start), self.len)
            },
        }
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.values {
            Values::Owned(values) => &mut values[self.start..self.start + self.len],
            Values::Map(map) => {
                &mut bytemuck::cast_slice_mut(&mut map[..self.len * size_of::<T>()])[..self.len]
            }
            // SAFETY: as in `deref`; the buffer is borrowed exclusively.
            Values::Shared(chunk) => unsafe {
                std::slice::from_raw_parts_mut(chunk.start.cast::<T>().add(self.start), self.len)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_have_their_length_and_start_at_a_line() {
        for len in [0, 1, 15, 16, 1000, 1 << 19] {
            let mut floats = Aligned::<f32>::new(len);
            assert!(floats.iter().all(|v| *v == 0.0));
            floats.fill(2.0);
            assert_eq!(floats.to_vec(), vec![2.0; len]);
            assert_eq!(floats.as_ptr() as usize % LINE, 0);
            let bytes = Aligned::<u8>::new(len);
            assert_eq!((bytes.len(), bytes.as_ptr() as usize % LINE), (len, 0));
            floats.resize(2 * len);
            assert_eq!((floats.len(), floats.as_ptr() as usize % LINE), (2 * len, 0));
            floats.resize(len / 2);
            assert_eq!(floats.len(), len / 2);
        }
    }

    #[test]
    fn lasting_buffers_do_not_overlap() {
        let sizes = [0usize, 63, 100, 4096, 5 << 20, 3 << 20, 9 << 20, 1 << 20];
        let mut buffers: Vec<Aligned<u16>> = sizes.iter().map(|len| Aligned::lasting(*len)).collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.iter().all(|v| *v == 0));
            assert_eq!(buffer.as_ptr() as usize % LINE, 0);
            buffer.fill(i as u16 + 1);
        }
        for (i, (buffer, len)) in buffers.iter().zip(sizes).enumerate() {
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|v| *v == i as u16 + 1), "{i}");
        }
    }
}
