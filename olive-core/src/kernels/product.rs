//! Single-precision matrix products over strided views.
//!
//! With AVX-512 and on AArch64 own micro-kernels compute them, elsewhere the `gemm` crate. Every element is summed in one fixed
//! order, and work is split where that does not show: results do not depend on the number of threads.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
use avx512 as micro;
#[cfg(target_arch = "aarch64")]
use neon as micro;

use std::cell::RefCell;

use rayon::prelude::*;

/// Inner elements that are summed in registers before they reach the destination.
const DEPTH: usize = 384;
/// Columns of the right side that are packed together.
const WIDTH: usize = 256;
/// Rows that are multiplied with all panels of a block while they are in the nearest cache.
const ROWS: usize = 24;
/// Rows of a transposed left side that are packed at a time.
const HEIGHT: usize = 384;
/// Columns of the widest vector; narrower ones go side by side.
const LANES: usize = 16;
/// Columns of a panel, the unit in which the right side is packed: as many as a tile has.
const PANEL: usize = if cfg!(target_arch = "aarch64") { 1 } else { 4 } * LANES;
/// Multiplications that are worth a task of their own.
const TASK: usize = 1 << 20;

/// A matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `[rows, cols]` stored row after row, `row_stride` elements apart.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a [f32], [rows, cols]: [usize; 2], row_stride: usize) -> Self {
        assert!(
            cols <= row_stride && extent(rows, cols, row_stride) <= data.len(),
            "invariant: the view lies in its slice"
        );
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Its transpose.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The part from row `first` with `rows` rows.
    fn rows_from(self, first: usize, rows: usize) -> Self {
        Self {
            data: &self.data[(first * self.row_stride).min(self.data.len())..],
            rows,
            ..self
        }
    }

    /// The part from column `first` with `cols` columns.
    fn cols_from(self, first: usize, cols: usize) -> Self {
        self.transposed().rows_from(first, cols).transposed()
    }
}

/// Elements from the first to the last of a strided matrix.
fn extent(rows: usize, cols: usize, row_stride: usize) -> usize {
    match (rows, cols) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1) * row_stride + cols,
    }
}

/// The left side for micro-kernels.
#[derive(Clone, Copy)]
struct Left {
    start: *const f32,
    row_stride: usize,
    col_stride: usize,
}

/// The destination: `c = alpha · sum`, added to what is there if `add`.
#[derive(Clone, Copy)]
struct Destination {
    start: *mut f32,
    row_stride: usize,
    alpha: f32,
    add: bool,
}

/// A destination whose parts are written by several threads.
#[derive(Clone, Copy)]
struct Shared(Destination);

// SAFETY: every task writes its own rows or columns of the destination, which the caller borrows exclusively.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The destination from row `row` and column `column` on.
    fn part(&self, row: usize, column: usize) -> Destination {
        Destination {
            start: self.0.start.wrapping_add(row * self.0.row_stride + column),
            ..self.0
        }
    }
}

thread_local! {
    /// Packed parts of the right and of the left side.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Whether the micro-kernels run on this processor.
fn own_kernels() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        cfg!(target_arch = "aarch64")
    }
}

fn destination(out: &mut [f32], row_stride: usize, add: bool, alpha: f32, [m, n]: [usize; 2]) -> Destination {
    assert!(
        n <= row_stride && extent(m, n, row_stride) <= out.len(),
        "invariant: the product fits its destination"
    );
    Destination {
        start: out.as_mut_ptr(),
        row_stride,
        alpha,
        add,
    }
}

/// `out [m, n] = alpha · lhs [m, k] · rhs [k, n]` on this thread, added to what is there if `add`; rows of `out` are
/// `row_stride` apart.
///
/// # Panics
/// If the shapes do not fit or `out` is too short.
pub fn product(out: &mut [f32], row_stride: usize, add: bool, alpha: f32, lhs: View<'_>, rhs: View<'_>) {
    assert_eq!(lhs.cols, rhs.rows, "invariant: inner sizes agree");
    let c = destination(out, row_stride, add, alpha, [lhs.rows, rhs.cols]);
    // SAFETY: the destination holds the product, and is borrowed exclusively.
    unsafe { multiply(lhs, rhs, c) };
}

/// As [`product`], shared by the threads of the pool.
///
/// # Panics
/// As [`product`].
pub fn product_parallel(
    out: &mut [f32],
    row_stride: usize,
    add: bool,
    alpha: f32,
    lhs: View<'_>,
    rhs: View<'_>,
) {
    assert_eq!(lhs.cols, rhs.rows, "invariant: inner sizes agree");
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    let c = Shared(destination(out, row_stride, add, alpha, [m, n]));
    // The `gemm` crate does not say that its sums are the same for every split, so that there it is fixed.
    let threads = if own_kernels() {
        rayon::current_num_threads()
    } else {
        8
    };
    let tasks = (m * n * k / TASK).clamp(1, 2 * threads);
    if threads == 1 || tasks == 1 {
        // SAFETY: the destination holds the product, and is borrowed exclusively.
        return unsafe { multiply(lhs, rhs, c.part(0, 0)) };
    }
    // Columns first: their tasks pack nothing twice.
    let by_columns = n >= 2 * PANEL * tasks || n > m;
    let (size, unit) = if by_columns { (n, PANEL) } else { (m, ROWS) };
    let piece = size.div_ceil(tasks).next_multiple_of(unit);
    (0..size.div_ceil(piece)).into_par_iter().for_each(|index| {
        let first = index * piece;
        let count = piece.min(size - first);
        // SAFETY: the destination holds the product, and no other task writes these rows or columns.
        unsafe {
            match by_columns {
                true => multiply(lhs, rhs.cols_from(first, count), c.part(0, first)),
                false => multiply(lhs.rows_from(first, count), rhs, c.part(first, 0)),
            }
        }
    });
}

/// # Safety
/// `c` can be written for the rows of `lhs` and the columns of `rhs`.
unsafe fn multiply(lhs: View<'_>, rhs: View<'_>, c: Destination) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 || !own_kernels() {
        // SAFETY: as promised by the caller.
        return unsafe { by_crate(lhs, rhs, c) };
    }
    SCRATCH.with_borrow_mut(|[right, left]| {
        for j0 in (0..n).step_by(WIDTH) {
            let width = WIDTH.min(n - j0);
            for p0 in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - p0);
                let size = depth * width.next_multiple_of(LANES);
                if right.len() < size {
                    right.resize(size, 0.0);
                }
                pack_block(rhs, [p0, depth], [j0, width], right);
                let part = Destination {
                    start: c.start.wrapping_add(j0),
                    add: c.add || p0 > 0,
                    ..c
                };
                // SAFETY: the block lies in both sides and in the destination.
                unsafe { multiply_block(lhs, [p0, depth], right, width, part, left) };
            }
        }
    });
}

/// The product of columns `p0..p0 + depth` of `lhs` with a packed block.
///
/// # Safety
/// `c` can be written for the rows of `lhs` and `width` columns.
unsafe fn multiply_block(
    lhs: View<'_>,
    [p0, depth]: [usize; 2],
    block: &[f32],
    width: usize,
    c: Destination,
    scratch: &mut Vec<f32>,
) {
    let m = lhs.rows;
    assert!(
        block.len() >= depth * width.next_multiple_of(LANES) && p0 + depth <= lhs.cols,
        "invariant: the block is whole"
    );
    let height = if lhs.col_stride == 1 { m } else { HEIGHT };
    for i0 in (0..m).step_by(height.max(1)) {
        let rows = height.min(m - i0);
        let own = lhs.rows_from(i0, rows).cols_from(p0, depth);
        let left = match lhs.col_stride {
            1 => Left {
                start: own.data.as_ptr(),
                row_stride: own.row_stride,
                col_stride: 1,
            },
            _ => pack_left(own, scratch),
        };
        for r0 in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - r0);
            for j in (0..width).step_by(PANEL) {
                let columns = PANEL.min(width - j);
                let a = Left {
                    start: left.start.wrapping_add(r0 * left.row_stride),
                    ..left
                };
                let c = Destination {
                    start: c.start.wrapping_add((i0 + r0) * c.row_stride + j),
                    ..c
                };
                let panel = block[j * depth..].as_ptr();
                // SAFETY: `own_kernels` was asked; the rows lie in the left side, the panel in the block, and the
                // tile in the destination.
                unsafe { panel_product(a, [count, depth], panel, columns, c) };
            }
        }
    }
}

/// # Safety
/// As [`micro::panel_product`], on a processor that [`own_kernels`] is true of.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline]
unsafe fn panel_product(a: Left, size: [usize; 2], panel: *const f32, columns: usize, c: Destination) {
    // SAFETY: as promised by the caller.
    unsafe { micro::panel_product(a, size, panel, columns, c) };
}

/// # Safety
/// Never called: there are no micro-kernels.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn panel_product(_: Left, _: [usize; 2], _: *const f32, _: usize, _: Destination) {}

/// A transposed left side with the rows of each inner element side by side.
fn pack_left(a: View<'_>, out: &mut Vec<f32>) -> Left {
    let (rows, depth) = (a.rows, a.cols);
    if out.len() < rows * depth {
        out.resize(rows * depth, 0.0);
    }
    for (p, out) in out.chunks_exact_mut(rows).enumerate().take(depth) {
        let column = &a.data[p * a.col_stride..];
        if a.row_stride == 1 {
            out.copy_from_slice(&column[..rows]);
        } else {
            for (i, value) in out.iter_mut().enumerate() {
                *value = column[i * a.row_stride];
            }
        }
    }
    Left {
        start: out.as_ptr(),
        row_stride: 1,
        col_stride: rows,
    }
}

/// Packs `[depth, width]` of the right side: panel after panel, the rows of each side by side, the last one filled up
/// with zeros to whole vectors.
fn pack_block(b: View<'_>, [p0, depth]: [usize; 2], [j0, width]: [usize; 2], out: &mut [f32]) {
    for j in (0..width).step_by(PANEL) {
        let columns = PANEL.min(width - j);
        let padded = columns.next_multiple_of(LANES);
        let panel = &mut out[j * depth..][..padded * depth];
        if b.col_stride == 1 {
            for (p, row) in panel.chunks_exact_mut(padded).enumerate() {
                let source = &b.data[(p0 + p) * b.row_stride + j0 + j..][..columns];
                row[..columns].copy_from_slice(source);
                row[columns..].fill(0.0);
            }
            continue;
        }
        for v in (0..columns).step_by(LANES) {
            let count = LANES.min(columns - v);
            let source = &b.data[(j0 + j + v) * b.col_stride + p0 * b.row_stride..];
            let whole = count == LANES && b.row_stride == 1;
            if !(whole && transpose_lanes(source, b.col_stride, depth, &mut panel[v..], padded)) {
                for (p, row) in panel.chunks_exact_mut(padded).enumerate() {
                    for (l, value) in row[v..][..LANES].iter_mut().enumerate() {
                        let inside = l < count;
                        *value = if inside {
                            source[p * b.row_stride + l * b.col_stride]
                        } else {
                            0.0
                        };
                    }
                }
            }
        }
    }
}

/// Packs 16 columns that are contiguous along the inner dimension; whether it could.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn transpose_lanes(source: &[f32], stride: usize, depth: usize, out: &mut [f32], width: usize) -> bool {
    let fits = source.len() >= extent(LANES, depth, stride) && out.len() >= extent(depth, LANES, width);
    if fits && own_kernels() {
        // SAFETY: the micro-kernels run on this processor, and both sides were checked.
        unsafe { micro::pack_transposed(source.as_ptr(), stride, depth, out.as_mut_ptr(), width) };
    }
    fits && own_kernels()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn transpose_lanes(_: &[f32], _: usize, _: usize, _: &mut [f32], _: usize) -> bool {
    false
}

/// # Safety
/// `c` can be written for the rows of `lhs` and the columns of `rhs`.
unsafe fn by_crate(lhs: View<'_>, rhs: View<'_>, c: Destination) {
    // SAFETY: both views were checked to lie in their slices for their strides, a transpose and a part keep that; the
    // caller promises the destination.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            c.start,
            1,
            c.row_stride as isize,
            c.add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            if c.add { 1.0 } else { 0.0 },
            c.alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A right side that is multiplied often, in the order in which the kernel reads it.
#[derive(Debug, Clone)]
pub struct Packed {
    k: usize,
    n: usize,
    /// Blocks as [`pack_block`] makes them, or `[k, n]` where there are no micro-kernels.
    data: Vec<f32>,
}

impl Packed {
    /// Packs `rhs [k, n]`.
    pub fn new(rhs: View<'_>) -> Self {
        let (k, n) = (rhs.rows, rhs.cols);
        if !own_kernels() {
            let row = |p: usize| (0..n).map(move |j| rhs.data[p * rhs.row_stride + j * rhs.col_stride]);
            let data = (0..k).flat_map(row).collect();
            return Self { k, n, data };
        }
        let mut data = vec![0.0; k * n.next_multiple_of(LANES)];
        data.par_chunks_mut((k * WIDTH).max(1))
            .enumerate()
            .for_each(|(block, out)| {
                let j0 = block * WIDTH;
                let width = WIDTH.min(n - j0);
                for p0 in (0..k).step_by(DEPTH) {
                    let depth = DEPTH.min(k - p0);
                    pack_block(
                        rhs,
                        [p0, depth],
                        [j0, width],
                        &mut out[p0 * width.next_multiple_of(LANES)..],
                    );
                }
            });
        Self { k, n, data }
    }

    /// `[k, n]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.k, self.n]
    }
}

/// As [`product`] with a packed right side.
///
/// # Panics
/// As [`product`].
pub fn product_packed(
    out: &mut [f32],
    row_stride: usize,
    add: bool,
    alpha: f32,
    lhs: View<'_>,
    rhs: &Packed,
) {
    let (n, k) = (rhs.n, rhs.k);
    assert_eq!(lhs.cols, k, "invariant: inner sizes agree");
    if !own_kernels() || k == 0 {
        return product(out, row_stride, add, alpha, lhs, View::new(&rhs.data, [k, n], n));
    }
    let c = destination(out, row_stride, add, alpha, [lhs.rows, n]);
    SCRATCH.with_borrow_mut(|[_, left]| {
        for j0 in (0..n).step_by(WIDTH) {
            let width = WIDTH.min(n - j0);
            let block = &rhs.data[j0 * k..];
            for p0 in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - p0);
                let part = Destination {
                    start: c.start.wrapping_add(j0),
                    add: c.add || p0 > 0,
                    ..c
                };
                let packed = &block[p0 * width.next_multiple_of(LANES)..];
                // SAFETY: the block lies in the left side and in the destination.
                unsafe { multiply_block(lhs, [p0, depth], packed, width, part, left) };
            }
        }
    });
}

/// The dot product of each row of `a` with the same row of `b`, both `[rows, cols]`, in double precision.
pub fn row_dots<'a>(a: &'a [f32], b: &'a [f32], cols: usize) -> impl Iterator<Item = f64> + 'a {
    let rows = a.chunks_exact(cols).zip(b.chunks_exact(cols));
    rows.map(|(a, b)| super::wide(long_dot, (a, b)))
}

/// Sixteen partial sums of a short block in single precision keep the loop vectorised; the blocks are summed in double
/// precision.
#[inline(always)]
fn long_dot(a: &[f32], b: &[f32]) -> f64 {
    let mut total = 0.0;
    for (a, b) in a.chunks(128).zip(b.chunks(128)) {
        let mut sums = [0.0f32; LANES];
        let (a16, b16) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a16.0.iter().zip(b16.0) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum += a * b;
            }
        }
        let tail: f32 = a16.1.iter().zip(b16.1).map(|(a, b)| a * b).sum();
        total += f64::from(sums.iter().sum::<f32>() + tail);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0) - 1.0)
            .collect()
    }

    fn close(out: &[f32], expected: impl Fn(usize) -> f64, what: &str) {
        for (index, value) in out.iter().enumerate() {
            let wanted = expected(index);
            assert!(
                (f64::from(*value) - wanted).abs() < 2e-4,
                "{what} {index}: {value} {wanted}"
            );
        }
    }

    #[test]
    fn products_equal_the_plain_triple_loop() {
        let sizes = [
            [1, 1, 1],
            [3, 5, 7],
            [16, 33, 64],
            [65, 17, 129],
            [13, 300, 800],
            [7, 64, 0],
            [401, 20, 30],
            [50, 600, 40],
        ];
        for [m, n, k] in sizes {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            for turned in 0..4 {
                let (a_turned, b_turned) = (turned & 1 == 1, turned & 2 == 2);
                let lhs = match a_turned {
                    true => View::new(&a, [k, m], m).transposed(),
                    false => View::new(&a, [m, k], k),
                };
                let rhs = match b_turned {
                    true => View::new(&b, [n, k], k.max(1)).transposed(),
                    false => View::new(&b, [k, n], n),
                };
                let at = |i: usize, j: usize, l: usize| {
                    let a = if a_turned { a[l * m + i] } else { a[i * k + l] };
                    let b = if b_turned { b[j * k + l] } else { b[l * n + j] };
                    f64::from(a) * f64::from(b)
                };
                let wide = n + 3;
                let expected = |add: f64| {
                    move |index: usize| {
                        let (i, j) = (index / wide, index % wide);
                        match j < n {
                            true => add + 0.5 * (0..k).map(|l| at(i, j, l)).sum::<f64>(),
                            false => 1.0,
                        }
                    }
                };
                for add in [false, true] {
                    let what = format!("{m} {n} {k} {turned} {add}");
                    let expected = expected(if add { 1.0 } else { 0.0 });
                    let mut out = vec![1.0; m * wide];
                    product(&mut out, wide, add, 0.5, lhs, rhs);
                    close(&out, expected, &what);
                    let mut parallel = vec![1.0; m * wide];
                    product_parallel(&mut parallel, wide, add, 0.5, lhs, rhs);
                    assert_eq!(out, parallel, "{what}");
                    let mut packed = vec![1.0; m * wide];
                    product_packed(&mut packed, wide, add, 0.5, lhs, &Packed::new(rhs));
                    assert_eq!(out, packed, "{what}");
                    let mut crate_out = vec![1.0; m * wide];
                    let c = destination(&mut crate_out, wide, add, 0.5, [m, n]);
                    // SAFETY: the destination was checked.
                    unsafe { by_crate(lhs, rhs, c) };
                    close(&crate_out, expected, &what);
                }
            }
        }
    }

    #[test]
    fn a_result_does_not_depend_on_the_number_of_threads() {
        let (m, n, k) = (300, 520, 700);
        let (a, b) = (values(m * k, 5), values(k * n, 6));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut out = vec![0.0; m * n];
            pool.install(|| {
                let (lhs, rhs) = (View::new(&a, [m, k], k), View::new(&b, [n, k], k).transposed());
                product_parallel(&mut out, n, false, 1.0, lhs, rhs);
            });
            out
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert_eq!(one, run(threads), "{threads} threads");
        }
    }

    #[test]
    fn row_dots_follow_the_definition_at_ragged_widths() {
        for cols in [1, 7, 8, 63, 64, 65, 130, 300] {
            let (a, b) = (values(3 * cols, 3), values(3 * cols, 4));
            for (row, dot) in row_dots(&a, &b, cols).enumerate() {
                let range = row * cols..(row + 1) * cols;
                let want: f64 = a[range.clone()]
                    .iter()
                    .zip(&b[range])
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum();
                assert!((dot - want).abs() < 1e-5 * cols as f64);
            }
        }
    }
}
