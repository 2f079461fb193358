//! Answers of the engines and how they are compared: as multisets, numbers by value, doubles with a
//! tolerance.

use serde_json::Value;

/// Doubles that differ less than this, in proportion or at all, are equal: deviations and averages are
/// computed in other orders.
const TOLERANCE: f64 = 1e-9;
/// Rows that a finding shows.
const SHOWN: usize = 6;

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Answer {
    /// Types as we name them; empty for the other engine.
    pub(crate) types: Vec<String>,
    pub(crate) rows: Vec<Vec<Value>>,
}

#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Exact(String),
    Double(f64),
}

impl Answer {
    /// From one entry of `results`.
    pub(crate) fn of(result: &Value) -> Self {
        let columns = result["columns"].as_array();
        let types = columns
            .into_iter()
            .flatten()
            .map(|column| column["type"].as_str().unwrap_or_default().to_string())
            .collect();
        Self {
            types,
            rows: rows(&result["rows"]),
        }
    }

    /// What the other engine answered.
    pub(crate) fn untyped(result: &Value) -> Self {
        Self {
            types: vec![],
            rows: rows(result),
        }
    }

    /// What `self` has and `other` lacks, and the reverse; none when they are equal. With `part`
    /// only the first counts.
    pub(crate) fn difference(&self, other: &Self, part: bool) -> Option<String> {
        let width = self.types.len();
        let doubles: Vec<bool> = (0..width)
            .map(|i| {
                let fractional = |row: &Vec<Value>| row.get(i).is_some_and(Value::is_f64);
                self.types[i] == "DOUBLE"
                    || self.types[i].starts_with("DECIMAL") && other.rows.iter().any(fractional)
            })
            .collect();
        let mut left = cells(self, &self.types, &doubles);
        let mut right = cells(other, &self.types, &doubles);
        // Both sides are sorted by what is exact, then by rounded doubles.
        left.sort_by_cached_key(|row| key(row));
        right.sort_by_cached_key(|row| key(row));
        let (mut extra, mut missing) = (Vec::new(), Vec::new());
        let mut used = vec![false; right.len()];
        for row in &left {
            let low = right.partition_point(|other| exact(other) < exact(row));
            let found = (low..right.len())
                .take_while(|i| exact(&right[*i]) == exact(row))
                .find(|i| !used[*i] && near(row, &right[*i]));
            match found {
                Some(i) => used[i] = true,
                None => extra.push(row),
            }
        }
        missing.extend(
            right
                .iter()
                .zip(&used)
                .filter(|(_, u)| !**u)
                .map(|(r, _)| r),
        );
        if extra.is_empty() && (part || missing.is_empty()) {
            return None;
        }
        let show = |rows: &[&Vec<Cell>], head: &str| -> String {
            let mut text = String::new();
            for row in rows.iter().take(SHOWN) {
                text.push_str(&format!("    {head} {}\n", print(row)));
            }
            if rows.len() > SHOWN {
                text.push_str(&format!("    {head} … {} rows in all\n", rows.len()));
            }
            text
        };
        Some(show(&extra, "only here ") + &show(&missing, "only there"))
    }
}

fn rows(value: &Value) -> Vec<Vec<Value>> {
    let rows = value.as_array().into_iter().flatten();
    rows.map(|row| row.as_array().cloned().unwrap_or_default())
        .collect()
}

fn cells(answer: &Answer, types: &[String], doubles: &[bool]) -> Vec<Vec<Cell>> {
    let cell = |i: usize, value: &Value| match types.get(i) {
        Some(ty) => cell(ty, value, doubles[i]),
        None => Cell::Exact(value.to_string()),
    };
    answer
        .rows
        .iter()
        .map(|row| row.iter().enumerate().map(|(i, v)| cell(i, v)).collect())
        .collect()
}

fn cell(ty: &str, value: &Value, double: bool) -> Cell {
    if double && !value.is_null() {
        if let Some(number) = number_of(value) {
            // -0 and 0 are equal, hence one value.
            return Cell::Double(if number == 0.0 { 0.0 } else { number });
        }
    }
    Cell::Exact(text(ty, value))
}

fn number_of(value: &Value) -> Option<f64> {
    value
        .as_f64()
        .or_else(|| value.as_str().and_then(|text| text.parse().ok()))
}

fn text(ty: &str, value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(values) => {
            let element = ty.trim_end_matches("[]");
            let parts: Vec<String> = values.iter().map(|value| text(element, value)).collect();
            format!("[{}]", parts.join(", "))
        }
        Value::String(string) => match ty {
            "TEXT" => format!("'{string}'"),
            "DOUBLE" => string.parse::<f64>().map_or(string.clone(), double_text),
            "DATE" | "BOOLEAN" => string.clone(),
            _ if ty.starts_with("TIMESTAMP") => moment(string),
            _ => decimal(string),
        },
        Value::Number(number) if ty == "DOUBLE" => double_text(number.as_f64().unwrap_or(f64::NAN)),
        Value::Number(number) => decimal(&number.to_string()),
        other => other.to_string(),
    }
}

fn double_text(number: f64) -> String {
    format!("{:.9e}", if number == 0.0 { 0.0 } else { number })
}

fn moment(text: &str) -> String {
    let text = text.trim_end_matches('Z').replace('T', " ");
    match text.split_once('.') {
        Some((whole, part)) if part.trim_end_matches('0').is_empty() => whole.to_string(),
        Some((whole, part)) => format!("{whole}.{}", part.trim_end_matches('0')),
        None => text,
    }
}

/// A decimal without zeros at its end.
fn decimal(text: &str) -> String {
    let text = match text.split_once('.') {
        Some((whole, part)) if part.trim_end_matches('0').is_empty() => whole.to_string(),
        Some((whole, part)) => format!("{whole}.{}", part.trim_end_matches('0')),
        None => text.to_string(),
    };
    if text == "-0" { "0".into() } else { text }
}

fn exact(row: &[Cell]) -> Vec<Option<&str>> {
    row.iter()
        .map(|cell| match cell {
            Cell::Exact(text) => Some(text.as_str()),
            Cell::Double(_) => None,
        })
        .collect()
}

fn key(row: &[Cell]) -> (Vec<Option<String>>, Vec<String>) {
    let exact = exact(row)
        .into_iter()
        .map(|t| t.map(String::from))
        .collect();
    let doubles = row.iter().filter_map(|cell| match cell {
        Cell::Exact(_) => None,
        Cell::Double(number) => Some(format!("{number:.6e}")),
    });
    (exact, doubles.collect())
}

fn near(a: &[Cell], b: &[Cell]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|pair| match pair {
            (Cell::Double(a), Cell::Double(b)) => {
                a == b
                    || a.is_nan() && b.is_nan()
                    || (a - b).abs() <= TOLERANCE * a.abs().max(b.abs()).max(1.0)
            }
            (a, b) => a == b,
        })
}

fn print(row: &[Cell]) -> String {
    let parts: Vec<String> = row
        .iter()
        .map(|cell| match cell {
            Cell::Exact(text) if text.len() > 60 => {
                let head: String = text.chars().take(40).collect();
                format!("{head}… ({} bytes)", text.len())
            }
            Cell::Exact(text) => text.clone(),
            Cell::Double(number) => number.to_string(),
        })
        .collect();
    format!("[{}]", parts.join(", "))
}

#[test]
fn equal_values_are_equal_in_other_clothes() {
    let left = Answer {
        types: ["DECIMAL(18,2)", "DOUBLE", "TIMESTAMP", "TEXT"]
            .map(String::from)
            .to_vec(),
        rows: vec![
            vec![
                "1.50".into(),
                (-0.0).into(),
                "2020-01-01T00:00:00Z".into(),
                "1.0".into(),
            ],
            vec!["NaN".into(), "NaN".into(), Value::Null, "".into()],
        ],
    };
    let mut right = Answer {
        types: vec![],
        rows: vec![
            vec!["NaN".into(), "NaN".into(), Value::Null, "".into()],
            vec![
                "1.5".into(),
                1e-12.into(),
                "2020-01-01 00:00:00".into(),
                "1.0".into(),
            ],
        ],
    };
    assert_eq!(left.difference(&right, false), None);
    right.rows[1][3] = "1".into();
    assert!(left.difference(&right, false).is_some());
    right.rows.pop();
    assert!(right.rows.len() == 1 && left.difference(&right, true).is_some());
}
