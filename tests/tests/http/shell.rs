//! The shell.

use super::{with_basics, write};

#[test]
fn the_shell_runs_statements() {
    let server = with_basics();
    let run = |args: &[&str]| {
        std::process::Command::new(millrace_tests::server::binary())
            .args(["sql", "--http", &server.address])
            .args(args)
            .output()
            .expect("the shell runs")
    };
    let out = run(&["-c", "SELECT id, name FROM t WHERE id < 3 ORDER BY id"]);
    assert!(out.status.success());
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("ann") && text.contains("(2 rows)"), "{text}");
    let out = run(&["-c", "SELECT wrong FROM t"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("42703"));
    let file = write(
        server.scratch(),
        "script.sql",
        "CREATE VIEW z AS SELECT 5 AS five;\nSELECT five FROM z;\n",
    );
    let out = run(&["-f", &file]);
    assert!(
        String::from_utf8_lossy(&out.stdout).contains('5'),
        "{out:?}"
    );
    let mut gone = std::process::Command::new(millrace_tests::server::binary());
    let out = gone
        .args(["sql", "--http", "127.0.0.1:1", "-c", "SELECT 1"])
        .output()
        .expect("runs");
    assert_eq!(out.status.code(), Some(2));
}
