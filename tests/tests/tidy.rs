//! What the sources must not contain, and which crate may know which.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Who may depend on whom (ARCHITECTURE.md); `tests` and `benches` may use any crate.
const EDGES: &[(&str, &[&str])] = &[
    ("dataflow", &[]),
    ("interchange", &["dataflow"]),
    ("lake", &["dataflow"]),
    ("connectors", &["dataflow", "interchange", "lake"]),
    ("sinks", &["dataflow", "interchange", "lake"]),
    ("sql", &["dataflow"]),
    (
        "control",
        &[
            "dataflow",
            "interchange",
            "lake",
            "connectors",
            "sinks",
            "sql",
        ],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_path_buf()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files below a folder whose name ends so.
fn files(folder: &Path, ends: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else {
        return found;
    };
    for entry in entries {
        let path = entry.expect("readable").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(files(&path, ends));
            }
        } else if name.ends_with(ends) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Lines before the unit tests of a file, with their numbers.
fn product_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("#[cfg(test)]\nmod ").map_or(text.len(), |at| at);
    text[..end]
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line))
}

fn product_files() -> Vec<PathBuf> {
    EDGES
        .iter()
        .flat_map(|(name, _)| files(&root().join(name).join("src"), ".rs"))
        .filter(|path| {
            let text = path.to_string_lossy();
            !text.ends_with("tests.rs")
                && !text.contains("/tests/")
                && !text.ends_with("/testing.rs")
        })
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let mut findings = Vec::new();
    for (name, allowed) in EDGES {
        let manifest = read(&root().join(name).join("Cargo.toml"));
        let start = manifest.find("[dependencies]").expect("dependencies");
        let section = &manifest[start + 1..];
        let section = &section[..section.find("\n[").unwrap_or(section.len())];
        let used: BTreeSet<&str> = section
            .lines()
            .filter_map(|line| line.strip_prefix("millrace-"))
            .filter_map(|line| line.split(['.', ' ', '=']).next())
            .collect();
        for other in used {
            if !allowed.contains(&other) {
                findings.push(format!("{name} depends on {other}"));
            }
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn the_engine_knows_no_outside_system() {
    let manifest = read(&root().join("dataflow/Cargo.toml"));
    for name in ["rdkafka", "iceberg", "sqlx", "axum", "sqlparser", "parquet"] {
        assert!(
            !manifest.contains(&format!("\n{name}")),
            "dataflow depends on {name}"
        );
    }
    let manifest = read(&root().join("sql/Cargo.toml"));
    for name in [
        "rdkafka",
        "iceberg",
        "sqlx",
        "axum",
        "tokio.",
        "reqwest",
        "object_store",
    ] {
        let section = manifest
            .split("[dev-dependencies]")
            .next()
            .unwrap_or_default();
        assert!(
            !section.contains(&format!("\n{name}")),
            "sql does I/O with {name}"
        );
    }
}

#[test]
fn no_leftovers() {
    let banned = [
        (".unwrap()", "say why it cannot fail: expect(\"…\")"),
        ("dbg!(", "left over"),
        ("todo!(", "left over"),
        ("unimplemented!(", "left over"),
        ("FIXME", "left over"),
        ("XXX", "left over"),
    ];
    let mut findings = Vec::new();
    for path in product_files() {
        for (number, line) in product_lines(&read(&path)) {
            let code = line.trim_start();
            if code.starts_with("//") && !code.contains("FIXME") && !code.contains("XXX") {
                continue;
            }
            for (text, why) in banned {
                if line.contains(text) {
                    findings.push(format!("{}:{number}: {text}: {why}", path.display()));
                }
            }
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn time_and_chance_come_from_env() {
    let mut findings = Vec::new();
    for path in product_files() {
        if path.ends_with("dataflow/src/env.rs") {
            continue;
        }
        for (number, line) in product_lines(&read(&path)) {
            let code = line.trim_start();
            if code.starts_with("//") {
                continue;
            }
            for text in [
                "SystemTime::now",
                "Utc::now",
                "Local::now",
                "Uuid::new_v",
                "rand::",
            ] {
                if code.contains(text) {
                    findings.push(format!("{}:{number}: {text}", path.display()));
                }
            }
            let config = path.ends_with("control/src/config.rs");
            if code.contains("env::var(") && !config {
                findings.push(format!(
                    "{}:{number}: reads the environment",
                    path.display()
                ));
            }
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn module_files_stand_beside_their_folder_and_say_what_they_are_for() {
    let mut findings = Vec::new();
    for (name, _) in EDGES
        .iter()
        .chain(&[("tests", &[][..]), ("benches", &[][..])])
    {
        for path in files(&root().join(name), ".rs") {
            if path.file_name().is_some_and(|n| n == "mod.rs") {
                findings.push(format!(
                    "{}: name.rs beside name/, not mod.rs",
                    path.display()
                ));
            }
            let text = read(&path);
            let is_test = path.to_string_lossy().ends_with("tests.rs");
            if !is_test && !text.starts_with("//!") {
                findings.push(format!("{}: begins without //!", path.display()));
            }
            if text.lines().count() > 1_000 {
                findings.push(format!(
                    "{}: {} lines",
                    path.display(),
                    text.lines().count()
                ));
            }
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn no_path_of_one_machine() {
    let mut findings = Vec::new();
    let needles = [
        ["/ro", "ot/"].concat(),
        ["/wo", "rk/"].concat(),
        ["/ho", "me/"].concat(),
    ];
    for ends in [
        ".rs", ".toml", ".md", ".sh", ".py", ".slt", ".html", "Makefile", ".sql",
    ] {
        for path in files(&root(), ends) {
            for (i, line) in read(&path).lines().enumerate() {
                if needles.iter().any(|needle| line.contains(needle.as_str())) {
                    findings.push(format!("{}:{}: {line}", path.display(), i + 1));
                }
            }
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let mut findings = Vec::new();
    for path in files(&root(), ".md") {
        let text = read(&path);
        for piece in text.split("](").skip(1) {
            let target = piece.split([')', ' ', '#']).next().unwrap_or_default();
            let outside = target.contains("://") || target.starts_with("mailto:");
            if target.is_empty() || outside {
                continue;
            }
            let folder = path.parent().expect("a folder");
            if !folder.join(target).exists() {
                findings.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn every_dependency_is_declared_once_with_a_reason() {
    let manifest = read(&root().join("Cargo.toml"));
    let start = manifest
        .find("[workspace.dependencies]")
        .expect("dependencies");
    let section = &manifest[start + 1..];
    let section = &section[..section.find("\n[").unwrap_or(section.len())];
    let mut explained = false;
    for line in section.lines().skip(1) {
        if line.starts_with('#') {
            explained = true;
        } else if line.is_empty() {
            explained = false;
        } else if !line.starts_with(['m', ' ', '"', ']']) {
            assert!(explained, "no reason above: {line}");
        }
    }
    for (name, _) in EDGES {
        let text = read(&root().join(name).join("Cargo.toml"));
        for line in text
            .lines()
            .skip_while(|l| *l != "[dependencies]")
            .skip(1)
            .take_while(|l| !l.starts_with("[["))
        {
            let declared = line.split_once('=').map(|(key, _)| key.trim());
            let Some(key) = declared else { continue };
            let shared = key.ends_with(".workspace") || line.contains("workspace = true");
            assert!(shared, "{name}/Cargo.toml: {line}");
        }
    }
}
