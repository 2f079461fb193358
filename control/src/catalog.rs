//! The durable catalog: what was created, who may write, which checkpoint counts.
//!
//! # Contract
//!
//! * Every write names the incarnation of its writer and happens in one transaction that refuses an
//!   older one: a server that was replaced can change nothing any more and learns it (`57P01`).
//! * Ids are never reused, not even after a failed statement: state and files carry them.
//! * Statements are kept as text; the columns beside it are what cannot be derived from it (ids) or
//!   what tells whether deriving it again still gives the same plan (fingerprint).

use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;

mod meta;
pub mod migrations;
mod sqlite;

pub use sqlite::SqliteCatalog;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Source,
    /// A logical view: text that is inlined where it is used.
    View,
    MaterializedView,
    Sink,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::View => "view",
            Self::MaterializedView => "materialized view",
            Self::Sink => "sink",
        }
    }

    /// Reads what [`Self::as_str`] wrote.
    pub fn parse(text: &str) -> Result<Self> {
        [Self::Source, Self::View, Self::MaterializedView, Self::Sink]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    millrace_dataflow::error::ErrorKind::Corrupt,
                    format!("the catalog holds an object of unknown kind \"{text}\""),
                )
                .hint("it was probably written by a newer version")
            })
    }
}

/// One created object, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub id: RelationId,
    pub kind: Kind,
    /// As users say it; `lake.ns.t` for a view that is published under that name.
    pub name: String,
    /// The statement, complete in itself.
    pub text: String,
    /// `…$rejected` of a source.
    pub rejected: Option<RelationId>,
    /// `…$errors` of a view or source.
    pub errors: Option<RelationId>,
    /// `…$late` of a view.
    pub late: Option<RelationId>,
    /// The sink of a view published as `lake.ns.t`.
    pub companion: Option<RelationId>,
    /// Names of the objects it reads.
    pub depends_on: Vec<String>,
    /// Of the lowered plan; a different one after a restart means that stored state does not fit.
    pub fingerprint: String,
    pub created_ms: u64,
}

impl Object {
    /// Every id the engine knows this object by.
    pub fn ids(&self) -> Vec<RelationId> {
        [
            Some(self.id),
            self.rejected,
            self.errors,
            self.late,
            self.companion,
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
