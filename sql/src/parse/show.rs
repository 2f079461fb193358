//! `DROP`, `SHOW`, `EXPLAIN`.

use datafusion::sql::sqlparser::tokenizer::Token;
use millrace_dataflow::error::Result;

use super::{
    Cursor, Drop, EmitClause, Explain, ExplainTarget, ObjectKind, Options, Show, Statement, create,
};

/// `SOURCE`, `VIEW`, `MATERIALIZED VIEW`, `SINK`, `TABLE`, if one comes next.
fn kind(cursor: &mut Cursor<'_>) -> Option<ObjectKind> {
    for (words, kind) in [
        (&["source"][..], ObjectKind::Source),
        (&["view"], ObjectKind::View),
        (&["materialized", "view"], ObjectKind::MaterializedView),
        (&["sink"], ObjectKind::Sink),
        (&["table"], ObjectKind::Table),
    ] {
        if cursor.take_words(words) {
            return Some(kind);
        }
    }
    None
}

pub(crate) fn drop(cursor: &mut Cursor<'_>) -> Result<Drop> {
    cursor.expect_words(&["drop"])?;
    let Some(kind) = kind(cursor) else {
        let found = cursor.peek_word().unwrap_or_default();
        let error = cursor.unexpected("SOURCE, VIEW, MATERIALIZED VIEW, SINK or TABLE");
        return Err(
            match crate::error::nearest(&found, ["source", "view", "materialized", "sink", "table"])
            {
                Some(near) if near != found => {
                    error.hint(format!("did you mean {}?", near.to_uppercase()))
                }
                _ => error,
            },
        );
    };
    let if_exists = cursor.take_words(&["if", "exists"]);
    let mut names = Vec::new();
    loop {
        names.push(if kind == ObjectKind::Table {
            cursor.lake_name()?.to_string()
        } else {
            cursor.relation()?
        });
        if !cursor.take(&Token::Comma) {
            break;
        }
    }
    let cascade = cursor.take_words(&["cascade"]);
    if !cascade {
        cursor.take_words(&["restrict"]);
    }
    Ok(Drop {
        kind,
        if_exists,
        names,
        cascade,
    })
}

pub(crate) fn show(cursor: &mut Cursor<'_>) -> Result<Statement> {
    cursor.expect_words(&["show"])?;
    if cursor.take_words(&["create"]) {
        let kind = kind(cursor);
        return Ok(Statement::ShowCreate {
            kind,
            name: cursor.relation()?,
        });
    }
    for (words, show) in [
        (&["sources"][..], Show::Sources),
        (&["views"], Show::Views),
        (&["materialized", "views"], Show::MaterializedViews),
        (&["sinks"], Show::Sinks),
        (&["tables"], Show::Tables),
        (&["jobs"], Show::Jobs),
        (&["backfills"], Show::Backfills),
        (&["all"], Show::All),
    ] {
        if cursor.take_words(words) {
            return Ok(Statement::Show(show));
        }
    }
    let found = cursor.peek_word().unwrap_or_default();
    let error = cursor.unexpected(
        "SOURCES, VIEWS, MATERIALIZED VIEWS, SINKS, TABLES, JOBS, BACKFILLS, ALL or CREATE",
    );
    let known = [
        "sources",
        "views",
        "materialized",
        "sinks",
        "tables",
        "jobs",
        "backfills",
        "all",
        "create",
    ];
    Err(match crate::error::nearest(&found, known) {
        Some(near) => error.hint(format!("did you mean SHOW {}?", near.to_uppercase())),
        None => error,
    })
}

pub(crate) fn explain(cursor: &mut Cursor<'_>, emit: Option<EmitClause>) -> Result<Statement> {
    cursor.expect_words(&["explain"])?;
    let verbose = cursor.take_words(&["verbose"]);
    let target = match cursor.peek_word().as_deref() {
        Some("create") => match create(cursor, emit)? {
            Statement::CreateMaterializedView(view) => ExplainTarget::Create(Box::new(view)),
            _ => {
                return Err(cursor
                    .unexpected("a query, a view or CREATE MATERIALIZED VIEW")
                    .hint("only queries and materialized views have a plan"));
            }
        },
        Some("select" | "with" | "values") => ExplainTarget::Query(cursor.query()?),
        _ if cursor.peek_is(&Token::LParen) => ExplainTarget::Query(cursor.query()?),
        _ => ExplainTarget::Name(cursor.relation()?),
    };
    Ok(Statement::Explain(Explain { verbose, target }))
}

/// `key = 'value', …` as a statement would write them.
pub(crate) fn write_options(options: &Options) -> String {
    let parts: Vec<String> = options
        .iter()
        .map(|(k, v)| {
            format!(
                "\"{}\" = '{}'",
                k.replace('"', "\"\""),
                v.replace('\'', "''")
            )
        })
        .collect();
    parts.join(", ")
}
