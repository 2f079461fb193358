//! Facts from outside, asked for once and written into the statement.
//!
//! After this stage planning is a pure function of the statement and the catalog picture.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::sql::sqlparser::ast::{Expr, ObjectName, Query, TableFactor, Visit, Visitor};
use millrace_dataflow::error::Result;

use crate::bind::source_schema;
use crate::catalog::LakeName;
use crate::parse::{ExplainTarget, Options, Parsed, Statement, fold_idents, fold_name};

/// What only the outside knows. Implemented by the service.
#[async_trait]
pub trait Facts: Send + Sync {
    /// Checks connector and options, and says what such a source has. `declared` holds the physical
    /// columns of the statement (none: they are to be discovered).
    async fn discover_source(
        &self,
        connector: &str,
        options: &Options,
        declared: &SchemaRef,
    ) -> Result<Discovered>;
    /// Columns of a table of the lake, `None` if there is no such table.
    async fn lake_table(&self, name: &LakeName) -> Result<Option<SchemaRef>>;
}

/// What a connector said of a source.
#[derive(Debug, Clone, Default)]
pub struct Discovered {
    /// Physical columns, if the connector knows them by itself.
    pub schema: Option<SchemaRef>,
    /// Watermark to take when the statement declares none: column and delay in microseconds.
    pub event_time: Option<(String, i64)>,
    pub append_only: bool,
    pub bounded: bool,
    /// Its event time has nothing to do with the clock.
    pub any_event_time: bool,
}

/// A statement that needs nothing more from outside.
#[derive(Debug, Clone)]
pub struct Purified {
    pub parsed: Parsed,
    pub source: Option<Discovered>,
    /// Tables of the lake that the statement names.
    pub lake: BTreeMap<LakeName, SchemaRef>,
}

/// Asks for what the statement needs.
pub async fn purify(parsed: Parsed, facts: &dyn Facts) -> Result<Purified> {
    let mut source = None;
    if let Statement::CreateSource(create) = &parsed.statement {
        let connector = create.options.get("connector").cloned().unwrap_or_default();
        let declared = source_schema(create);
        source = Some(
            facts
                .discover_source(&connector, &create.options, &declared)
                .await?,
        );
    }
    let mut lake = BTreeMap::new();
    for name in lake_names(&parsed.statement) {
        if let Some(schema) = facts.lake_table(&name).await? {
            lake.insert(name, schema);
        }
    }
    Ok(Purified {
        parsed,
        source,
        lake,
    })
}

/// Names of the lake that a statement reads, each once.
fn lake_names(statement: &Statement) -> Vec<LakeName> {
    let mut names = Names::default();
    let mut query = |q: &Query| {
        let _ = q.visit(&mut names);
    };
    match statement {
        Statement::Query(q) => query(q),
        Statement::CreateView(v) => query(&v.query),
        Statement::CreateMaterializedView(v) => query(&v.query),
        Statement::Explain(e) => match &e.target {
            ExplainTarget::Query(q) => query(q),
            ExplainTarget::Create(v) => query(&v.query),
            ExplainTarget::Name(_) => {}
        },
        Statement::Describe { name } => names.found.extend(LakeName::parse(name)),
        _ => {}
    }
    names.found.sort();
    names.found.dedup();
    names.found
}

#[derive(Default)]
struct Names {
    found: Vec<LakeName>,
}

impl Visitor for Names {
    type Break = ();

    fn pre_visit_relation(&mut self, relation: &ObjectName) -> ControlFlow<()> {
        if let Some(parts) = fold_name(relation) {
            self.found.extend(LakeName::from_parts(&parts));
        }
        ControlFlow::Continue(())
    }
    // The relation of TUMBLE(lake.ns.t, …) is an argument.
    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        if let TableFactor::Table {
            args: Some(args), ..
        } = factor
        {
            for arg in &args.args {
                if let datafusion::sql::sqlparser::ast::FunctionArg::Unnamed(
                    datafusion::sql::sqlparser::ast::FunctionArgExpr::Expr(
                        Expr::CompoundIdentifier(parts),
                    ),
                ) = arg
                {
                    self.found.extend(LakeName::from_parts(&fold_idents(parts)));
                }
            }
        }
        ControlFlow::Continue(())
    }
}

impl From<Parsed> for Purified {
    /// A statement that needs nothing from outside, such as the stored text of a view.
    fn from(parsed: Parsed) -> Self {
        Self {
            parsed,
            source: None,
            lake: BTreeMap::new(),
        }
    }
}
