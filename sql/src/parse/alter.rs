//! `ALTER DATA PLANE [name] SET { WORKERS | PROCESSES } [=] n | SET (…)`, `ALTER SYSTEM SET (…)`,
//! `ALTER SINK | MATERIALIZED VIEW name PAUSE | RESUME | RETRY | SET (…)`.

use datafusion::sql::sqlparser::tokenizer::Token;
use millrace_dataflow::error::{Error, ErrorKind, Result};

use super::{Alter, AlterAction, Cursor, Lines, ObjectKind, Options, Statement, tokenize};
use crate::error::{nearest, syntax};

const CAN: &str = "what can be altered: SINK or MATERIALIZED VIEW name PAUSE | RESUME, \
                   SINK name SET (commit_interval = '…'), DATA PLANE SET WORKERS n | PROCESSES n, \
                   SYSTEM SET (checkpoint_interval = '…', commit_interval = '…')";

pub(crate) fn alter(cursor: &mut Cursor<'_>) -> Result<Statement> {
    cursor.expect_words(&["alter"])?;
    if cursor.take_words(&["data", "plane"]) {
        return data_plane(cursor);
    }
    if cursor.take_words(&["system"]) {
        cursor.expect_words(&["set"])?;
        return Ok(Statement::SetSystem(settings(cursor)?));
    }
    for (words, kind) in [
        (&["sink"][..], ObjectKind::Sink),
        (&["materialized", "view"], ObjectKind::MaterializedView),
    ] {
        if cursor.take_words(words) {
            return object(cursor, kind).map(Statement::Alter);
        }
    }
    let what = cursor.peek_word().unwrap_or_default();
    let error = Error::unsupported(format!(
        "ALTER {} is not supported yet",
        what.to_uppercase()
    ))
    .position(cursor.position());
    Err(match what.as_str() {
        "view" => error.hint("say ALTER MATERIALIZED VIEW; a view that is only text does not run"),
        _ => error.hint(CAN),
    })
}

fn data_plane(cursor: &mut Cursor<'_>) -> Result<Statement> {
    // There is one data plane; its name may be left out.
    if cursor.peek_word().is_some_and(|word| word != "set") {
        let position = cursor.position();
        let name = cursor.name()?;
        if name != "default" {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no data plane \"{name}\""),
            )
            .code("42704")
            .position(position)
            .hint("the data plane of this server is called default"));
        }
    }
    cursor.expect_words(&["set"])?;
    if cursor.peek_is(&Token::LParen) {
        return Ok(Statement::SetSystem(settings(cursor)?));
    }
    let processes = cursor.take_words(&["processes"]);
    let (what, most) = match processes {
        true => ("processes", 64),
        false => {
            cursor.expect_words(&["workers"])?;
            ("workers", 512)
        }
    };
    cursor.take(&Token::Eq);
    let position = cursor.position();
    let hint = format!("such as ALTER DATA PLANE SET {} 2", what.to_uppercase());
    let number = cursor.number().map_err(|e| e.hint(hint.clone()))?;
    match usize::try_from(number) {
        Ok(count) if (1..=most).contains(&count) => Ok(match processes {
            true => Statement::SetProcesses(count),
            false => Statement::SetWorkers(count),
        }),
        _ => Err(
            Error::invalid(format!("{what} must be between 1 and {most}"))
                .code("22023")
                .position(position)
                .hint(hint),
        ),
    }
}

fn object(cursor: &mut Cursor<'_>, kind: ObjectKind) -> Result<Alter> {
    let name = cursor.relation()?;
    let position = cursor.position();
    let word = cursor.peek_word().unwrap_or_default();
    let action = match word.as_str() {
        "pause" => AlterAction::Pause,
        "resume" | "retry" => AlterAction::Resume,
        "set" => {
            cursor.advance();
            return Ok(Alter {
                kind,
                name,
                action: AlterAction::Set(settings(cursor)?),
            });
        }
        _ => {
            let error = cursor.unexpected("PAUSE, RESUME or SET").position(position);
            return Err(
                match nearest(&word, ["pause", "resume", "retry", "set"].into_iter()) {
                    Some(near) => error.hint(format!("did you mean {}?", near.to_uppercase())),
                    None => error,
                },
            );
        }
    };
    cursor.advance();
    Ok(Alter { kind, name, action })
}

/// `(key = 'value', …)`, at least one.
fn settings(cursor: &mut Cursor<'_>) -> Result<Options> {
    let position = cursor.position();
    let options = cursor.options()?;
    if options.is_empty() {
        return Err(syntax("SET needs at least one option")
            .position(position)
            .hint("such as SET (commit_interval = '5s')"));
    }
    Ok(options)
}

/// A stored CREATE SINK or CREATE MATERIALIZED VIEW with other options.
pub fn with_options(text: &str, options: &Options) -> Result<String> {
    let (tokens, broken) = tokenize(text);
    if let Some(error) = broken {
        return Err(syntax(error.message));
    }
    let word = |at: usize, wanted: &str| {
        matches!(tokens.get(at).map(|t| &t.token), Some(Token::Word(w))
            if w.quote_style.is_none() && w.value.eq_ignore_ascii_case(wanted))
    };
    // Options stand before the query of a view, and at the end of a sink.
    let head = (0..tokens.len())
        .find(|at| word(*at, "as"))
        .unwrap_or(tokens.len());
    let lines = Lines::of(text);
    let start = |at: usize| {
        let place = tokens[at].span.start;
        lines.offset((place.line, place.column))
    };
    let end = |at: usize| {
        let place = tokens[at].span.end;
        lines.offset((place.line, place.column))
    };
    let length = text.chars().count();
    let old = (0..head).find(|at| {
        word(*at, "with") && tokens.get(at + 1).map(|t| &t.token) == Some(&Token::LParen)
    });
    let close = old.and_then(|from| (from..head).rfind(|at| tokens[*at].token == Token::RParen));
    let new = format!("WITH ({})", write(options));
    let (before, after, new) = match (old, close) {
        (Some(from), Some(to)) => (start(from), end(to), new),
        _ if head < tokens.len() => (start(head), start(head), format!("{new} ")),
        _ => (length, length, format!(" {new}")),
    };
    Ok(lines.slice(0, before) + &new + &lines.slice(after, length))
}

/// Options as people write them.
fn write(options: &Options) -> String {
    let plain = |key: &str| {
        key.starts_with(|c: char| c.is_ascii_lowercase())
            && key
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let one = |(key, value): (&String, &String)| {
        let value = value.replace('\'', "''");
        match plain(key) {
            true => format!("{key} = '{value}'"),
            false => format!("'{}' = '{value}'", key.replace('\'', "''")),
        }
    };
    options.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::{parse, parse_one};

    fn error(text: &str) -> Error {
        parse(text).error.expect("refused")
    }

    #[test]
    fn views_and_sinks_are_paused_resumed_and_set() {
        let altered = |text: &str| match parse_one(text).expect("parses").statement {
            Statement::Alter(alter) => (alter.kind, alter.name, alter.action),
            other => panic!("{other:?}"),
        };
        for (text, kind, name, action) in [
            (
                "ALTER MATERIALIZED VIEW v PAUSE",
                ObjectKind::MaterializedView,
                "v",
                AlterAction::Pause,
            ),
            (
                "alter materialized view V retry",
                ObjectKind::MaterializedView,
                "v",
                AlterAction::Resume,
            ),
            (
                "ALTER SINK lake.a.b RESUME",
                ObjectKind::Sink,
                "lake.a.b",
                AlterAction::Resume,
            ),
        ] {
            assert_eq!(altered(text), (kind, name.to_string(), action), "{text}");
        }
        let options = Options::from([("commit_interval".to_string(), "2s".to_string())]);
        assert_eq!(
            altered("ALTER SINK \"S\" SET (commit_interval = '2s')").2,
            AlterAction::Set(options)
        );
        let system = parse_one("ALTER SYSTEM SET (checkpoint_interval = '5s')").expect("parses");
        assert!(matches!(system.statement, Statement::SetSystem(o) if o.len() == 1));
        let plane = parse_one("ALTER DATA PLANE default SET (commit_interval = '1s')");
        assert!(matches!(
            plane.expect("parses").statement,
            Statement::SetSystem(_)
        ));
        let workers = parse_one("ALTER DATA PLANE SET WORKERS 3").expect("parses");
        assert!(matches!(workers.statement, Statement::SetWorkers(3)));
    }

    #[test]
    fn what_cannot_be_altered_is_refused_with_what_can() {
        assert_eq!(
            error("ALTER SINK s PAUS").hint.as_deref(),
            Some("did you mean PAUSE?")
        );
        assert_eq!(error("ALTER SINK s SET ()").code, "42601");
        for text in [
            "ALTER SYSTEM SET ()",
            "ALTER SYSTEM SET (a = 1, a = 2)",
            "ALTER DATA PLANE SET WORKERS 0",
            "ALTER DATA PLANE SET WORKERS -3",
            "ALTER DATA PLANE SET WORKERS 1.5",
            "ALTER DATA PLANE SET PROCESSES 65",
        ] {
            assert!(error(text).hint.is_some(), "{text}");
        }
        assert_eq!(error("ALTER SINK s PAUSE now").code, "42601");
        let view = error("ALTER VIEW v PAUSE");
        assert!(view.hint.is_some_and(|h| h.contains("MATERIALIZED")));
        let source = error("ALTER SOURCE s PAUSE");
        assert!(source.hint.is_some_and(|h| h.contains("SINK")));
    }

    #[test]
    fn stored_statements_take_other_options() {
        let options = Options::from([("commit_interval".to_string(), "2s".to_string())]);
        for (text, wanted) in [
            (
                "CREATE SINK s FROM v INTO lake.a.b",
                "CREATE SINK s FROM v INTO lake.a.b WITH (commit_interval = '2s')",
            ),
            (
                "CREATE SINK ä FROM v INTO lake.a.b\n WITH (changelog = 'a)b')",
                "CREATE SINK ä FROM v INTO lake.a.b\n WITH (commit_interval = '2s')",
            ),
            (
                "CREATE MATERIALIZED VIEW lake.a.b AS WITH (x) AS (SELECT 1) SELECT 2",
                "CREATE MATERIALIZED VIEW lake.a.b WITH (commit_interval = '2s') AS WITH (x) AS (SELECT 1) SELECT 2",
            ),
            (
                "CREATE MATERIALIZED VIEW lake.a.b WITH ('x' = '1', y = 2) AS SELECT (2) AS z EMIT CHANGES",
                "CREATE MATERIALIZED VIEW lake.a.b WITH (commit_interval = '2s') AS SELECT (2) AS z EMIT CHANGES",
            ),
        ] {
            assert_eq!(with_options(text, &options).expect("written"), wanted);
        }
    }
}
