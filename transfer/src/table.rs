use std::fmt;

/// Text in rows and columns. `Display` aligns the columns: the first to the left, the others to the right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const COLUMNS: usize>(header: [&'static str; COLUMNS]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn push<const COLUMNS: usize>(&mut self, row: [String; COLUMNS]) {
        self.rows.push(row.to_vec());
    }

    /// The names of the columns.
    pub fn header(&self) -> &[&'static str] {
        &self.header
    }

    /// The rows, each with a cell for every column.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths: Vec<usize> = self.header.iter().map(|name| name.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        write_row(f, &widths, self.header.iter().copied())?;
        for row in &self.rows {
            writeln!(f)?;
            write_row(f, &widths, row.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

fn write_row<'a>(
    f: &mut fmt::Formatter<'_>,
    widths: &[usize],
    cells: impl Iterator<Item = &'a str>,
) -> fmt::Result {
    for (column, (cell, &width)) in cells.zip(widths).enumerate() {
        if column == 0 {
            write!(f, "{cell:<width$}")?;
        } else {
            write!(f, "  {cell:>width$}")?;
        }
    }
    Ok(())
}

/// Microseconds in a cell or a sentence.
pub(crate) fn us(us: f64) -> String {
    // Beyond a quarter of an hour digits say less than their number.
    if us < 1e9 { format!("{us:.1}") } else { format!("{us:.3e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["name", "us"]);
        table.push(["a".to_owned(), "100.5".to_owned()]);
        table.push(["longer".to_owned(), "-".to_owned()]);
        assert_eq!(table.to_string(), "name       us\na       100.5\nlonger      -");
    }
}
