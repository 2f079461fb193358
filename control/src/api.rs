//! The HTTP API's resources, by version. Wire types stay in here.

pub mod v1;
