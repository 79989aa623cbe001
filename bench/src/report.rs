//! Medians, bars and tables: how figures are told.

use serde::Serialize;

/// The median; the mean of the middle two for an even count; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// What a figure should reach.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// The limit, in the figure's unit.
    pub limit: f64,
    /// The figure must be at least the limit; else at most.
    pub at_least: bool,
    /// Part of what was promised; else a goal to begin with.
    pub promised: bool,
    /// Whether the figure reaches it.
    pub met: bool,
}

/// A limit before anything was measured.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    limit: f64,
    at_least: bool,
    promised: bool,
}

impl Limit {
    /// A promise: at least this.
    pub const fn at_least(limit: f64) -> Self {
        Self { limit, at_least: true, promised: true }
    }
    /// A promise: at most this.
    pub const fn at_most(limit: f64) -> Self {
        Self { limit, at_least: false, promised: true }
    }
    /// The same as a goal.
    pub const fn goal(self) -> Self {
        Self { promised: false, ..self }
    }
    /// Judges a figure.
    pub fn judge(self, figure: f64) -> Bar {
        let Self { limit, at_least, promised } = self;
        let met = if at_least { figure >= limit } else { figure <= limit };
        Bar { limit, at_least, promised, met }
    }
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} {}: {}",
            if self.promised { "bar" } else { "goal" },
            if self.at_least { "≥" } else { "≤" },
            number(self.limit),
            if self.met { "met" } else { "MISSED" }
        )
    }
}

/// A number as people read it: three significant digits or so.
pub fn number(v: f64) -> String {
    match v.abs() {
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
}

/// Columns, the first to the left and the others to the right but for the last; the widths fit.
pub fn columns(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |i: usize| {
        rows.iter()
            .filter_map(|r| r.get(i))
            .map(|c| c.chars().count())
            .chain([header[i].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let last = header.len() - 1;
    let line = |cells: &[&str]| {
        let mut text = String::new();
        for (i, (cell, w)) in cells.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(w - cell.chars().count());
            let sep = if i == 0 { "" } else { "  " };
            if i == 0 || i == last {
                text += &format!("{sep}{cell}{pad}");
            } else {
                text += &format!("{sep}{pad}{cell}");
            }
        }
        text.trim_end().to_owned()
    };
    let mut out = line(header);
    for row in rows {
        out.push('\n');
        out += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_do_not_depend_on_order_and_ignore_outliers() {
        assert_eq!(median(&[3.0, 1.0, 1000.0]), 3.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn bars_judge_in_their_direction() {
        assert!(Limit::at_least(700.0).judge(700.0).met);
        assert!(!Limit::at_least(700.0).judge(699.0).met);
        assert!(Limit::at_most(8.0).judge(2.0).met);
        assert!(!Limit::at_most(8.0).goal().judge(9.0).met);
    }

    #[test]
    fn columns_line_up() {
        let text = columns(&["job", "ours", "bar"], &[vec!["read".into(), "7".into(), "x".into()]]);
        assert_eq!(text, "job   ours  bar\nread     7  x");
    }
}
