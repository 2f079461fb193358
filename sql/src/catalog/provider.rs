//! The catalog picture as `SqlToRel` asks for it.

use std::any::Any;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, SchemaRef};
use datafusion::common::Result as DfResult;
use datafusion::common::TableReference;
use datafusion::config::ConfigOptions;
use datafusion::datasource::cte_worktable::CteWorkTable;
use datafusion::datasource::provider_as_source;
use datafusion::logical_expr::planner::{
    ContextProvider, ExprPlanner, RelationPlanner, TypePlanner,
};
use datafusion::logical_expr::{
    AggregateUDF, Expr, LogicalPlan, ScalarUDF, TableProviderFilterPushDown, TableSource,
    TableType, WindowUDF,
};
use millrace_dataflow::error::{Error, Result};

use super::{CatalogPicture, EngineRelation, Found, LakeName};
use crate::error::carry;
use crate::functions::functions;
use crate::types::Types;
use crate::windows::Windows;

/// What a catalog source stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Scanned {
    Engine(EngineRelation),
    Lake(LakeName, SchemaRef),
    System(String, SchemaRef),
}

/// A relation by name. It cannot be planned physically: only the guard swaps in what can be read.
#[derive(Debug)]
pub(crate) struct CatalogSource {
    pub(crate) scanned: Scanned,
}

impl CatalogSource {
    pub(crate) fn schema(&self) -> &SchemaRef {
        match &self.scanned {
            Scanned::Engine(r) => &r.schema,
            Scanned::Lake(_, schema) | Scanned::System(_, schema) => schema,
        }
    }
    /// The catalog source behind a scan.
    pub(crate) fn of(source: &Arc<dyn TableSource>) -> Option<&Self> {
        source.as_any().downcast_ref()
    }
}

impl TableSource for CatalogSource {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn schema(&self) -> SchemaRef {
        Arc::clone(Self::schema(self))
    }
    fn table_type(&self) -> TableType {
        TableType::Base
    }
    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> DfResult<Vec<TableProviderFilterPushDown>> {
        Ok(vec![
            TableProviderFilterPushDown::Unsupported;
            filters.len()
        ])
    }
}

/// A logical view, already planned.
#[derive(Debug)]
struct Inlined {
    plan: LogicalPlan,
    schema: SchemaRef,
}

impl TableSource for Inlined {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
    fn table_type(&self) -> TableType {
        TableType::View
    }
    fn get_logical_plan(&self) -> Option<Cow<'_, LogicalPlan>> {
        Some(Cow::Borrowed(&self.plan))
    }
}

/// Names looked up while one statement is bound.
pub(crate) struct Context<'a> {
    picture: &'a CatalogPicture,
    /// Tables of the lake that purification found beyond the picture.
    lake: &'a std::collections::BTreeMap<LakeName, SchemaRef>,
    /// Names of relations used directly, in order of first use: what the statement depends on.
    used: RefCell<Vec<String>>,
    inlined: RefCell<HashMap<String, Arc<dyn TableSource>>>,
    /// Logical views being planned, outermost first.
    path: Vec<String>,
}

/// A view may stand on views this deep.
const MAX_VIEW_DEPTH: usize = 32;

impl<'a> Context<'a> {
    pub(crate) fn new(
        picture: &'a CatalogPicture,
        lake: &'a std::collections::BTreeMap<LakeName, SchemaRef>,
    ) -> Self {
        Self {
            picture,
            lake,
            used: RefCell::default(),
            inlined: RefCell::default(),
            path: Vec::new(),
        }
    }
    pub(crate) fn used(&self) -> Vec<String> {
        self.used.borrow().clone()
    }
    pub(crate) fn find(&self, name: &str) -> Result<Found> {
        match self.picture.find(name) {
            Ok(found) => Ok(found),
            Err(error) => {
                let lake = LakeName::parse(name)
                    .ok()
                    .and_then(|n| self.lake.get_key_value(&n));
                match lake {
                    Some((name, schema)) => Ok(Found::Lake(name.clone(), Arc::clone(schema))),
                    None => Err(error),
                }
            }
        }
    }
    fn source(&self, name: &str) -> Result<Arc<dyn TableSource>> {
        let found = self.find(name)?;
        {
            let mut used = self.used.borrow_mut();
            if !used.iter().any(|u| u == name) {
                used.push(name.to_string());
            }
        }
        let scanned = match found {
            Found::Engine(relation) => Scanned::Engine(relation),
            Found::Lake(name, schema) => Scanned::Lake(name, schema),
            Found::System(name, schema) => Scanned::System(name, schema),
            Found::View(name, text) => return self.inline(name, &text),
        };
        Ok(Arc::new(CatalogSource { scanned }))
    }
    fn inline(&self, name: String, text: &str) -> Result<Arc<dyn TableSource>> {
        if let Some(source) = self.inlined.borrow().get(&name) {
            return Ok(Arc::clone(source));
        }
        if self.path.contains(&name) {
            return Err(
                Error::invalid(format!("view \"{name}\" is defined by itself")).code("42P19"),
            );
        }
        if self.path.len() >= MAX_VIEW_DEPTH {
            return Err(Error::invalid("views stand on views too deeply")
                .code(crate::error::TOO_COMPLEX)
                .hint("materialize one of them"));
        }
        let mut path = self.path.clone();
        path.push(name.clone());
        let inner = Context {
            picture: self.picture,
            lake: self.lake,
            used: RefCell::default(),
            inlined: RefCell::default(),
            path,
        };
        let query = crate::bind::view_query(text)?;
        let plan = crate::bind::plan_query(&inner, *query).map_err(|e| {
            Error {
                position: None,
                ..e
            }
            .detail(format!("in view \"{name}\""))
        })?;
        let schema = Arc::new(plan.schema().as_arrow().clone());
        let source: Arc<dyn TableSource> = Arc::new(Inlined { plan, schema });
        self.inlined.borrow_mut().insert(name, Arc::clone(&source));
        Ok(source)
    }
}

/// Options of planning: the same for every statement.
pub(crate) static OPTIONS: LazyLock<ConfigOptions> = LazyLock::new(|| {
    let mut options = ConfigOptions::default();
    options.sql_parser.map_string_types_to_utf8view = false;
    options.sql_parser.parse_float_as_decimal = true;
    options.sql_parser.collect_spans = true;
    options.execution.time_zone = Some("UTC".into());
    options.optimizer.skip_failed_rules = false;
    options
});

static RELATIONS: LazyLock<Vec<Arc<dyn RelationPlanner>>> =
    LazyLock::new(|| vec![Arc::new(Windows)]);

impl ContextProvider for Context<'_> {
    fn get_table_source(&self, name: TableReference) -> DfResult<Arc<dyn TableSource>> {
        let stored = match &name {
            TableReference::Bare { table } => table.to_string(),
            TableReference::Partial { schema, table } => format!("{schema}.{table}"),
            TableReference::Full {
                catalog,
                schema,
                table,
            } => format!("{catalog}.{schema}.{table}"),
        };
        self.source(&stored).map_err(carry)
    }
    fn get_relation_planners(&self) -> &[Arc<dyn RelationPlanner>] {
        &RELATIONS
    }
    fn get_expr_planners(&self) -> &[Arc<dyn ExprPlanner>] {
        &functions().planners
    }
    fn get_type_planner(&self) -> Option<Arc<dyn TypePlanner>> {
        Some(Arc::new(Types))
    }
    fn get_function_meta(&self, name: &str) -> Option<Arc<ScalarUDF>> {
        functions().scalar.get(name).cloned()
    }
    fn get_aggregate_meta(&self, name: &str) -> Option<Arc<AggregateUDF>> {
        functions().aggregate.get(name).cloned()
    }
    fn get_window_meta(&self, name: &str) -> Option<Arc<WindowUDF>> {
        functions().window.get(name).cloned()
    }
    fn create_cte_work_table(
        &self,
        name: &str,
        schema: SchemaRef,
    ) -> DfResult<Arc<dyn TableSource>> {
        Ok(provider_as_source(Arc::new(CteWorkTable::new(
            name, schema,
        ))))
    }
    fn get_variable_type(&self, _: &[String]) -> Option<DataType> {
        None
    }
    fn options(&self) -> &ConfigOptions {
        &OPTIONS
    }
    fn udf_names(&self) -> Vec<String> {
        functions().scalar.keys().cloned().collect()
    }
    fn udaf_names(&self) -> Vec<String> {
        functions().aggregate.keys().cloned().collect()
    }
    fn udwf_names(&self) -> Vec<String> {
        functions().window.keys().cloned().collect()
    }
}
