//! An immutable picture of what exists, as binding sees it.

mod provider;
pub mod system;

use std::collections::BTreeMap;
use std::fmt;

use arrow::datatypes::SchemaRef;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;

use crate::error::unknown_relation;

pub(crate) use provider::{CatalogSource, Context, OPTIONS, Scanned};

/// First part of every name in the lake.
pub const LAKE: &str = "lake";

/// A table of the lake: `lake.namespace.table`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LakeName {
    pub namespace: Vec<String>,
    pub table: String,
}

impl LakeName {
    /// From the parts of a dotted name, beginning with `lake`.
    pub fn from_parts(parts: &[String]) -> Result<Self> {
        match parts {
            [lake, namespace, table] if lake == LAKE => Ok(Self {
                namespace: vec![namespace.clone()],
                table: table.clone(),
            }),
            _ => Err(Error::invalid(format!(
                "\"{}\" is not a name in the lake",
                parts.join(".")
            ))
            .code("3D000")
            .hint("tables of the lake are named lake.namespace.table; everything else has one word")),
        }
    }
    /// From `lake.ns.t`.
    pub fn parse(name: &str) -> Result<Self> {
        let parts: Vec<String> = name.split('.').map(str::to_string).collect();
        Self::from_parts(&parts)
    }
}

impl fmt::Display for LakeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{LAKE}.{}.{}", self.namespace.join("."), self.table)
    }
}

/// What exists. Keys are names as stored: one word, or `lake.ns.t` for a view published by name.
#[derive(Debug, Clone, Default)]
pub struct CatalogPicture {
    pub items: BTreeMap<String, Item>,
    pub lake: BTreeMap<LakeName, SchemaRef>,
}

#[derive(Debug, Clone)]
pub enum Item {
    Source(SourceItem),
    View(ViewItem),
    MaterializedView(ViewRelation),
    Sink(SinkItem),
}

#[derive(Debug, Clone)]
pub struct SourceItem {
    pub id: RelationId,
    pub schema: SchemaRef,
    /// Per column: final once `watermark >= value + delay` (microseconds).
    pub event_time: Vec<Option<i64>>,
    pub append_only: bool,
    pub bounded: bool,
    pub text: String,
    /// `name$rejected`.
    pub system: Vec<SystemRelation>,
}

/// A logical view: inlined where it is used.
#[derive(Debug, Clone)]
pub struct ViewItem {
    pub text: String,
}

/// A materialized view.
#[derive(Debug, Clone)]
pub struct ViewRelation {
    pub id: RelationId,
    pub schema: SchemaRef,
    pub event_time: Vec<Option<i64>>,
    pub append_only: bool,
    pub text: String,
    /// `name$errors`, `name$late`.
    pub system: Vec<SystemRelation>,
}

#[derive(Debug, Clone)]
pub struct SinkItem {
    pub text: String,
    pub from: String,
}

/// A relation the system keeps beside another one, read as `name$suffix`.
#[derive(Debug, Clone)]
pub struct SystemRelation {
    /// `rejected`, `errors` or `late`.
    pub suffix: String,
    pub id: RelationId,
    pub schema: SchemaRef,
    pub append_only: bool,
}

/// What a name in a FROM clause stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Found {
    Engine(EngineRelation),
    Lake(LakeName, SchemaRef),
    /// A logical view and its text.
    View(String, String),
    /// What the server says of itself.
    System(String, SchemaRef),
}

/// A relation of the engine, with what planning wants to know of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct EngineRelation {
    pub(crate) id: RelationId,
    /// As stored, with `$suffix` for a system relation.
    pub(crate) name: String,
    pub(crate) schema: SchemaRef,
    pub(crate) event_time: Vec<Option<i64>>,
    pub(crate) append_only: bool,
    /// `Some(bounded)` for a source.
    pub(crate) source: Option<bool>,
}

impl CatalogPicture {
    /// Resolves a name as stored.
    pub(crate) fn find(&self, name: &str) -> Result<Found> {
        if let Some(item) = self.items.get(name) {
            return match item {
                Item::Source(s) => Ok(Found::Engine(EngineRelation {
                    id: s.id,
                    name: name.to_string(),
                    schema: s.schema.clone(),
                    event_time: s.event_time.clone(),
                    append_only: s.append_only,
                    source: Some(s.bounded),
                })),
                Item::MaterializedView(v) => Ok(Found::Engine(EngineRelation {
                    id: v.id,
                    name: name.to_string(),
                    schema: v.schema.clone(),
                    event_time: v.event_time.clone(),
                    append_only: v.append_only,
                    source: None,
                })),
                Item::View(v) => Ok(Found::View(name.to_string(), v.text.clone())),
                Item::Sink(sink) => Err(Error::invalid(format!("\"{name}\" is a sink"))
                    .code(crate::error::WRONG_OBJECT)
                    .hint(format!(
                        "read what it writes, or \"{}\", from which it is fed",
                        sink.from
                    ))),
            };
        }
        if let Some((base, suffix)) = name.rsplit_once('$') {
            let system = match self.items.get(base) {
                Some(Item::Source(s)) => &s.system[..],
                Some(Item::MaterializedView(v)) => &v.system[..],
                _ => &[],
            };
            if let Some(s) = system.iter().find(|s| s.suffix == suffix) {
                return Ok(Found::Engine(EngineRelation {
                    id: s.id,
                    name: name.to_string(),
                    schema: s.schema.clone(),
                    event_time: vec![None; s.schema.fields().len()],
                    append_only: s.append_only,
                    source: None,
                }));
            }
        }
        if let Some(schema) = system::relation(name) {
            return Ok(Found::System(name.to_string(), schema));
        }
        if name.starts_with("millrace.") {
            return Err(unknown_relation(name, system::NAMES.iter().copied()));
        }
        if name.contains('.') {
            let lake = LakeName::parse(name)?;
            if let Some(schema) = self.lake.get(&lake) {
                return Ok(Found::Lake(lake, schema.clone()));
            }
        }
        let names = self.names();
        Err(unknown_relation(name, names.iter().map(String::as_str)))
    }

    /// Every name that can stand in a FROM clause.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for (name, item) in &self.items {
            let system = match item {
                Item::Source(s) => &s.system[..],
                Item::MaterializedView(v) => &v.system[..],
                Item::View(_) => &[],
                Item::Sink(_) => continue,
            };
            names.push(name.clone());
            names.extend(system.iter().map(|s| format!("{name}${}", s.suffix)));
        }
        names.extend(self.lake.keys().map(ToString::to_string));
        names.extend(system::NAMES.iter().map(ToString::to_string));
        names
    }
}
