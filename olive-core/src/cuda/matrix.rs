//! Matrices in device memory, and views of them that a matrix product can read and write in place.

use cubecl::server::Handle;

/// The type of a matrix's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
}

impl Element {
    /// Bytes of one.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A row-major matrix without gaps. Clones share the memory.
#[derive(Debug, Clone)]
pub struct Matrix {
    pub(super) handle: Handle,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Type of the elements.
    pub element: Element,
}

impl Matrix {
    /// Elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it.
    pub fn view(&self) -> View<'_> {
        View {
            matrix: self,
            offset: 0,
            stride: self.cols,
            batch_stride: 0,
            transposed: false,
        }
    }

    /// It from element (`row`, `col`) on.
    pub fn from(&self, row: usize, col: usize) -> View<'_> {
        self.view().shifted(row * self.cols + col)
    }

    /// As [`Matrix::view`], transposed.
    pub fn t(&self) -> View<'_> {
        self.view().t()
    }

    /// `rows * cols` elements from element `first` on as a matrix that shares the memory.
    pub fn part(&self, first: usize, rows: usize, cols: usize) -> Self {
        let bytes = |elements: usize| (elements * self.element.size()) as u64;
        let rest = self.len() - first - rows * cols;
        let handle = self.handle.clone().offset_start(bytes(first));
        Self {
            handle: handle.offset_end(bytes(rest)),
            rows,
            cols,
            element: self.element,
        }
    }

    /// Rows `first..first + rows` as a matrix that shares the memory.
    pub fn rows(&self, first: usize, rows: usize) -> Self {
        self.part(first * self.cols, rows, self.cols)
    }
}

/// A matrix, or several at equal distances, inside a [`Matrix`].
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub(super) matrix: &'a Matrix,
    /// Elements before the first.
    pub(super) offset: usize,
    /// Elements from row to row as stored.
    pub(super) stride: usize,
    /// Elements from one matrix of a batch to the next.
    pub(super) batch_stride: usize,
    pub(super) transposed: bool,
}

impl View<'_> {
    /// Its transpose.
    pub fn t(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    /// It `elements` further on.
    pub fn shifted(self, elements: usize) -> Self {
        Self {
            offset: self.offset + elements,
            ..self
        }
    }

    /// The first of a batch whose matrices begin `elements` apart.
    pub fn every(self, elements: usize) -> Self {
        Self {
            batch_stride: elements,
            ..self
        }
    }
}
