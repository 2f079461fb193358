//! Asks DuckDB, by way of `tests/oracle.py`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::answer::Answer;
use super::case::Case;
use super::tree::Dialect;

/// Answers by step and query, or why there is none.
pub(crate) type Opinions = Vec<Vec<Result<Answer, String>>>;

/// # Panics
///
/// When the script fails as a whole.
pub(crate) fn ask(python: &Path, case: &Case) -> Opinions {
    let tables: Vec<Value> = case
        .tables
        .iter()
        .map(|table| {
            let types: Vec<&str> = table.types.iter().map(|ty| ty.sql()).collect();
            json!({"name": table.name, "types": types})
        })
        .collect();
    let steps: Vec<Value> = (0..case.steps.len())
        .map(|step| json!(case.contents(step)))
        .collect();
    let queries: Vec<String> = case
        .queries
        .iter()
        .map(|(query, _)| query.tree.sql(Dialect::Duck))
        .collect();
    let work = json!({"tables": tables, "steps": steps, "queries": queries});
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("oracle.py");
    let mut child = Command::new(python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python runs");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin
        .write_all(work.to_string().as_bytes())
        .expect("python reads");
    drop(stdin);
    let out = child.wait_with_output().expect("python ends");
    assert!(
        out.status.success(),
        "oracle.py failed on seed {}",
        case.seed
    );
    let answer: Value = serde_json::from_slice(&out.stdout).expect("python prints JSON");
    let opinion = |answer: &Value| match answer["error"].as_str() {
        Some(error) => Err(error.to_string()),
        None => Ok(Answer::untyped(&answer["rows"])),
    };
    let steps = answer["steps"].as_array().expect("steps").iter();
    steps
        .map(|step| {
            let answers = step.as_array().expect("answers").iter();
            answers.map(opinion).collect()
        })
        .collect()
}
