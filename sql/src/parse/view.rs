//! `CREATE VIEW` and `CREATE MATERIALIZED VIEW`.

use datafusion::sql::sqlparser::tokenizer::{Token, TokenWithSpan};
use millrace_dataflow::error::{Error, Result};

use super::{CreateMaterializedView, CreateView, Cursor, EmitClause, Options};

/// Takes `EMIT CHANGES` or `EMIT ON WINDOW CLOSE` from the end of the tokens, with its place.
pub(crate) fn cut_emit(tokens: &mut Vec<TokenWithSpan>) -> Option<(EmitClause, (u64, u64))> {
    for (clause, words) in [
        (EmitClause::Changes, &["emit", "changes"][..]),
        (
            EmitClause::OnWindowClose,
            &["emit", "on", "window", "close"],
        ),
    ] {
        let Some(start) = tokens.len().checked_sub(words.len()) else {
            continue;
        };
        let matches = tokens[start..].iter().zip(words).all(|(t, word)| {
            matches!(&t.token, Token::Word(w) if w.quote_style.is_none() && w.value.eq_ignore_ascii_case(word))
        });
        if matches {
            let at = tokens[start].span.start;
            tokens.truncate(start);
            return Some((clause, (at.line, at.column)));
        }
    }
    None
}

pub(crate) fn create_view(cursor: &mut Cursor<'_>) -> Result<CreateView> {
    cursor.expect_words(&["view"])?;
    let if_not_exists = cursor.if_not_exists();
    let name = cursor.object("view")?;
    no_columns(cursor)?;
    if cursor.peek_word().as_deref() == Some("with") {
        return Err(cursor
            .unexpected("AS")
            .hint("options belong to CREATE MATERIALIZED VIEW"));
    }
    cursor.expect_words(&["as"])?;
    Ok(CreateView {
        name,
        if_not_exists,
        query: cursor.query()?,
    })
}

pub(crate) fn create_materialized(
    cursor: &mut Cursor<'_>,
    emit: Option<EmitClause>,
    or_replace: bool,
) -> Result<CreateMaterializedView> {
    cursor.expect_words(&["materialized"])?;
    cursor.expect_words(&["view"])?;
    let position = cursor.position();
    let if_not_exists = cursor.if_not_exists();
    if if_not_exists && or_replace {
        return Err(
            crate::error::syntax("OR REPLACE and IF NOT EXISTS exclude each other")
                .position(position)
                .hint("one replaces a view that exists, the other leaves it"),
        );
    }
    let (name, lake) = cursor.view_name()?;
    no_columns(cursor)?;
    let options = if cursor.take_words(&["with"]) {
        cursor.options()?
    } else {
        Options::new()
    };
    cursor.expect_words(&["as"])?;
    Ok(CreateMaterializedView {
        name,
        lake,
        if_not_exists,
        or_replace,
        options,
        query: cursor.query()?,
        emit,
    })
}

fn no_columns(cursor: &Cursor<'_>) -> Result<()> {
    if cursor.peek_is(&Token::LParen) {
        return Err(
            Error::unsupported("a column list of a view is not supported")
                .position(cursor.position())
                .hint("name the columns in the query: SELECT a AS b"),
        );
    }
    Ok(())
}
