//! Statements: from SQL text to a plan of the engine or of the query executor. Pure, no I/O.
//!
//! # The pipeline, one stage after the other
//!
//! ```text
//! text ─parse→ Parsed ─purify→ Purified ─bind→ Bound ─guard→ Guarded ─lower→ dataflow::plan::Plan
//!                      (Facts)          (CatalogPicture)      └──────resolve→ Executable (one-shot reads)
//! ```
//!
//! * [`parse::parse`] cuts a script into statements; error positions count characters from 1 in
//!   the whole script.
//! * [`purify::purify`] asks [`purify::Facts`] for what only the outside knows (columns of a source,
//!   schemas of lake tables) and inlines it: afterwards planning is a pure function of the
//!   statement and a [`catalog::CatalogPicture`].
//! * [`bind::bind`] resolves names and types against the picture. Its plans scan catalog sources
//!   that cannot be planned physically.
//! * [`guard::guard`] applies policy and is the only maker of [`guard::Guarded`].
//! * [`lower::lower`] turns a guarded view into operators; [`guard::Guarded::resolve`] swaps in the
//!   providers of a guarded query, which [`query::session_state`] can then execute.
//!
//! # Public API in short
//!
//! ```text
//! // parse.rs
//! pub fn parse(script: &str) -> Script;          // never fails as a whole
//! pub fn parse_one(text: &str) -> Result<Parsed>; // a stored text
//! pub struct Script { pub statements: Vec<Parsed>, pub error: Option<Error> }
//!     // `error` belongs to the statement with index `statements.len()`
//! pub struct Parsed { pub statement: Statement, pub text: String, pub offset: usize /* chars before it */, pub start: (u64, u64) }
//! pub enum Statement { CreateSource(CreateSource), CreateView(CreateView), CreateMaterializedView(..),
//!     CreateSink(CreateSink), Drop(Drop), Show(Show), ShowCreate{kind, name}, Describe{name},
//!     Explain(Explain), Query(Query) }
//! pub enum ObjectKind { Source, View, MaterializedView, Sink, Table }
//! pub type Options = BTreeMap<String, String>;   // keys lower case; numbers and booleans as text
//!
//! // purify.rs
//! #[async_trait] pub trait Facts: Send + Sync {
//!     /// Checks connector and options; `declared` holds the physical columns of the statement (empty: none given).
//!     async fn discover_source(&self, connector: &str, options: &Options, declared: &SchemaRef) -> Result<Discovered>;
//!     async fn lake_table(&self, name: &LakeName) -> Result<Option<SchemaRef>>;
//! }
//! pub struct Discovered { pub schema: Option<SchemaRef>, pub event_time: Option<(String, i64 /* delay us */)>,
//!     pub append_only: bool, pub bounded: bool, pub any_event_time: bool }
//! pub async fn purify(parsed: Parsed, facts: &dyn Facts) -> Result<Purified>;
//! impl From<Parsed> for Purified { .. } // nothing from outside is needed: the stored text of a view
//! pub struct Purified { pub parsed: Parsed, pub source: Option<Discovered>, pub lake: BTreeMap<LakeName, SchemaRef> }
//!
//! // catalog.rs
//! pub struct LakeName { pub namespace: Vec<String>, pub table: String }     // Display: lake.ns.t
//! #[derive(Default)] pub struct CatalogPicture { pub items: BTreeMap<String, Item>, pub lake: BTreeMap<LakeName, SchemaRef> }
//!     // key: item name as stored; a view published by name is keyed "lake.ns.t"
//! pub enum Item { Source(SourceItem), View(ViewItem), MaterializedView(ViewRelation), Sink(SinkItem) }
//! pub struct SourceItem { pub id: RelationId, pub schema: SchemaRef, pub event_time: Vec<Option<i64>>, pub append_only: bool,
//!     pub bounded: bool, pub text: String, pub system: Vec<SystemRelation> }
//! pub struct ViewItem { pub text: String }                                   // logical: inlined
//! pub struct ViewRelation { pub id: RelationId, pub schema: SchemaRef, pub event_time: Vec<Option<i64>>,
//!     pub append_only: bool, pub text: String, pub system: Vec<SystemRelation> }
//! pub struct SinkItem { pub text: String, pub from: String }
//! pub struct SystemRelation { pub suffix: String /* "rejected" | "errors" | "late" */, pub id: RelationId,
//!     pub schema: SchemaRef, pub append_only: bool }
//!
//! // bind.rs
//! pub fn bind(purified: Purified, picture: &CatalogPicture, params: &[ScalarValue]) -> Result<Bound>;
//! pub enum Bound { CreateSource(SourceDef), CreateView(ViewDef), CreateMaterializedView(MaterializedViewDef),
//!     CreateSink(SinkDef), Drop(Drop), Show(Show), ShowCreate{kind, name: String}, Describe(DescribeDef),
//!     Explain(ExplainDef), Query(BoundQuery) }
//! pub struct SourceDef { pub name: String, pub if_not_exists: bool, pub connector: String, pub options: Options,
//!     pub physical: SchemaRef, pub plan: SourcePlan, pub event_time: Vec<Option<i64>>, pub append_only: bool,
//!     pub bounded: bool, pub text: String /* self-contained: store this */ }
//! pub struct ViewDef { pub name: String, pub if_not_exists: bool, pub depends_on: Vec<String>, pub schema: SchemaRef, pub text: String }
//! pub struct MaterializedViewDef { pub name: String, pub lake: Option<LakeName>, pub if_not_exists: bool, pub on_error: OnError,
//!     pub allowed_lateness_us: i64, pub emit: Emit, pub depends_on: Vec<String>, pub options: Options, pub query: BoundQuery, pub text: String }
//! pub struct SinkDef { pub name: String, pub if_not_exists: bool, pub from: String, pub relation: RelationId, pub schema: SchemaRef,
//!     pub append_only: bool, pub target: SinkTarget, pub options: Options, pub text: String }
//! pub enum SinkTarget { Lake(LakeName), Blackhole }
//! pub struct DescribeDef { pub name: String, pub columns: SchemaRef, pub event_time: Vec<Option<i64>>, pub append_only: bool }
//!
//! // guard.rs
//! pub struct Policy;                                                          // allow all, for now
//! pub fn guard(query: BoundQuery, policy: &Policy) -> Result<Guarded>;
//! pub fn relations_of(guarded: &Guarded) -> Vec<RelationRef>;                  // each once, in order of first use
//! pub enum RelationRef { Engine { id: RelationId, name: String, schema: SchemaRef, source: bool }, Lake { name: LakeName, schema: SchemaRef } }
//! impl Guarded { pub fn schema(&self) -> SchemaRef;
//!     pub fn resolve(self, provider: &(dyn Fn(&RelationRef) -> Result<Arc<dyn TableProvider>> + Sync)) -> Result<Executable> }
//!
//! // query.rs: one-shot reads on DataFusion, with our functions and checked arithmetic
//! pub fn session_state(target_partitions: usize) -> SessionState;
//! impl Executable { pub fn schema(&self) -> SchemaRef;
//!     pub async fn physical(self, state: &SessionState) -> Result<Arc<dyn ExecutionPlan>> }
//! pub fn execution_error(e: DataFusionError) -> Error;                         // errors while executing
//!
//! // lower.rs
//! pub fn lower(guarded: &Guarded) -> Result<Lowered>;
//! pub struct Lowered { pub plan: Plan, pub event_time: Vec<Option<i64>>, pub notices: Vec<String> }
//!
//! // explain.rs
//! pub fn explain(def: ExplainDef, policy: &Policy) -> Result<String>;         // several lines
//! pub fn explain_plan(plan: &Plan) -> String;
//! pub fn is_secret(option: &str) -> bool;
//! pub fn show_create(text: &str) -> String;                                   // secrets replaced by [secret]
//! ```
//!
//! `event_time[i] = Some(delay)` says of column `i`: a row is final once `watermark >= value + delay`
//! (microseconds); a source's watermark column has delay 1, `window_end` 0, `window_start` the size.

pub mod bind;
pub mod catalog;
mod checked;
pub mod error;
pub mod explain;
mod functions;
pub mod guard;
pub mod lower;
mod optimize;
pub mod parse;
pub mod purify;
pub mod query;
mod sets;
mod stack;
pub mod types;
mod windows;

pub use bind::{
    Bound, BoundQuery, DescribeDef, ExplainDef, MaterializedViewDef, SinkDef, SourceDef, ViewDef,
    bind,
};
pub use catalog::{
    CatalogPicture, Item, LakeName, SinkItem, SourceItem, SystemRelation, ViewItem, ViewRelation,
};
pub use error::execution_error;
pub use explain::{explain, explain_plan, is_secret, show_create};
pub use guard::{Guarded, Policy, RelationRef, guard, relations_of};
pub use lower::{Lowered, lower};
pub use parse::{
    ObjectKind, Options, Parsed, Script, Show, SinkTarget, Statement, parse, parse_one,
};
pub use purify::{Discovered, Facts, Purified, purify};
pub use query::{Executable, session_state};
pub use types::sql_name;

#[cfg(test)]
mod testing;
