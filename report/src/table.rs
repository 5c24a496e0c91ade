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

/// Returns `rows` under `header` as a table in Markdown: the first column to the left, the others
/// to the right.
pub fn markdown_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let rule = (0..header.len()).map(|column| if column == 0 { "---" } else { "---:" }).collect();
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    [line(header.to_vec()), line(rule)].into_iter().chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_has_a_header_a_rule_and_a_line_for_each_row() {
        let rows = [vec!["a".to_string(), "1".into()], vec!["b".into(), "20".into()]];
        let text = markdown_table(&["name", "value"], &rows);
        assert_eq!(text, "| name | value |\n| --- | ---: |\n| a | 1 |\n| b | 20 |\n");
    }
}
