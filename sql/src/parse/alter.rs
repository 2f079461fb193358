//! `ALTER DATA PLANE [name] SET { WORKERS | PROCESSES } [=] n`.

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
                .hint("what can be altered: DATA PLANE … SET WORKERS n, SET PROCESSES n"),
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
    cursor.expect_words(&["set"])?;
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
    match usize::try_from(cursor.number()?) {
        Ok(count) if (1..=most).contains(&count) => Ok(match processes {
            true => Statement::SetProcesses(count),
            false => Statement::SetWorkers(count),
        }),
        _ => Err(
            Error::invalid(format!("{what} must be between 1 and {most}"))
                .code("22023")
                .position(position),
        ),
    }
}
