//! Scripts: cutting, positions, limits.

use super::*;
use crate::explain::show_create;

fn texts(script: &str) -> (Vec<String>, Option<(String, Option<usize>)>) {
    let script = parse(script);
    (
        script.statements.into_iter().map(|s| s.text).collect(),
        script.error.map(|e| (e.message, e.position)),
    )
}

#[test]
fn a_script_is_cut_at_semicolons_outside_of_quotes() {
    let (statements, error) =
        texts("SELECT ';' AS a; -- no; statement\n\n SELECT 2 /* ; */ ;; SELECT $$;$$");
    assert_eq!(statements, ["SELECT ';' AS a", "SELECT 2", "SELECT $$;$$"]);
    assert_eq!(error, None);
}

#[test]
fn statements_before_a_faulty_one_are_kept() {
    let (statements, error) = texts("SELECT 1;\nSELECT ä FROM t WHERE; SELECT 3");
    assert_eq!(statements, ["SELECT 1"]);
    let (message, position) = error.expect("an error");
    assert!(message.starts_with("syntax error at or near"), "{message}");
    assert_eq!(position, Some(32));
}

#[test]
fn an_open_quote_is_placed() {
    let (statements, error) = texts("SELECT 1; SELECT 'abc");
    assert_eq!(statements, ["SELECT 1"]);
    let (message, position) = error.expect("an error");
    assert_eq!(
        (message.as_str(), position),
        ("unterminated string literal", Some(18))
    );
}

#[test]
fn positions_count_in_the_whole_script() {
    let error = parse("SELECT 1;\n  SELEC 2").error.expect("an error");
    assert_eq!(error.position, Some(13));
    assert_eq!(error.hint.as_deref(), Some("did you mean SELECT?"));
}

#[test]
fn long_chains_and_deep_nests_do_not_overflow() {
    let ors = vec!["a = 1"; 100_000].join(" OR ");
    let error = parse(&format!("SELECT a FROM t WHERE {ors}"))
        .error
        .expect("refused");
    assert_eq!(error.code, "54001");
    let some = vec!["a = 1"; 1_500].join(" OR ");
    assert!(
        parse(&format!("SELECT a FROM t WHERE {some}"))
            .error
            .is_none()
    );
    let sum = vec!["1"; 100_000].join(" + ");
    let error = parse(&format!("SELECT {sum}")).error.expect("refused");
    assert_eq!(error.code, "54001");
    for (open, close) in [
        ("(", ")"),
        ("NOT ", ""),
        ("- ", ""),
        ("CASE WHEN true THEN ", " END"),
        ("(SELECT ", ")"),
    ] {
        let nest = format!("SELECT {}1{}", open.repeat(50_000), close.repeat(50_000));
        let error = parse(&nest).error.expect("refused");
        assert_eq!(error.code, "54001", "{open}: {}", error.message);
    }
    let unions = vec!["SELECT 1"; 20_000].join(" UNION ALL ");
    let error = parse(&unions).error.expect("refused");
    assert_eq!(error.code, "54001");
}

#[test]
fn secrets_are_not_shown() {
    let text = "CREATE SOURCE s (token TEXT) WITH (connector = 'kafka', sasl.password = 'hunter2', 'api_token' = 'x', topic = 'password')";
    assert_eq!(
        show_create(text),
        "CREATE SOURCE s (token TEXT) WITH (connector = 'kafka', sasl.password = '[secret]', 'api_token' = '[secret]', topic = 'password')"
    );
}

#[test]
fn options_keep_their_text() {
    let parsed = parse_one(
        "CREATE SOURCE s (a INT) WITH (Connector = 'X', n = -1.50, b = TRUE, d = $$it's$$)",
    )
    .expect("parses");
    let Statement::CreateSource(source) = parsed.statement else {
        panic!("a source");
    };
    let options: Vec<(&str, &str)> = source
        .options
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(
        options,
        [
            ("b", "true"),
            ("connector", "X"),
            ("d", "it's"),
            ("n", "-1.50")
        ]
    );
}

#[test]
fn calls_inside_calls_take_no_more_time_than_others() {
    let depth = 100;
    let sql = format!("SELECT {}1{}", "abs(".repeat(depth), ")".repeat(depth));
    assert!(parse(&sql).error.is_none());
}
