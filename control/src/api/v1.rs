//! `/api/v1`: stable. Fields are added, never changed or removed.

pub mod csv;
pub mod json;
pub mod relations;
pub mod statements;
pub mod subscribe;
pub mod types;
