//! `CREATE SINK [IF NOT EXISTS] name FROM relation INTO lake.ns.table | blackhole [WITH (…)]`.

use millrace_dataflow::error::Result;

use super::{CreateSink, Cursor, Options, SinkTarget};

pub(crate) fn create(cursor: &mut Cursor<'_>) -> Result<CreateSink> {
    cursor.expect_words(&["sink"])?;
    let if_not_exists = cursor.if_not_exists();
    let name = cursor.object("sink")?;
    cursor.expect_words(&["from"])?;
    let from = cursor.relation()?;
    cursor.expect_words(&["into"])?;
    let target = if cursor.take_words(&["blackhole"]) {
        SinkTarget::Blackhole
    } else {
        SinkTarget::Lake(cursor.lake_name()?)
    };
    let options = if cursor.take_words(&["with"]) {
        cursor.options()?
    } else {
        Options::new()
    };
    Ok(CreateSink {
        name,
        if_not_exists,
        from,
        target,
        options,
    })
}
