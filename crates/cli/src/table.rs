//! Tables for people, that fit the terminal.

use std::io::IsTerminal;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Between columns.
const GAP: usize = 2;
/// A column that is cut is not cut below this.
const LEAST: usize = 8;

/// Columns of the terminal on standard output; `None` where it is none, and nothing needs to be cut.
fn terminal_width() -> Option<usize> {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| size.ws_col);
    Some(if columns == 0 { 80 } else { columns.into() })
}

/// Text without what a terminal would obey.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Prints a table: a heading, and rows of as many cells. `flexible` is the column that is cut when the terminal is
/// narrow.
pub fn print(heading: &[&str], rows: &[Vec<String>], flexible: usize) {
    print!("{}", lay_out(heading, rows, flexible, terminal_width()));
}

fn lay_out(heading: &[&str], rows: &[Vec<String>], flexible: usize, width: Option<usize>) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| clean(cell)).collect()).collect();
    let mut widths: Vec<usize> = heading.iter().map(|h| h.width()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    if let Some(columns) = width {
        let all = widths.iter().sum::<usize>() + GAP * (widths.len() - 1);
        if all > columns {
            widths[flexible] = widths[flexible].saturating_sub(all - columns).max(LEAST);
        }
    }
    let mut text = String::new();
    let heading: Vec<String> = heading.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&heading).chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let cell = cut(cell, *width);
            line.push_str(&cell);
            line.extend(std::iter::repeat_n(' ', width - cell.width() + GAP));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The text, or its beginning and an ellipsis.
fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.into();
    }
    let mut short = String::new();
    let mut used = 0;
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used >= width {
            break;
        }
        short.push(c);
    }
    short + "…"
}

/// A list of names and values.
pub fn print_pairs(pairs: &[(String, String)]) {
    let width = pairs.iter().map(|(name, _)| name.width()).max().unwrap_or(0);
    for (name, value) in pairs {
        let gap = " ".repeat(width - name.width() + GAP);
        println!("{}{gap}{}", clean(name), clean(value));
    }
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_fit() {
        let rows =
            vec![vec!["名前の長い仮想マシン".to_string(), "Running".into()], vec!["a\x1b[31m".into(), "Off".into()]];
        let text = lay_out(&["NAME", "STATE"], &rows, 0, Some(20));
        assert!(text.lines().all(|l| l.width() <= 20), "{text}");
        assert!(text.contains('…') && !text.contains('\x1b'), "{text}");
        let wide = lay_out(&["NAME", "STATE"], &rows, 0, None);
        assert!(wide.contains("名前の長い仮想マシン"));
    }
}
