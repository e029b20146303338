//! Buffers that start at a cache line, large ones in large pages.
//!
//! A token reads all weights once. With pages of 4 KiB the processor looks up a page every 64 cache lines, which on a
//! virtual machine takes as long as the reading; so large buffers ask the system for pages of 2 MiB.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
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
#[derive(Debug)]
pub struct Aligned<T> {
    /// The first value, in `memory`.
    start: NonNull<T>,
    len: usize,
    /// Values that there is room for.
    room: usize,
    _memory: Memory<T>,
}

#[derive(Debug)]
enum Memory<T> {
    Owned { _values: Vec<T> },
    Map { _map: MmapMut },
    Shared { _chunk: Arc<Chunk> },
}

// SAFETY: the pointer is to memory that only this buffer uses, under the borrow of the buffer.
unsafe impl<T: Send> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Aligned<T> {}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self {
            start: NonNull::dangling(),
            len: 0,
            room: 0,
            _memory: Memory::Owned { _values: Vec::new() },
        }
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
            && let Some(mut map) = map(bytes)
            && let Some(start) = NonNull::new(map.as_mut_ptr().cast::<T>())
        {
            return Self {
                start,
                len,
                room: len,
                _memory: Memory::Map { _map: map },
            };
        }
        let spare = LINE / size_of::<T>().max(1);
        let mut values = vec![T::zeroed(); len + spare];
        // Not being aligned only costs time.
        let offset = values.as_ptr().align_offset(LINE).min(spare);
        Self {
            start: NonNull::from(&mut values[offset..]).cast(),
            len,
            room: len + spare - offset,
            _memory: Memory::Owned { _values: values },
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
        // SAFETY: `taken` bytes and as many as are asked for lie in the chunk, whose start is not null.
        let start = unsafe { NonNull::new_unchecked(chunk.start.add(*taken).cast::<T>()) };
        let memory = Memory::Shared {
            _chunk: chunk.clone(),
        };
        *taken += bytes;
        Self {
            start,
            len,
            room: len,
            _memory: memory,
        }
    }

    /// Makes it `len` values long; what they are is not defined. The buffer is kept where it is large enough.
    pub fn resize(&mut self, len: usize) {
        if len <= self.room {
            self.len = len;
        } else {
            *self = Self::new(len);
        }
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: there is room for `len` values from `start` on in memory that is of this buffer alone and was zeroed
        // when it was made; any bytes are a `T`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the buffer is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
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
