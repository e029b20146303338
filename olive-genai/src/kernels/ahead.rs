//! Asking for memory before it is needed.

/// How far ahead a loop asks, in bytes: processors do so by themselves only up to the end of a page.
pub const AHEAD: usize = 8192;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for as many bytes as `values` has, [`AHEAD`] bytes behind its start. What lies there need not be memory.
#[inline(always)]
pub fn read_ahead<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(values)).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let place = values.as_ptr().cast::<i8>().wrapping_add(AHEAD + line);
        // SAFETY: it only fills caches; every x86-64 processor has the instruction, and no address is a fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, AHEAD, LINE);
}
