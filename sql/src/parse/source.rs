//! `CREATE SOURCE [IF NOT EXISTS] name [(columns)] WITH (options)`.

use datafusion::sql::sqlparser::ast;
use datafusion::sql::sqlparser::tokenizer::Token;
use millrace_dataflow::error::{Error, Result};

use super::{ColumnDef, CreateSource, Cursor, WatermarkDef};
use crate::error::{DUPLICATE_COLUMN, syntax};
use crate::types::{column_type, text_length, type_words};

pub(crate) fn create(cursor: &mut Cursor<'_>) -> Result<CreateSource> {
    cursor.expect_words(&["source"])?;
    let if_not_exists = cursor.if_not_exists();
    let name = cursor.object("source")?;
    let mut source = CreateSource {
        name,
        if_not_exists,
        columns: Vec::new(),
        watermark: None,
        options: super::Options::new(),
    };
    if cursor.take(&Token::LParen) {
        loop {
            element(cursor, &mut source)?;
            if !cursor.take(&Token::Comma) {
                break;
            }
        }
        cursor.expect(&Token::RParen)?;
    }
    if !cursor.take_words(&["with"]) {
        return Err(cursor
            .unexpected("WITH")
            .hint("a source says what it reads: WITH (connector = 'kafka', …)"));
    }
    source.options = cursor.options()?;
    if !source.options.contains_key("connector") {
        return Err(
            Error::invalid("a source needs the option \"connector\"").hint(
                "connectors are generator, kafka and files, as in WITH (connector = 'kafka', …)",
            ),
        );
    }
    Ok(source)
}

fn element(cursor: &mut Cursor<'_>, source: &mut CreateSource) -> Result<()> {
    let position = cursor.position();
    if cursor.take_words(&["watermark", "for"]) {
        let column = cursor.name()?;
        cursor.expect_words(&["as"])?;
        let expr = cursor.expr()?;
        if source.watermark.is_some() {
            return Err(syntax("a source has at most one WATERMARK").position(position));
        }
        source.watermark = Some(WatermarkDef { column, expr });
        return Ok(());
    }
    for words in [
        &["primary", "key"][..],
        &["constraint"],
        &["unique"],
        &["check"],
        &["foreign"],
    ] {
        if cursor.take_words(words) {
            return Err(Error::unsupported(format!(
                "{} in a source is not supported",
                words.join(" ").to_uppercase()
            ))
            .position(position));
        }
    }
    let name = cursor.name()?;
    if source.columns.iter().any(|c| c.name == name) {
        return Err(
            Error::invalid(format!("column \"{name}\" is specified more than once"))
                .code(DUPLICATE_COLUMN)
                .position(position),
        );
    }
    let mut column = ColumnDef {
        name,
        data_type: None,
        length: None,
        computed: None,
    };
    if !cursor.take_words(&["as"]) {
        let at = cursor.position();
        if cursor.peek_is(&Token::Comma) || cursor.peek_is(&Token::RParen) {
            return Err(cursor.unexpected("a type").hint(format!(
                "write the column as {} BIGINT, for example",
                column.name
            )));
        }
        let word = cursor.peek_word();
        let data_type = cursor.data_type()?;
        column.length = text_length(&data_type).map_err(|e| e.position(at))?;
        let data_type = match column.length {
            Some(_) => ast::DataType::Text,
            None => data_type,
        };
        column.data_type = Some(column_type(&data_type).map_err(|e| {
            let e = e.position(at);
            match word.and_then(|w| crate::error::nearest(&w, type_words()).map(str::to_uppercase))
            {
                Some(near) if e.hint.is_none() => e.hint(format!("did you mean {near}?")),
                _ => e,
            }
        })?);
        if cursor.take_words(&["as"]) {
            column.computed = Some(cursor.expr()?);
        }
    } else {
        column.computed = Some(cursor.expr()?);
    }
    if let Some(word) = cursor.peek_word() {
        let at = cursor.position();
        if [
            "not",
            "null",
            "default",
            "primary",
            "unique",
            "check",
            "generated",
            "references",
        ]
        .contains(&word.as_str())
        {
            return Err(Error::unsupported(format!(
                "{} on a column of a source is not supported",
                word.to_uppercase()
            ))
            .position(at)
            .hint("a field that is missing is NULL; filter in a view"));
        }
    }
    source.columns.push(column);
    Ok(())
}
