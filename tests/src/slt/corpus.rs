//! The files of `tests/slt` and `tests/regressions`: tables with rows, queries with answers.
//!
//! ```text
//! # A line that begins with '#' is a remark.
//!
//! table NAME (COLUMNS) [changelog] [watermark COLUMN INTERVAL]
//! [1,"a"]                  one row per line, a JSON list in the order of the columns;
//! - [1,"a"]                changelog only: takes a row back
//! late [7,"b"]             fed in streams only, once everything before it has been applied
//!
//! view NAME [close] [errors N SQLSTATE] [late N]
//! SELECT …
//! ----
//! [1,"a"]                  the answer, in any order
//!
//! refused SQLSTATE
//! SELECT …                 CREATE MATERIALIZED VIEW of it must fail so
//! ```
//!
//! * Computed columns (`x T AS …`) have no place in the rows.
//! * `close` is EMIT ON WINDOW CLOSE. Streams have no end, so such a table ends with a row whose
//!   time closes all windows asked for, and the query leaves that row out.
//! * `errors`: so many rows fail in a stream (`NAME$errors`); in a batch the query fails.
//! * `late`: so many rows must be found in `NAME$late`. Tables with late rows feed such views only.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// One file.
#[derive(Debug, Clone)]
pub struct File {
    pub path: PathBuf,
    pub tables: Vec<Table>,
    pub views: Vec<View>,
    pub refused: Vec<Refused>,
}

#[derive(Debug, Clone)]
pub struct Table {
    pub name: String,
    /// Text between the parentheses.
    pub columns: String,
    /// Names of the columns that rows have.
    pub names: Vec<String>,
    pub changelog: bool,
    /// Column and delay.
    pub watermark: Option<(String, String)>,
    pub rows: Vec<Row>,
}

#[derive(Debug, Clone)]
pub struct Row {
    pub values: Vec<Value>,
    pub retracts: bool,
    pub late: bool,
}

#[derive(Debug, Clone)]
pub struct View {
    pub name: String,
    pub query: String,
    pub close: bool,
    pub errors: Option<(u64, String)>,
    pub late: Option<u64>,
    /// Canonical and sorted.
    pub expected: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Refused {
    pub code: String,
    pub query: String,
}

/// All files, by name; `MILLRACE_SLT` limits them to names that contain it.
///
/// # Panics
///
/// When a file is not in the form above, or two files use one name.
pub fn load() -> Vec<File> {
    let folder = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        std::fs::read_dir(folder).expect("the folder is there")
    };
    let wanted = std::env::var("MILLRACE_SLT").unwrap_or_default();
    let mut paths: Vec<PathBuf> = folder("slt")
        .chain(folder("regressions"))
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|e| e == "slt"))
        .filter(|path| path.to_string_lossy().contains(&wanted))
        .collect();
    paths.sort();
    let files: Vec<File> = paths.iter().map(|path| parse(path)).collect();
    let mut names: Vec<&str> = Vec::new();
    for file in &files {
        names.extend(file.tables.iter().map(|table| table.name.as_str()));
        names.extend(file.views.iter().map(|view| view.name.as_str()));
    }
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        panic!("the name {} is used twice", pair[0]);
    }
    files
}

fn parse(path: &Path) -> File {
    let text = std::fs::read_to_string(path).expect("a readable file");
    let mut file = File {
        path: path.to_path_buf(),
        tables: vec![],
        views: vec![],
        refused: vec![],
    };
    let blocks = text.split("\n\n").map(|block| {
        block
            .lines()
            .filter(|line| !line.starts_with('#'))
            .collect::<Vec<_>>()
    });
    for lines in blocks {
        let mut lines = lines.into_iter().skip_while(|line| line.trim().is_empty());
        let Some(head) = lines.next() else { continue };
        let rest: Vec<&str> = lines.filter(|line| !line.trim().is_empty()).collect();
        let at = || format!("{}: {head}", path.display());
        match head.split_once(' ') {
            Some(("table", head)) => file.tables.push(table(head, &rest, &at())),
            Some(("view", head)) => file.views.push(view(head, &rest, &at())),
            Some(("refused", code)) => {
                file.refused.push(Refused {
                    code: code.trim().into(),
                    query: rest.join("\n"),
                });
            }
            _ => panic!("{}: neither table nor view nor refused", at()),
        }
    }
    file
}

fn table(head: &str, rows: &[&str], at: &str) -> Table {
    let (name, rest) = head
        .split_once(" (")
        .unwrap_or_else(|| panic!("{at}: no columns"));
    let (columns, tail) = closing(rest).unwrap_or_else(|| panic!("{at}: no closing parenthesis"));
    let names = split_top(columns)
        .into_iter()
        .filter(|column| !column.to_uppercase().contains(" AS "))
        .map(|column| {
            column
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .to_string()
        })
        .collect();
    let mut table = Table {
        name: name.trim().to_string(),
        columns: columns.to_string(),
        names,
        changelog: false,
        watermark: None,
        rows: Vec::new(),
    };
    let mut words = tail.trim();
    if let Some(rest) = words.strip_prefix("changelog") {
        table.changelog = true;
        words = rest.trim();
    }
    if let Some(rest) = words.strip_prefix("watermark ") {
        let (column, delay) = rest
            .split_once(' ')
            .unwrap_or_else(|| panic!("{at}: no delay"));
        table.watermark = Some((column.to_string(), delay.to_string()));
        words = "";
    }
    assert!(words.is_empty(), "{at}: what is {words:?}?");
    for line in rows {
        let (late, line) = strip(line, "late ");
        let (retracts, line) = strip(line, "- ");
        let values: Vec<Value> =
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{at}: {line}: {e}"));
        assert_eq!(values.len(), table.names.len(), "{at}: {line}");
        assert!(
            table.changelog || !retracts,
            "{at}: {line}: not a changelog"
        );
        table.rows.push(Row {
            values,
            retracts,
            late,
        });
    }
    table
}

fn view(head: &str, lines: &[&str], at: &str) -> View {
    let mut words = head.split_whitespace();
    let name = words.next().unwrap_or_default().to_string();
    let rule = lines.iter().position(|line| *line == "----");
    let rule = rule.unwrap_or_else(|| panic!("{at}: no ----"));
    let mut view = View {
        name,
        query: lines[..rule].join("\n"),
        close: false,
        errors: None,
        late: None,
        expected: lines[rule + 1..]
            .iter()
            .map(|line| canonical_text(line, at))
            .collect(),
    };
    view.expected.sort();
    while let Some(word) = words.next() {
        let mut number = || {
            words
                .next()
                .and_then(|n| n.parse().ok())
                .unwrap_or_else(|| panic!("{at}"))
        };
        match word {
            "close" => view.close = true,
            "late" => view.late = Some(number()),
            "errors" => {
                let count = number();
                view.errors = Some((count, words.next().unwrap_or_default().to_string()));
            }
            other => panic!("{at}: what is {other:?}?"),
        }
    }
    view
}

fn strip<'a>(line: &'a str, prefix: &str) -> (bool, &'a str) {
    line.strip_prefix(prefix)
        .map_or((false, line), |rest| (true, rest))
}

/// Text up to the parenthesis that closes one opened before it, and what follows.
fn closing(text: &str) -> Option<(&str, &str)> {
    let mut depth = 1;
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&text[..i], &text[i + 1..]));
        }
    }
    None
}

/// Splits at commas outside parentheses.
fn split_top(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

fn canonical_text(line: &str, at: &str) -> String {
    canonical(&serde_json::from_str(line).unwrap_or_else(|e| panic!("{at}: {line}: {e}")))
}

/// A row as text in which equal values look equal: `1.0` is `1`.
pub fn canonical(row: &Value) -> String {
    match row {
        Value::Array(values) => {
            format!(
                "[{}]",
                values.iter().map(canonical).collect::<Vec<_>>().join(",")
            )
        }
        Value::Number(n) if n.is_f64() => {
            let value = n.as_f64().unwrap_or(f64::NAN);
            if value.fract() == 0.0 && value.abs() < 1e15 {
                format!("{value:.0}")
            } else {
                n.to_string()
            }
        }
        other => other.to_string(),
    }
}

impl Table {
    /// A row as a JSON object.
    pub fn object(&self, values: &[Value]) -> serde_json::Map<String, Value> {
        self.names
            .iter()
            .cloned()
            .zip(values.iter().cloned())
            .collect()
    }

    /// What is left when all retractions have been applied; late rows are not part of it.
    pub fn net(&self) -> Vec<&[Value]> {
        let mut left: Vec<&[Value]> = Vec::new();
        for row in self.rows.iter().filter(|row| !row.late) {
            if row.retracts {
                let at = left.iter().position(|other| *other == row.values);
                left.remove(
                    at.unwrap_or_else(|| panic!("{}: takes back {:?}", self.name, row.values)),
                );
            } else {
                left.push(&row.values);
            }
        }
        left
    }

    /// `CREATE SOURCE` with these options.
    pub fn create(&self, options: &str) -> String {
        let mut columns = self.columns.clone();
        if let Some((column, delay)) = &self.watermark {
            columns.push_str(&format!(", WATERMARK FOR {column} AS {column} - {delay}"));
        }
        format!("CREATE SOURCE {} ({columns}) WITH ({options});", self.name)
    }
}
