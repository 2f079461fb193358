//! `millrace sql`: a small SQL shell over the HTTP API; also runs a file or one statement.
//!
//! Exit code 0 when everything went well, 1 after a statement that failed, 2 when the server did
//! not answer.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::process::ExitCode;

use millrace_dataflow::error::{Error, Result};
use serde_json::Value;

use super::client;
use crate::config::{SqlArgs, environment};
use crate::session::Session;

const EXIT_STATEMENT: u8 = 1;
const EXIT_SERVER: u8 = 2;

/// Runs the shell.
pub fn run(args: &SqlArgs) -> ExitCode {
    let address = args
        .http
        .clone()
        .or_else(|| environment("MILLRACE_HTTP"))
        .unwrap_or_else(|| "127.0.0.1:8080".to_string());
    let script = match script(args) {
        Ok(script) => script,
        Err(error) => {
            super::print_error(&error);
            return ExitCode::from(EXIT_SERVER);
        }
    };
    let outcome = match script {
        Some(script) => execute(&address, &script),
        None => interactive(&address),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_STATEMENT),
        Err(error) => {
            super::print_error(&error);
            ExitCode::from(EXIT_SERVER)
        }
    }
}

/// The text to run at once, if there is one: `-c`, `-f`, or standard input that is not a terminal.
fn script(args: &SqlArgs) -> Result<Option<String>> {
    if let Some(text) = &args.command {
        return Ok(Some(text.clone()));
    }
    let from_stdin = match &args.file {
        Some(path) if path.as_os_str() != "-" => {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::invalid(format!("cannot read {}: {e}", path.display())))?;
            return Ok(Some(text));
        }
        Some(_) => true,
        None => !std::io::stdin().is_terminal(),
    };
    if !from_stdin {
        return Ok(None);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(Some(text))
}

/// Reads statements up to a line that ends with `;` and shows what they give.
fn interactive(address: &str) -> Result<bool> {
    println!(
        "millrace {} on {address}; \\q leaves",
        env!("CARGO_PKG_VERSION")
    );
    let mut pending = String::new();
    loop {
        print!(
            "{}",
            if pending.is_empty() {
                "millrace> "
            } else {
                "      ... "
            }
        );
        std::io::stdout().flush()?;
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            println!();
            return Ok(true);
        }
        let word = line.trim();
        if pending.is_empty() && matches!(word, "\\q" | "quit" | "exit" | "quit;" | "exit;") {
            return Ok(true);
        }
        if pending.is_empty() && word.is_empty() {
            continue;
        }
        pending.push_str(&line);
        if word.ends_with(';') {
            if let Err(error) = execute(address, &pending) {
                super::print_error(&error);
            }
            pending.clear();
        }
    }
}

/// Sends a script and prints its results; false when a statement failed.
fn execute(address: &str, script: &str) -> Result<bool> {
    let body = serde_json::json!({ "sql": script }).to_string();
    if Session::subscribe_of(script).is_some() {
        // It has no end, so its lines are shown as they come.
        client::post_for_lines(address, "/api/v1/sql", &body, |line| {
            writeln!(std::io::stdout(), "{}", plain(line)).is_ok()
        })?;
        return Ok(true);
    }
    let response = client::post_json(address, "/api/v1/sql", &body)?;
    let answer: Value = serde_json::from_slice(&response.body).map_err(|_| {
        Error::unavailable(format!(
            "{address} answered {} without JSON",
            response.status
        ))
    })?;
    let mut out = std::io::stdout().lock();
    for result in answer["results"].as_array().into_iter().flatten() {
        // A reader that went away (`| head`) ends the output, not the statements.
        let _ = out.write_all(render(result).as_bytes());
        for notice in result["notices"].as_array().into_iter().flatten() {
            eprintln!(
                "NOTICE: {}",
                plain(notice["message"].as_str().unwrap_or_default())
            );
        }
    }
    let _ = out.flush();
    let error = &answer["error"];
    if error.is_null() {
        return Ok(true);
    }
    let text = |key: &str| error[key].as_str().map(plain);
    eprintln!(
        "ERROR {}: {}",
        text("code").unwrap_or_default(),
        text("message").unwrap_or_default()
    );
    if let Some(position) = error["position"].as_u64() {
        show_position(script, position as usize);
    }
    for key in ["detail", "hint"] {
        if let Some(value) = text(key) {
            eprintln!("{}: {value}", key.to_uppercase());
        }
    }
    Ok(false)
}

/// The line that holds the character at `position` (from 1), with a mark under it.
fn show_position(script: &str, position: usize) {
    let before: String = script.chars().take(position.saturating_sub(1)).collect();
    let column = before.chars().rev().take_while(|c| *c != '\n').count();
    let number = before.matches('\n').count();
    if let Some(line) = script.lines().nth(number) {
        let label = format!("LINE {}: ", number + 1);
        eprintln!("{label}{}", plain(line));
        eprintln!("{}^", " ".repeat(label.len() + column));
    }
}

/// A result as a table in the manner of psql.
fn render(result: &Value) -> String {
    let columns: Vec<&Value> = result["columns"].as_array().into_iter().flatten().collect();
    if columns.is_empty() {
        return "OK\n".to_string();
    }
    // A cell of several lines (SHOW CREATE) takes several lines of the table.
    let rows: Vec<Vec<Vec<String>>> = result["rows"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| row.as_array().into_iter().flatten().map(cell).collect())
        .collect();
    let names: Vec<String> = columns
        .iter()
        .map(|c| plain(c["name"].as_str().unwrap_or_default()))
        .collect();
    let widths: Vec<usize> = (0..names.len())
        .map(|i| {
            let cells = rows.iter().filter_map(|row| row.get(i)).flatten();
            cells
                .chain([&names[i]])
                .map(|text| text.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let right: Vec<bool> = columns.iter().map(|c| is_number(&c["type"])).collect();
    let mut out = String::new();
    let line = |out: &mut String, cells: &[String], right: &[bool]| {
        let shown: Vec<String> = cells
            .iter()
            .zip(&widths)
            .zip(right)
            .map(|((text, width), right)| {
                let pad = " ".repeat(width.saturating_sub(text.chars().count()));
                if *right {
                    format!(" {pad}{text} ")
                } else {
                    format!(" {text}{pad} ")
                }
            })
            .collect();
        out.push_str(shown.join("|").trim_end());
        out.push('\n');
    };
    line(&mut out, &names, &vec![false; names.len()]);
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
    out.push_str(&rule.join("+"));
    out.push('\n');
    for row in &rows {
        let height = row.iter().map(Vec::len).max().unwrap_or(1);
        for at in 0..height {
            let cells: Vec<String> = row
                .iter()
                .map(|lines| lines.get(at).cloned().unwrap_or_default())
                .collect();
            line(&mut out, &cells, &right);
        }
    }
    let count = rows.len();
    out.push_str(&format!(
        "({count} {})\n",
        if count == 1 { "row" } else { "rows" }
    ));
    out
}

fn is_number(type_name: &Value) -> bool {
    let name = type_name.as_str().unwrap_or_default();
    let word = name.split('(').next().unwrap_or_default();
    matches!(
        word,
        "SMALLINT" | "INT" | "BIGINT" | "DECIMAL" | "REAL" | "DOUBLE"
    ) && !name.ends_with("[]")
}

/// The lines of a cell, at least one.
fn cell(value: &Value) -> Vec<String> {
    match value {
        Value::Null => vec!["NULL".to_string()],
        Value::String(text) => text.split('\n').map(plain).collect(),
        other => vec![plain(&other.to_string())],
    }
}

/// Text that cannot steer the terminal.
fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped: Vec<char> = if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            };
            escaped
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_numbers_right_and_text_left() {
        let result = serde_json::json!({
            "columns": [{"name": "n", "type": "BIGINT"}, {"name": "name", "type": "TEXT"}],
            "rows": [[1, "a"], [100, null]],
        });
        assert_eq!(
            render(&result),
            " n   | name\n-----+------\n   1 | a\n 100 | NULL\n(2 rows)\n"
        );
    }

    #[test]
    fn a_cell_of_several_lines_takes_several_lines() {
        let result = serde_json::json!({
            "columns": [{"name": "a", "type": "TEXT"}, {"name": "n", "type": "INT"}],
            "rows": [["x\nyy", 1]],
        });
        assert_eq!(
            render(&result),
            " a  | n\n----+---\n x  | 1\n yy |\n(1 row)\n"
        );
    }

    #[test]
    fn values_cannot_steer_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
    }

    #[test]
    fn a_statement_without_columns_is_ok() {
        assert_eq!(
            render(&serde_json::json!({"columns": [], "rows": []})),
            "OK\n"
        );
    }
}
