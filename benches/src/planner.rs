//! From SQL to engine items without a service around: the statement walk on a catalog picture of ours.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use millrace_dataflow::engine::{SourceItem, ViewItem};
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::source::Source;
use millrace_sql::bind::{Bound, bind};
use millrace_sql::catalog::{CatalogPicture, Item, LakeName, SourceItem as CatalogSource};
use millrace_sql::guard::{Policy, guard};
use millrace_sql::lower::lower;
use millrace_sql::parse::{Options, parse};
use millrace_sql::purify::{Discovered, Facts, purify};

struct Connectors;

#[async_trait]
impl Facts for Connectors {
    async fn discover_source(
        &self,
        connector: &str,
        options: &Options,
        declared: &SchemaRef,
    ) -> millrace_dataflow::error::Result<Discovered> {
        let source = millrace_connectors::create(connector, options, declared)?;
        Ok(Discovered {
            schema: Some(source.schema()),
            event_time: Some(("date_time".into(), 0)),
            append_only: source.append_only(),
            bounded: source.bounded(),
            any_event_time: source.any_event_time(),
        })
    }
    async fn lake_table(
        &self,
        _name: &LakeName,
    ) -> millrace_dataflow::error::Result<Option<SchemaRef>> {
        Ok(None)
    }
}

/// Plans statements one after the other.
#[derive(Debug, Default)]
pub(crate) struct Planner {
    picture: CatalogPicture,
    next: u64,
}

impl Planner {
    fn id(&mut self) -> RelationId {
        self.next += 1;
        RelationId(self.next)
    }

    async fn bound(&self, statement: &str) -> Result<Bound> {
        let mut script = parse(statement);
        if let Some(e) = script.error {
            bail!("{e}");
        }
        let parsed = script.statements.pop().context("one statement")?;
        let purified = purify(parsed, &Connectors).await?;
        Ok(bind(purified, &Arc::new(self.picture.clone()), &[])?)
    }

    /// `CREATE SOURCE`; `replace` may put another source behind it.
    pub(crate) async fn source(
        &mut self,
        statement: &str,
        replace: impl FnOnce(Arc<dyn Source>) -> Result<Arc<dyn Source>>,
    ) -> Result<SourceItem> {
        let Bound::CreateSource(def) = self.bound(statement).await? else {
            bail!("a source")
        };
        let source = millrace_connectors::create(&def.connector, &def.options, &def.physical)?;
        let source = replace(source)?;
        let (id, rejected) = (self.id(), self.id());
        let item = CatalogSource {
            id,
            schema: Arc::clone(&def.plan.schema),
            event_time: def.event_time.clone(),
            append_only: def.append_only,
            bounded: def.bounded,
            text: def.text.clone(),
            system: Vec::new(),
        };
        self.picture
            .items
            .insert(def.name.clone(), Item::Source(item));
        Ok(SourceItem {
            id,
            name: def.name,
            source,
            plan: def.plan,
            rejected,
            idle_timeout: Duration::from_secs(10),
        })
    }

    /// A view over what was planned before.
    pub(crate) async fn view(&mut self, name: &str, query: &str) -> Result<ViewItem> {
        let statement = format!("CREATE MATERIALIZED VIEW {name} AS {query}");
        let Bound::CreateMaterializedView(def) = self.bound(&statement).await? else {
            bail!("a view")
        };
        let lowered = lower(&guard(def.query, &Policy)?)?;
        let (id, errors, late) = (self.id(), self.id(), self.id());
        Ok(ViewItem {
            id,
            dataflow: id,
            name: name.to_string(),
            plan: lowered.plan,
            errors,
            late,
        })
    }
}

/// Options of the generator for one table of the benchmark.
pub(crate) fn generator(table: &str, events: u64) -> String {
    format!(
        "CREATE SOURCE {table} WITH (connector = 'generator', kind = 'nexmark', table = '{table}', seed = 1, max_events = {events})"
    )
}
