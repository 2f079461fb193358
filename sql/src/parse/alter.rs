//! `ALTER DATA PLANE [name] SET WORKERS [=] n`.

use datafusion::sql::sqlparser::tokenizer::Token;
use millrace_dataflow::error::{Error, Result};

use super::{Cursor, Statement};

pub(crate) fn alter(cursor: &mut Cursor<'_>) -> Result<Statement> {
    cursor.expect_words(&["alter"])?;
    if !cursor.take_words(&["data", "plane"]) {
        let what = cursor.peek_word().unwrap_or_default().to_uppercase();
        return Err(
            Error::unsupported(format!("ALTER {what} is not supported yet"))
                .position(cursor.position())
                .hint("what can be altered: DATA PLANE … SET WORKERS n"),
        );
    }
    // There is one data plane; its name may be left out.
    if cursor.peek_word().is_some_and(|word| word != "set") {
        let position = cursor.position();
        let name = cursor.name()?;
        if name != "default" {
            return Err(Error::new(
                millrace_dataflow::error::ErrorKind::NotFound,
                format!("there is no data plane \"{name}\""),
            )
            .code("42704")
            .position(position)
            .hint("the data plane of this server is called default"));
        }
    }
    cursor.expect_words(&["set", "workers"])?;
    cursor.take(&Token::Eq);
    let position = cursor.position();
    let workers = cursor.number()?;
    match usize::try_from(workers) {
        Ok(workers @ 1..=512) => Ok(Statement::SetWorkers(workers)),
        _ => Err(Error::invalid("workers must be between 1 and 512")
            .code("22023")
            .position(position)),
    }
}
