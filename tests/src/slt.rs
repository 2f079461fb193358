//! The SQL corpus and how it is run: one set of queries, several ways to feed them, one answer.

pub mod corpus;
pub mod feed;
pub mod run;
