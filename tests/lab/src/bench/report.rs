//! The benchmark's table and its chart.

use crate::bench::contender::Contender;
use crate::bench::ratios::{Cell, Cells, Row, median, short};
use std::fmt::Write as _;

/// A column or a panel: its heading, its cell, and how its value is shown.
type Column = (&'static str, Cell, fn(f64) -> String);

const COLUMNS: [Column; 15] = [
    ("TCP 1 out Gb/s", Cell::Tcp1, short),
    ("TCP 1 back Gb/s", Cell::Tcp1Back, short),
    ("TCP 1 cubic Gb/s", Cell::Tcp1Cubic, short),
    ("TCP 8 out Gb/s", Cell::Tcp8, short),
    ("TCP 8 back Gb/s", Cell::Tcp8Back, short),
    ("wire off Gb/s", Cell::Tcp1WireOff, short),
    ("UDP 64 kpkt/s", Cell::Udp64, thousands),
    ("UDP 512 kpkt/s", Cell::Udp512, thousands),
    ("UDP 1300 kpkt/s", Cell::Udp1300, thousands),
    ("re- ordered ppm", Cell::Reordered, short),
    ("CPU-s /GB fixed", Cell::CpuFixed, short),
    ("CPU-s /GB full", Cell::CpuFull, short),
    ("workers /AEAD user", Cell::CpuVsAead, short),
    ("p50 µs", Cell::LatencyP50, short),
    ("p99 µs", Cell::LatencyP99, short),
];

fn thousands(value: f64) -> String {
    short(value / 1e3)
}

/// The medians, a line for each contender that has any.
pub fn table(cells: &Cells, contenders: &[Contender]) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let depth = COLUMNS.iter().map(|(heading, ..)| heading.split(' ').count()).max().unwrap_or(0);
    for line in 0..depth {
        let mut row = vec![String::new()];
        row.extend(COLUMNS.iter().map(|(heading, ..)| {
            // Headings stand on the last lines.
            let words: Vec<&str> = heading.split(' ').collect();
            let skipped = depth - words.len();
            line.checked_sub(skipped).and_then(|at| words.get(at)).copied().unwrap_or("").to_owned()
        }));
        rows.push(row);
    }
    for contender in contenders {
        let mut row = vec![contender.name().to_owned()];
        row.extend(
            COLUMNS.iter().map(|(_, cell, show)| {
                median(cells, *contender, *cell).map_or("–".to_owned(), show)
            }),
        );
        if row.iter().skip(1).any(|value| value != "–") {
            rows.push(row);
        }
    }
    aligned(&rows)
}

/// The first column to the left, the others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        rows.iter()
            .filter_map(|row| row.get(at))
            .map(|text| text.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..=COLUMNS.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (at, (value, width)) in row.iter().zip(&widths).enumerate() {
            let space = " ".repeat(width - value.chars().count());
            if at == 0 {
                line.push_str(&format!("{value}{space}"));
            } else {
                line.push_str(&format!("  {space}{value}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The bars, one a line.
pub fn bars(rows: &[Row]) -> String {
    let mut text = String::new();
    for Row { figure, bar, measured, pass, key } in rows {
        let word = if *pass { "pass" } else { "FAIL" };
        let _ = writeln!(text, "{word}  {figure} | {bar} | {measured} | {key}");
    }
    text
}

const PANELS: [Column; 3] = [
    ("TCP, one stream, Gb/s", Cell::Tcp1, short),
    ("UDP, 64 bytes, thousand packets a second, < 0.1 % lost", Cell::Udp64, thousands),
    ("CPU-seconds of the whole machine per GB of TCP, at full rate", Cell::CpuFull, short),
];
/// The drawing's measures, in pixels.
const WIDTH: f64 = 720.0;
const LABEL: f64 = 150.0;
const BAR: f64 = 18.0;
const STEP: f64 = 24.0;

/// The medians of three cells as bars. `note` says where they come from.
pub fn chart(cells: &Cells, contenders: &[Contender], note: &str) -> String {
    let mut body = String::new();
    let mut y = 10.0;
    for (title, cell, show) in PANELS {
        let values: Vec<(Contender, f64)> =
            contenders.iter().filter_map(|one| Some((*one, median(cells, *one, cell)?))).collect();
        let largest = values.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        if largest <= 0.0 {
            continue;
        }
        y += 18.0;
        let _ = writeln!(body, "<text x=\"10\" y=\"{y}\" font-weight=\"bold\">{title}</text>");
        y += 10.0;
        for (contender, value) in values {
            let length = value / largest * (WIDTH - LABEL - 80.0);
            let color = match contender {
                one if one.is_tandem() => "#2563a8",
                Contender::Plain => "#b8bec6",
                _ => "#7d8794",
            };
            let (text, end) = (y + BAR - 5.0, LABEL + length + 6.0);
            let (name, value) = (contender.name(), show(value));
            let _ = writeln!(
                body,
                "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{LABEL}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{color}\"/>\
                 <text x=\"{end:.1}\" y=\"{text}\">{value}</text>",
                LABEL - 6.0
            );
            y += STEP;
        }
        y += 8.0;
    }
    y += 14.0;
    let note = note.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(body, "<text x=\"10\" y=\"{y}\" fill=\"#555\">{note}</text>");
    y += 12.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" \
         viewBox=\"0 0 {WIDTH} {y}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn cells() -> Cells {
        let value = |value: f64| BTreeMap::from([(0, value)]);
        Cells::from([
            ((Contender::Plain, Cell::Tcp1), value(120.0)),
            ((Contender::Tandem, Cell::Tcp1), value(60.0)),
            ((Contender::Tandem, Cell::Udp64), value(123_456.0)),
        ])
    }

    #[test]
    fn the_table_has_a_line_for_each_who_was_measured_in_columns() {
        let text = table(&cells(), &Contender::ALL);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4 + 2, "{text}");
        assert!(lines[4].starts_with("plain ") && lines[5].starts_with("tandem "));
        assert!(lines[5].contains(" 60.0 ") && lines[5].contains(" 123 "), "{text}");
        let end =
            |line: &str, word: &str| line[..line.find(word).unwrap() + word.len()].chars().count();
        assert_eq!(end(lines[4], "120"), end(lines[5], "60.0"));
    }

    #[test]
    fn the_charts_bars_are_as_long_as_their_values() {
        let text = chart(&cells(), &Contender::ALL, "a < b");
        assert!(text.contains("width=\"490.0\"") && text.contains("width=\"245.0\""), "{text}");
        assert!(text.contains("a &lt; b") && !text.contains("CPU-seconds"));
        assert_eq!(text.matches("<text").count(), text.matches("</text>").count());
    }
}
