//! Sixteen rows side by side.

use bytemuck::Pod;

use super::super::aligned::Aligned;
use super::super::parallel::{self, Parts};
use super::GROUP;

/// `[n, columns]` as `[groups, columns, 16]`; places behind the last row stay zero.
pub fn interleave<T: Pod + Send + Sync>(rows: &[T], n: usize, columns: usize) -> Aligned<T> {
    let mut out = Aligned::<T>::lasting(n.div_ceil(GROUP) * columns * GROUP);
    let groups = Parts::new(&mut out);
    parallel::for_each(n.div_ceil(GROUP), n * columns, |g| {
        // SAFETY: groups do not overlap.
        let group = unsafe { groups.slice(g * columns * GROUP..(g + 1) * columns * GROUP) };
        let rows = &rows[g * GROUP * columns..((g + 1) * GROUP).min(n) * columns];
        fill_group(rows, columns, group.as_chunks_mut::<GROUP>().0);
    });
    out
}

/// Packed rows, a whole number of four-byte steps each, as `[groups, steps, 16, 4]`.
pub fn interleave_steps(bytes: &[u8], n: usize) -> Aligned<u8> {
    let steps = bytes.len() / n / 4;
    let mut out = Aligned::<u8>::lasting(n.div_ceil(GROUP) * steps * 4 * GROUP);
    let groups = Parts::new(&mut out);
    let bytes = bytes.as_chunks::<4>().0;
    parallel::for_each(n.div_ceil(GROUP), bytes.len(), |g| {
        // SAFETY: groups do not overlap.
        let group = unsafe { groups.slice(g * steps * 4 * GROUP..(g + 1) * steps * 4 * GROUP) };
        let rows = &bytes[g * GROUP * steps..((g + 1) * GROUP).min(n) * steps];
        fill_group(
            rows,
            steps,
            group.as_chunks_mut::<4>().0.as_chunks_mut::<GROUP>().0,
        );
    });
    out
}

fn fill_group<T: Copy>(rows: &[T], columns: usize, group: &mut [[T; GROUP]]) {
    if rows.len() == GROUP * columns {
        let rows: [&[T]; GROUP] = std::array::from_fn(|r| &rows[r * columns..(r + 1) * columns]);
        for (c, group) in group.iter_mut().enumerate() {
            *group = std::array::from_fn(|r| rows[r][c]);
        }
    } else {
        for (r, row) in rows.chunks_exact(columns.max(1)).enumerate() {
            for (group, v) in group.iter_mut().zip(row) {
                group[r] = *v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_side_by_side() {
        for n in [1, 16, 37] {
            let rows: Vec<u16> = (0..n as u16 * 5).collect();
            let out = interleave(&rows, n, 5);
            let bytes: Vec<u8> = rows
                .iter()
                .flat_map(|v| [*v as u8, 1, 2, (*v >> 8) as u8])
                .collect();
            let steps = interleave_steps(&bytes, n);
            for (i, v) in out.iter().enumerate() {
                let (row, column) = (i / 80 * 16 + i % 16, i % 80 / 16);
                let want = if row < n { rows[row * 5 + column] } else { 0 };
                assert_eq!(*v, want, "{n} {i}");
                let step = if row < n {
                    [want as u8, 1, 2, (want >> 8) as u8]
                } else {
                    [0; 4]
                };
                assert_eq!(steps[4 * i..4 * i + 4], step);
            }
        }
    }
}
