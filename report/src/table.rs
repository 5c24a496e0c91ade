//! Tables on standard output.

/// Prints `rows` under `header` with aligned columns: the first to the left, the others to the
/// right.
pub fn print_table(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cell = |(i, cell): (usize, &str)| {
            let pad = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
            if i == 0 { format!("{cell}{pad}") } else { format!("{pad}{cell}") }
        };
        let text: Vec<String> = cells.into_iter().enumerate().map(cell).collect();
        println!("  {}", text.join("   ").trim_end());
    };
    line(header.to_vec());
    rows.iter().for_each(|row| line(row.iter().map(String::as_str).collect()));
}
