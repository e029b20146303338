//! Bounds-checked reading of FlatBuffers (<https://flatbuffers.dev/internals/>): every offset is followed only to a
//! place inside the buffer, nothing is allocated.

/// A buffer that is read by position. Every method gives `None` where the bytes end or an offset leaves them.
#[derive(Clone, Copy)]
pub struct Flat<'a>(pub &'a [u8]);

/// A table: where it is, and where its list of fields is.
#[derive(Clone, Copy)]
pub struct Table {
    position: usize,
    fields: usize,
    fields_len: usize,
}

impl<'a> Flat<'a> {
    fn array<const N: usize>(self, position: usize) -> Option<[u8; N]> {
        let end = position.checked_add(N)?;
        self.0.get(position..end)?.try_into().ok()
    }

    fn u16(self, position: usize) -> Option<usize> {
        self.array(position)
            .map(|bytes| usize::from(u16::from_le_bytes(bytes)))
    }

    fn u32(self, position: usize) -> Option<usize> {
        let number = u32::from_le_bytes(self.array(position)?);
        usize::try_from(number).ok()
    }

    fn i32(self, position: usize) -> Option<i32> {
        self.array(position).map(i32::from_le_bytes)
    }

    /// Follows the offset at `position`.
    fn follow(self, position: usize) -> Option<usize> {
        let target = position.checked_add(self.u32(position)?)?;
        (target < self.0.len()).then_some(target)
    }

    /// The four bytes that say which format this is.
    pub fn identifier(self) -> Option<[u8; 4]> {
        self.array(4)
    }

    /// The table that the buffer begins with.
    pub fn root(self) -> Option<Table> {
        self.table(self.follow(0)?)
    }

    fn table(self, position: usize) -> Option<Table> {
        let back = i64::from(self.i32(position)?);
        let fields = usize::try_from(i64::try_from(position).ok()?.checked_sub(back)?).ok()?;
        let fields_len = self.u16(fields)?;
        let table_len = self.u16(fields.checked_add(2)?)?;
        let inside = |start: usize, len: usize| start.checked_add(len).is_some_and(|end| end <= self.0.len());
        let sound = fields_len >= 4 && table_len >= 4;
        (sound && inside(fields, fields_len) && inside(position, table_len)).then_some(Table {
            position,
            fields,
            fields_len,
        })
    }

    /// Where field `index` of a table is; `None` if it is left out.
    fn field(self, table: Table, index: usize) -> Option<usize> {
        let slot = 4 + 2 * index;
        if slot + 2 > table.fields_len {
            return None;
        }
        match self.u16(table.fields + slot)? {
            0 => None,
            offset => table.position.checked_add(offset),
        }
    }

    /// A whole number; 0 if it is left out, as FlatBuffers leaves out defaults.
    pub fn int_field(self, table: Table, index: usize) -> Option<i32> {
        match self.field(table, index) {
            Some(position) => self.i32(position),
            None => Some(0),
        }
    }

    /// Bytes of a text or vector of elements of `size` bytes: the number of elements and where they begin.
    fn vector(self, table: Table, index: usize, size: usize) -> Option<(usize, usize)> {
        let position = self.follow(self.field(table, index)?)?;
        let count = self.u32(position)?;
        let start = position + 4;
        let end = start.checked_add(count.checked_mul(size)?)?;
        (end <= self.0.len()).then_some((count, start))
    }

    /// A text.
    pub fn text_field(self, table: Table, index: usize) -> Option<&'a str> {
        let (count, start) = self.vector(table, index, 1)?;
        std::str::from_utf8(&self.0[start..start + count]).ok()
    }

    /// Where a vector of bytes lies.
    pub fn bytes_field(self, table: Table, index: usize) -> Option<std::ops::Range<usize>> {
        let (count, start) = self.vector(table, index, 1)?;
        Some(start..start + count)
    }

    /// A vector of `int64`, which may hold `most` at most; an absent one is empty.
    pub fn longs_field(self, table: Table, index: usize, most: usize) -> Option<Vec<i64>> {
        if self.field(table, index).is_none() {
            return Some(Vec::new());
        }
        let (count, start) = self.vector(table, index, 8)?;
        if count > most {
            return None;
        }
        let number = |i: usize| self.array(start + 8 * i).map(i64::from_le_bytes);
        (0..count).map(number).collect()
    }

    /// The number of tables in a vector of tables, and where the first one's offset is; an absent vector is empty.
    pub fn tables_field(self, table: Table, index: usize) -> Option<(usize, usize)> {
        match self.field(table, index) {
            Some(_) => self.vector(table, index, 4),
            None => Some((0, 0)),
        }
    }

    /// A table of a vector.
    pub fn table_at(self, first: usize, index: usize) -> Option<Table> {
        self.table(self.follow(first + 4 * index)?)
    }
}
