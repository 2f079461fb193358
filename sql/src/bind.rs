//! Names and types: a purified statement against a picture of the catalog. No I/O.
//!
//! # Contract
//!
//! * The result refers to relations by [`RelationId`] or name in the lake; its plans scan catalog
//!   sources, which only [`crate::guard`] can turn into something readable.
//! * Types are final: coercion, checked arithmetic and the form of the output columns are settled
//!   here, for views and queries alike.
//! * Errors point into the script the statement came from.

mod names;
mod output;
mod postgres;
mod relations;
mod source;
mod subquery;
mod using;
mod view;

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::common::ScalarValue;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::logical_expr::LogicalPlan;
use datafusion::sql::planner::{ParserOptions, SqlToRel};
use datafusion::sql::sqlparser::ast;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{Emit, OnError, RelationId, SourcePlan};

use crate::catalog::{CatalogPicture, CatalogSource, Context, Found, LakeName, Scanned};
use crate::error::{Place, WRONG_OBJECT, carry, planning};
use crate::optimize::analyze;
use crate::parse::{
    Alter, Drop, ExplainTarget, ObjectKind, Options, Parsed, Show, SinkTarget, Statement, parse_one,
};
use crate::purify::Purified;
use crate::stack::on_big_stack;

pub(crate) use names::shown_schema;
pub(crate) use output::shape;
pub(crate) use relations::is_ordered_set;
pub(crate) use source::{physical_expr, physical_schema as source_schema};

/// A statement whose names and types are settled.
#[derive(Debug)]
pub enum Bound {
    CreateSource(SourceDef),
    CreateView(ViewDef),
    CreateMaterializedView(MaterializedViewDef),
    CreateSink(SinkDef),
    Drop(Drop),
    Show(Show),
    ShowCreate {
        kind: Option<ObjectKind>,
        name: String,
    },
    Describe(DescribeDef),
    Explain(ExplainDef),
    /// `ALTER DATA PLANE … SET WORKERS n`.
    SetWorkers(usize),
    CancelBackfill(String),
    /// `ALTER DATA PLANE … SET PROCESSES n`.
    SetProcesses(usize),
    /// `ALTER SYSTEM SET (…)`.
    SetSystem(Options),
    Alter(Alter),
    Subscribe(SubscribeDef),
    Query(BoundQuery),
}

/// A relation to follow.
#[derive(Debug, Clone)]
pub struct SubscribeDef {
    pub name: String,
    pub relation: RelationId,
    pub schema: SchemaRef,
}

/// A source to create.
#[derive(Debug, Clone)]
pub struct SourceDef {
    pub name: String,
    pub if_not_exists: bool,
    pub connector: String,
    pub options: Options,
    /// What the connector reads.
    pub physical: SchemaRef,
    /// How the relation's columns come from it.
    pub plan: SourcePlan,
    pub event_time: Vec<Option<i64>>,
    pub append_only: bool,
    pub bounded: bool,
    /// Stands on its own: columns that were discovered are written out. Store this.
    pub text: String,
}

/// A logical view to create.
#[derive(Debug, Clone)]
pub struct ViewDef {
    pub name: String,
    pub if_not_exists: bool,
    pub depends_on: Vec<String>,
    pub schema: SchemaRef,
    pub text: String,
}

/// A materialized view to create.
#[derive(Debug)]
pub struct MaterializedViewDef {
    /// As stored; `lake.ns.t` when published under a name of the lake.
    pub name: String,
    pub lake: Option<LakeName>,
    pub if_not_exists: bool,
    pub or_replace: bool,
    pub on_error: OnError,
    pub allowed_lateness_us: i64,
    pub emit: Emit,
    pub depends_on: Vec<String>,
    /// Options of the sink, for a view published under a name of the lake.
    pub options: Options,
    pub query: BoundQuery,
    pub text: String,
}

/// A sink to create.
#[derive(Debug, Clone)]
pub struct SinkDef {
    pub name: String,
    pub if_not_exists: bool,
    pub from: String,
    pub relation: RelationId,
    pub schema: SchemaRef,
    pub append_only: bool,
    pub target: SinkTarget,
    pub options: Options,
    pub text: String,
}

/// What DESCRIBE shows.
#[derive(Debug, Clone)]
pub struct DescribeDef {
    pub name: String,
    pub columns: SchemaRef,
    pub event_time: Vec<Option<i64>>,
    pub append_only: bool,
}

/// What EXPLAIN explains.
#[derive(Debug)]
pub struct ExplainDef {
    pub verbose: bool,
    pub query: BoundQuery,
}

/// A plan over catalog sources, before policy.
#[derive(Debug, Clone)]
pub struct BoundQuery {
    pub(crate) plan: LogicalPlan,
    pub(crate) purpose: Purpose,
}

impl BoundQuery {
    /// Columns of the answer; that of a query may hold a name twice.
    pub fn schema(&self) -> SchemaRef {
        shown_schema(self.plan.schema().as_arrow())
    }
}

/// What a plan is for.
#[derive(Debug, Clone)]
pub(crate) enum Purpose {
    Query,
    View(ViewRules),
}

/// How a view is kept.
#[derive(Debug, Clone)]
pub(crate) struct ViewRules {
    pub(crate) on_error: OnError,
    pub(crate) allowed_lateness_us: i64,
    pub(crate) emit: Emit,
    /// It feeds a table that takes insertions only.
    pub(crate) append_only: bool,
}

/// Binds a statement. `params` are the values of `$1`, `$2`, … in a query.
pub fn bind(purified: Purified, picture: &CatalogPicture, params: &[ScalarValue]) -> Result<Bound> {
    on_big_stack(|| {
        let at = At::of(&purified.parsed);
        bind_statement(purified, picture, params).map_err(|e| at.place(e))
    })
}

fn bind_statement(
    purified: Purified,
    picture: &CatalogPicture,
    params: &[ScalarValue],
) -> Result<Bound> {
    let context = Context::new(picture, &purified.lake);
    let text = purified.parsed.text.clone();
    if !params.is_empty() && !matches!(purified.parsed.statement, Statement::Query(_)) {
        return Err(Error::invalid("parameters belong to queries")
            .code("08P01")
            .hint("write the values into the statement"));
    }
    Ok(match purified.parsed.statement {
        Statement::CreateSource(create) => {
            Bound::CreateSource(source::bind(create, purified.source, text)?)
        }
        Statement::CreateView(create) => {
            let plan = plan_query(&context, *create.query)?;
            output::unique_names(&plan)?;
            Bound::CreateView(ViewDef {
                name: create.name,
                if_not_exists: create.if_not_exists,
                depends_on: context.used(),
                schema: Arc::new(plan.schema().as_arrow().clone()),
                text,
            })
        }
        Statement::CreateMaterializedView(create) => {
            Bound::CreateMaterializedView(view::bind(&context, create, text)?)
        }
        Statement::CreateSink(create) => {
            let Found::Engine(relation) = context.find(&create.from)? else {
                return Err(Error::invalid(format!(
                    "\"{}\" has no changes that a sink could write",
                    create.from
                ))
                .code(WRONG_OBJECT)
                .hint("a sink is fed by a source or a materialized view"));
            };
            if matches!(create.target, SinkTarget::Lake(_)) && !relation.append_only {
                takes_retractions(&create.options, &format!("\"{}\"", create.from))?;
            }
            Bound::CreateSink(SinkDef {
                name: create.name,
                if_not_exists: create.if_not_exists,
                from: create.from,
                relation: relation.id,
                schema: relation.schema,
                append_only: relation.append_only,
                target: create.target,
                options: create.options,
                text,
            })
        }
        Statement::Drop(drop) => Bound::Drop(drop),
        Statement::Show(show) => Bound::Show(show),
        Statement::ShowCreate { kind, name } => Bound::ShowCreate { kind, name },
        Statement::Describe { name } => Bound::Describe(describe(&context, name)?),
        Statement::SetWorkers(workers) => Bound::SetWorkers(workers),
        Statement::CancelBackfill { name } => Bound::CancelBackfill(name),
        Statement::SetProcesses(processes) => Bound::SetProcesses(processes),
        Statement::SetSystem(options) => Bound::SetSystem(options),
        Statement::Alter(alter) => Bound::Alter(alter),
        Statement::Subscribe { name } => Bound::Subscribe(subscribe(&context, name)?),
        Statement::Explain(explain) => {
            let query = match explain.target {
                ExplainTarget::Query(query) => bind_query(&context, *query, params)?,
                ExplainTarget::Create(create) => view::bind(&context, *create, text)?.query,
                ExplainTarget::Name(name) => explain_name(&context, picture, &name)?,
            };
            Bound::Explain(ExplainDef {
                verbose: explain.verbose,
                query,
            })
        }
        Statement::Query(query) => Bound::Query(bind_query(&context, *query, params)?),
    })
}

/// A lake table takes insertions only, unless the sink writes changes with their signs.
pub(crate) fn takes_retractions(options: &Options, name: &str) -> Result<()> {
    if options.contains_key("changelog") {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "rows of {name} change after they appeared, and a table of the lake takes insertions only"
    ))
    .hint(
        "use EMIT ON WINDOW CLOSE, or WITH (changelog = 'op') to append each change with its sign",
    ))
}

fn bind_query(
    context: &Context<'_>,
    query: ast::Query,
    params: &[ScalarValue],
) -> Result<BoundQuery> {
    let plan = plan_with(context, query, Some(params))?;
    readable(&plan)?;
    Ok(BoundQuery {
        plan: shape(plan)?,
        purpose: Purpose::Query,
    })
}

/// A query reads what is at rest: views, tables, sources that end.
fn readable(plan: &LogicalPlan) -> Result<()> {
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node
            && let Some(source) = CatalogSource::of(&scan.source)
            && let Scanned::Engine(relation) = &source.scanned
            && relation.source == Some(false)
        {
            return Err(carry(
                Error::unsupported(format!(
                    "source \"{}\" never ends, so it cannot be queried directly",
                    relation.name
                ))
                .code(WRONG_OBJECT)
                .hint(format!(
                    "create a view over it: CREATE MATERIALIZED VIEW v AS SELECT … FROM {}",
                    relation.name
                )),
            ));
        }
        Ok(TreeNodeRecursion::Continue)
    })
    .map(|_| ())
    .map_err(|e| planning(e).0)
}

fn subscribe(context: &Context<'_>, name: String) -> Result<SubscribeDef> {
    match context.find(&name)? {
        Found::Engine(relation) if relation.source.is_none() => Ok(SubscribeDef {
            name,
            relation: relation.id,
            schema: relation.schema,
        }),
        _ => Err(Error::invalid(format!(
            "\"{name}\" keeps no contents that could be followed"
        ))
        .code(WRONG_OBJECT)
        .hint("subscribe to a materialized view: CREATE MATERIALIZED VIEW v AS SELECT …")),
    }
}

fn describe(context: &Context<'_>, name: String) -> Result<DescribeDef> {
    Ok(match context.find(&name)? {
        Found::Engine(relation) => DescribeDef {
            name,
            columns: relation.schema,
            event_time: relation.event_time,
            append_only: relation.append_only,
        },
        Found::Lake(_, columns) | Found::System(_, columns) => DescribeDef {
            name,
            event_time: vec![None; columns.fields().len()],
            columns,
            append_only: true,
        },
        Found::View(_, text) => {
            let plan = plan_query(context, *view_query(&text)?)?;
            let columns = Arc::new(plan.schema().as_arrow().clone());
            DescribeDef {
                name,
                event_time: vec![None; columns.fields().len()],
                columns,
                append_only: false,
            }
        }
    })
}

fn explain_name(context: &Context<'_>, picture: &CatalogPicture, name: &str) -> Result<BoundQuery> {
    use crate::catalog::Item;
    match picture.items.get(name) {
        Some(Item::MaterializedView(view)) => {
            let parsed = parse_one(&view.text)?;
            let Statement::CreateMaterializedView(create) = parsed.statement else {
                return Err(Error::internal(format!(
                    "the stored text of \"{name}\" is not a view"
                )));
            };
            Ok(view::bind(context, create, view.text.clone())
                .map_err(|e| Error {
                    position: None,
                    ..e
                })?
                .query)
        }
        Some(Item::View(view)) => {
            let plan = plan_query(context, *view_query(&view.text)?)?;
            Ok(BoundQuery {
                plan,
                purpose: Purpose::Query,
            })
        }
        Some(Item::Source(_) | Item::Sink(_)) => {
            Err(Error::invalid(format!("\"{name}\" has no plan of its own"))
                .code(WRONG_OBJECT)
                .hint("DESCRIBE shows its columns, SHOW CREATE its definition"))
        }
        None => {
            context.find(name)?;
            Err(Error::invalid(format!("\"{name}\" has no plan of its own")).code(WRONG_OBJECT))
        }
    }
}

/// The query of a stored CREATE VIEW.
pub(crate) fn view_query(text: &str) -> Result<Box<ast::Query>> {
    match parse_one(text)?.statement {
        Statement::CreateView(create) => Ok(create.query),
        _ => Err(Error::internal(
            "the stored text of a view is not CREATE VIEW",
        )),
    }
}

/// Plans a query without parameters: names, types, checked arithmetic.
pub(crate) fn plan_query(context: &Context<'_>, query: ast::Query) -> Result<LogicalPlan> {
    plan_with(context, query, None)
}

fn plan_with(
    context: &Context<'_>,
    mut query: ast::Query,
    params: Option<&[ScalarValue]>,
) -> Result<LogicalPlan> {
    using::write_out(&mut query)?;
    // Only a query has parameters, and only its answer may hold a name twice.
    names::name_columns(&mut query, params.is_some());
    postgres::rewrite(&mut query)?;
    let plan = planner(context)
        .sql_statement_to_plan(ast::Statement::Query(Box::new(query)))
        .and_then(|plan| match params {
            Some(params) => plan.with_param_values(params.to_vec()),
            None => Ok(plan),
        })
        .and_then(subquery::prepare)
        .and_then(analyze);
    let plan = plan.map_err(located)?;
    placeholders(&plan)?;
    Ok(plan)
}

fn placeholders(plan: &LogicalPlan) -> Result<()> {
    let names = plan.get_parameter_names().map_err(|e| planning(e).0)?;
    if names.is_empty() {
        return Ok(());
    }
    Err(
        Error::invalid("there is no value for a parameter of this statement")
            .code("08P01")
            .hint("pass one value per placeholder, in order: $1 is the first; views take none"),
    )
}

pub(crate) fn planner<'a, 'b>(context: &'a Context<'b>) -> SqlToRel<'a, Context<'b>> {
    SqlToRel::new_with_options(
        context,
        ParserOptions::new()
            .with_map_string_types_to_utf8view(false)
            .with_parse_float_as_decimal(true)
            .with_collect_spans(true),
    )
}

/// An error with its place kept for [`At::place`]: as `line << 32 | column`, above any position.
pub(crate) fn located(error: datafusion::error::DataFusionError) -> Error {
    let (error, place) = planning(error);
    match (error.position, place) {
        (None, Some(place)) => At::hold(error, place),
        _ => error,
    }
}

/// Where a statement stands in its script.
struct At {
    offset: usize,
    start: (u64, u64),
    text: String,
}

/// Positions at or above this are places not yet translated.
const HELD: usize = 1 << 56;

impl At {
    fn of(parsed: &Parsed) -> Self {
        Self {
            offset: parsed.offset,
            start: parsed.start,
            text: parsed.text.clone(),
        }
    }
    fn hold(error: Error, (line, column): Place) -> Error {
        let held = HELD | ((line as usize & 0xff_ffff) << 32) | (column as usize & 0xffff_ffff);
        error.position(held)
    }
    /// Translates a held place into a character position of the script.
    fn place(&self, mut error: Error) -> Error {
        let Some(held) = error.position.filter(|p| *p >= HELD) else {
            return error;
        };
        let (line, column) = (
            ((held >> 32) & 0xff_ffff) as u64,
            (held & 0xffff_ffff) as u64,
        );
        error.position = self.position(line, column);
        error
    }
    fn position(&self, line: u64, column: u64) -> Option<usize> {
        let (first_line, first_column) = self.start;
        if line == first_line {
            let within = column.checked_sub(first_column)?;
            return Some(self.offset + within as usize + 1);
        }
        let skip = line.checked_sub(first_line)? as usize;
        let before: usize = self
            .text
            .split('\n')
            .take(skip)
            .map(|l| l.chars().count() + 1)
            .sum();
        Some(self.offset + before + column as usize)
    }
}
