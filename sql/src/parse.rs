//! Text to statements: our statements by their leading words, queries by sqlparser.
//!
//! # Contract
//!
//! * A script is cut at `;`; statements before a faulty one are returned, with the error of the
//!   first faulty one. Positions count characters of the script from 1.
//! * A syntax element that nothing consumes is refused, never ignored (`limits` and `refuse` look
//!   at what sqlparser accepts beyond our dialect).
//! * Identifiers fold to lower case unless quoted.
//! * `EMIT …` is cut out of the tokens before sqlparser sees them: it would take it for an alias.

mod alter;
mod cursor;
mod dialect;
mod limits;
mod refuse;
mod show;
mod sink;
mod source;
mod view;

use std::collections::BTreeMap;

use datafusion::sql::sqlparser::ast;
use datafusion::sql::sqlparser::tokenizer::{Token, TokenWithSpan};
use millrace_dataflow::error::{Error, Result};

use crate::catalog::LakeName;
use crate::error::{nearest, syntax};
use crate::stack::on_big_stack;

pub use alter::with_options;
pub(crate) use cursor::{Cursor, Lines, fold, fold_idents, fold_name, tokenize};
pub(crate) use dialect::Postgres as Dialect;
pub(crate) use show::write_options;

/// Longest script, in bytes.
pub const MAX_SCRIPT_BYTES: usize = 16 << 20;

/// Options of `WITH (…)`: keys in lower case; numbers and booleans as text.
pub type Options = BTreeMap<String, String>;

/// A script, cut into statements.
#[derive(Debug)]
pub struct Script {
    pub statements: Vec<Parsed>,
    /// What is wrong with the statement that follows the last of `statements`, if anything.
    pub error: Option<Error>,
}

/// One statement and where it stands in its script.
#[derive(Debug, Clone)]
pub struct Parsed {
    pub statement: Statement,
    /// The statement without its `;`.
    pub text: String,
    /// Characters of the script before `text`.
    pub offset: usize,
    /// Line and column (from 1) in the script at which `text` begins.
    pub start: (u64, u64),
}

#[derive(Debug, Clone)]
pub enum Statement {
    CreateSource(CreateSource),
    CreateView(CreateView),
    CreateMaterializedView(CreateMaterializedView),
    CreateSink(CreateSink),
    Drop(Drop),
    Show(Show),
    ShowCreate {
        kind: Option<ObjectKind>,
        name: String,
    },
    Describe {
        name: String,
    },
    Explain(Explain),
    /// `ALTER DATA PLANE [name] SET WORKERS n`.
    SetWorkers(usize),
    /// `CANCEL BACKFILL name`.
    CancelBackfill {
        name: String,
    },
    /// `ALTER DATA PLANE [name] SET PROCESSES n`.
    SetProcesses(usize),
    /// `ALTER SYSTEM SET (…)`, `ALTER DATA PLANE [name] SET (…)`.
    SetSystem(Options),
    Alter(Alter),
    /// `SUBSCRIBE [TO] name`: contents, then changes.
    Subscribe {
        name: String,
    },
    Query(Box<ast::Query>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    Source,
    View,
    MaterializedView,
    Sink,
    /// A table of the lake.
    Table,
}

impl ObjectKind {
    /// As users read it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::View => "view",
            Self::MaterializedView => "materialized view",
            Self::Sink => "sink",
            Self::Table => "table",
        }
    }
}

#[derive(Debug, Clone)]
pub struct CreateSource {
    pub name: String,
    pub if_not_exists: bool,
    pub columns: Vec<ColumnDef>,
    pub watermark: Option<WatermarkDef>,
    pub options: Options,
}

#[derive(Debug, Clone)]
pub struct ColumnDef {
    pub name: String,
    /// Absent only for a computed column, whose expression then gives the type.
    pub data_type: Option<arrow::datatypes::DataType>,
    /// The n of `VARCHAR(n)`: longer values reject the record.
    pub length: Option<u64>,
    pub computed: Option<ast::Expr>,
}

#[derive(Debug, Clone)]
pub struct WatermarkDef {
    pub column: String,
    pub expr: ast::Expr,
}

#[derive(Debug, Clone)]
pub struct CreateView {
    pub name: String,
    pub if_not_exists: bool,
    pub query: Box<ast::Query>,
}

/// `EMIT …` of a materialized view, as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmitClause {
    Changes,
    OnWindowClose,
}

#[derive(Debug, Clone)]
pub struct CreateMaterializedView {
    /// As stored in the catalog; `lake.ns.t` when it is published under a name of the lake.
    pub name: String,
    pub lake: Option<LakeName>,
    pub if_not_exists: bool,
    /// `OR REPLACE`: takes the place of a view of that name.
    pub or_replace: bool,
    pub options: Options,
    pub query: Box<ast::Query>,
    pub emit: Option<EmitClause>,
}

#[derive(Debug, Clone)]
pub struct CreateSink {
    pub name: String,
    pub if_not_exists: bool,
    pub from: String,
    pub target: SinkTarget,
    pub options: Options,
}

/// Where a sink writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkTarget {
    Lake(LakeName),
    /// Counts and drops.
    Blackhole,
}

#[derive(Debug, Clone)]
pub struct Drop {
    pub kind: ObjectKind,
    pub if_exists: bool,
    /// Names as stored in the catalog; for `ObjectKind::Table`, `lake.ns.t`.
    pub names: Vec<String>,
    pub cascade: bool,
}

/// `ALTER SINK | MATERIALIZED VIEW name …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alter {
    pub kind: ObjectKind,
    /// As stored in the catalog.
    pub name: String,
    pub action: AlterAction,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AlterAction {
    Pause,
    /// Also `RETRY`.
    Resume,
    Set(Options),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    Sources,
    Views,
    MaterializedViews,
    Sinks,
    Tables,
    Jobs,
    Backfills,
    All,
}

#[derive(Debug, Clone)]
pub struct Explain {
    pub verbose: bool,
    pub target: ExplainTarget,
}

#[derive(Debug, Clone)]
pub enum ExplainTarget {
    Query(Box<ast::Query>),
    Create(Box<CreateMaterializedView>),
    Name(String),
}

/// Cuts a script into statements. Never fails as a whole: see [`Script`].
pub fn parse(script: &str) -> Script {
    if script.len() > MAX_SCRIPT_BYTES {
        return Script {
            statements: Vec::new(),
            error: Some(limits::too_large(MAX_SCRIPT_BYTES)),
        };
    }
    on_big_stack(|| parse_script(script))
}

/// The statement of a stored text, which holds exactly one.
pub fn parse_one(text: &str) -> Result<Parsed> {
    let mut script = parse(text);
    match (script.statements.len(), script.error) {
        (_, Some(error)) => Err(error),
        (1, None) => Ok(script.statements.swap_remove(0)),
        (n, None) => Err(syntax(format!("expected one statement, found {n}"))),
    }
}

fn parse_script(script: &str) -> Script {
    let (tokens, broken) = tokenize(script);
    let lines = Lines::of(script);
    let mut statements = Vec::new();
    let mut pieces: Vec<Vec<TokenWithSpan>> = vec![Vec::new()];
    for token in tokens {
        if token.token == Token::SemiColon {
            pieces.push(Vec::new());
        } else if let Some(last) = pieces.last_mut() {
            last.push(token);
        }
    }
    // What stands before a token that cannot be read is no statement.
    if broken.is_some() {
        pieces.pop();
    }
    for tokens in pieces {
        let (Some(first), Some(last)) = (tokens.first(), tokens.last()) else {
            continue;
        };
        let start = (first.span.start.line, first.span.start.column);
        let offset = lines.offset(start);
        let text = lines.slice(
            offset,
            lines.offset((last.span.end.line, last.span.end.column)),
        );
        match statement(tokens, &lines) {
            Ok(statement) => statements.push(Parsed {
                statement,
                text,
                offset,
                start,
            }),
            Err(error) => {
                return Script {
                    statements,
                    error: Some(error),
                };
            }
        }
    }
    Script {
        statements,
        error: broken.map(|e| {
            syntax(crate::error::lower_first(&e.message))
                .position(lines.offset((e.location.line, e.location.column)) + 1)
        }),
    }
}

/// Statements that other systems have under these leading words and this one does not have yet.
const FOREIGN: &[&str] = &[
    "insert",
    "update",
    "delete",
    "merge",
    "copy",
    "grant",
    "revoke",
    "begin",
    "start",
    "commit",
    "rollback",
    "set",
    "reset",
    "truncate",
    "analyze",
    "call",
    "prepare",
    "execute",
    "deallocate",
    "use",
    "vacuum",
    "refresh",
    "declare",
    "fetch",
    "close",
    "listen",
    "notify",
    "lock",
    "comment",
];
const LEADING: &[&str] = &[
    "alter",
    "cancel",
    "create",
    "drop",
    "show",
    "describe",
    "explain",
    "select",
    "subscribe",
    "with",
    "values",
];
const CREATABLE: &[&str] = &["source", "view", "materialized", "sink"];
const FOREIGN_OBJECTS: &[&str] = &[
    "table",
    "index",
    "schema",
    "database",
    "function",
    "role",
    "user",
    "connection",
    "temporary",
    "temp",
    "external",
    "type",
    "sequence",
    "secret",
    "policy",
    "unique",
    "recursive",
];

fn statement(mut tokens: Vec<TokenWithSpan>, lines: &Lines) -> Result<Statement> {
    let emit = view::cut_emit(&mut tokens);
    let mut cursor = Cursor::new(tokens, lines);
    let statement = leading(&mut cursor, emit.as_ref().map(|(clause, _)| *clause));
    let statement = cursor.place(statement)?;
    cursor.end()?;
    if let Some((_, at)) = emit
        && !matches!(
            statement,
            Statement::CreateMaterializedView(_)
                | Statement::Explain(Explain {
                    target: ExplainTarget::Create(_),
                    ..
                })
        )
    {
        return Err(syntax("EMIT belongs to CREATE MATERIALIZED VIEW")
            .position(lines.offset(at) + 1)
            .hint("create a materialized view, and query it"));
    }
    Ok(statement)
}

fn leading(cursor: &mut Cursor<'_>, emit: Option<EmitClause>) -> Result<Statement> {
    let word = cursor.peek_word().unwrap_or_default();
    match word.as_str() {
        "create" => create(cursor, emit),
        "alter" => alter::alter(cursor),
        "cancel" => {
            cursor.expect_words(&["cancel", "backfill"])?;
            Ok(Statement::CancelBackfill {
                name: cursor.relation()?,
            })
        }
        "drop" => show::drop(cursor).map(Statement::Drop),
        "show" => show::show(cursor),
        "describe" | "desc" => {
            cursor.advance();
            Ok(Statement::Describe {
                name: cursor.relation()?,
            })
        }
        "explain" => show::explain(cursor, emit),
        "subscribe" => {
            cursor.advance();
            cursor.take_words(&["to"]);
            Ok(Statement::Subscribe {
                name: cursor.relation()?,
            })
        }
        "select" | "with" | "values" | "from" | "table" => Ok(Statement::Query(cursor.query()?)),
        "" if cursor.peek_is(&Token::LParen) => Ok(Statement::Query(cursor.query()?)),
        other if FOREIGN.contains(&other) => Err(Error::unsupported(format!(
            "{} is not supported yet",
            other.to_uppercase()
        ))
        .position(cursor.position())),
        other => {
            let found = cursor.here();
            let error =
                syntax(format!("syntax error at or near {found}")).position(cursor.position());
            Err(match nearest(other, LEADING.iter().copied()) {
                Some(near) if !other.is_empty() => {
                    error.hint(format!("did you mean {}?", near.to_uppercase()))
                }
                _ => error.hint(
                    "a statement begins with CREATE, DROP, SHOW, DESCRIBE, EXPLAIN, SELECT, WITH or VALUES",
                ),
            })
        }
    }
}

pub(crate) fn create(cursor: &mut Cursor<'_>, emit: Option<EmitClause>) -> Result<Statement> {
    cursor.advance();
    let or_replace = cursor.take_words(&["or", "replace"]);
    let word = cursor.peek_word().unwrap_or_default();
    match word.as_str() {
        other if or_replace && other != "materialized" => {
            let error = match CREATABLE.contains(&other) {
                true => Error::unsupported(format!(
                    "CREATE OR REPLACE {} is not supported",
                    other.to_uppercase()
                )),
                false => cursor.unexpected("MATERIALIZED VIEW"),
            };
            Err(error.position(cursor.position()).hint(
                "what can be replaced: MATERIALIZED VIEW; others are dropped and created again",
            ))
        }
        "source" => source::create(cursor).map(Statement::CreateSource),
        "view" => view::create_view(cursor).map(Statement::CreateView),
        "materialized" => view::create_materialized(cursor, emit, or_replace)
            .map(Statement::CreateMaterializedView),
        "sink" => sink::create(cursor).map(Statement::CreateSink),
        other if FOREIGN_OBJECTS.contains(&other) => Err(Error::unsupported(format!(
            "CREATE {} is not supported yet",
            other.to_uppercase()
        ))
        .position(cursor.position())
        .hint("what can be created: SOURCE, VIEW, MATERIALIZED VIEW, SINK")),
        other => {
            let found = cursor.here();
            let error =
                syntax(format!("syntax error at or near {found}")).position(cursor.position());
            Err(match nearest(other, CREATABLE.iter().copied()) {
                Some("materialized") => error.hint("did you mean MATERIALIZED VIEW?"),
                Some(near) => error.hint(format!("did you mean {}?", near.to_uppercase())),
                None => error.hint("what can be created: SOURCE, VIEW, MATERIALIZED VIEW, SINK"),
            })
        }
    }
}

#[cfg(test)]
mod tests;
