//! Iceberg: tables, commits, reading. Knows no stream.
//!
//! # What a table is here
//!
//! A row in the catalog database names a metadata file; that file names snapshots, a snapshot names
//! manifests, a manifest names data files. Nothing below the row is ever changed, only added: moving
//! the row from one metadata file to the next, if it still is the one we looked at, *is* the commit.
//!
//! # What a commit promises
//!
//! The files of `[lower, upper)` of a sink stand in the table once, however often the process dies,
//! an answer is lost or an old process wakes up. The [`commit`] module says by which rules, and its
//! simulator shows that each of them is needed.
//!
//! # Where to begin
//!
//! [`catalog::SqlCatalog`] opens the catalog, [`commit::TableCommitter`] commits,
//! [`read::LakeTable`] reads one snapshot as a DataFusion table.

pub mod catalog;
pub mod commit;
pub mod error;
pub mod read;
pub mod schema;
pub mod snapshot;
pub mod storage;

#[cfg(test)]
mod testing;

pub use catalog::{SqlCatalog, TableName, TableVersion};
pub use commit::TableCommitter;
pub use read::LakeTable;
