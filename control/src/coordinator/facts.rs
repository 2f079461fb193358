//! The outside as statements see it: connectors, the lake, sinks.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::TableProvider;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::sink::Sink;
use millrace_dataflow::source::Source;
use millrace_lake::{LakeTable, SqlCatalog, TableName};
use millrace_sinks::{BlackholeSink, IcebergOptions, IcebergSink, RefusedSink};
use millrace_sql::catalog::LakeName;
use millrace_sql::parse::Options;
use millrace_sql::purify::{Discovered, Facts};

use crate::config::parse_duration;

/// The generator's column of event time.
const EVENT_TIME: &str = "date_time";
/// A split that is silent this long does not hold back the watermark, unless the source says otherwise.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Outside {
    pub lake: Arc<SqlCatalog>,
}

/// What becomes of a table that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// It is made, with the sink.
    Create,
    /// The sink is an old one: its table was dropped behind its back, and an empty one in its place would
    /// only hide that.
    Fail,
}

/// The lake's own form of a name.
pub(super) fn table_name(name: &LakeName) -> Result<TableName> {
    TableName::new(name.namespace.join("."), name.table.clone())
}

/// The connector's options, and those of every source that the engine minds.
fn engine_options(options: &Options) -> Result<(Options, Duration)> {
    let mut options = options.clone();
    let idle_timeout = match options.remove("idle_timeout") {
        Some(text) => duration_option("idle_timeout", &text)?,
        None => IDLE_TIMEOUT,
    };
    Ok((options, idle_timeout))
}

/// A duration among the options of a statement.
pub(super) fn duration_option(name: &str, text: &str) -> Result<Duration> {
    let range = Duration::from_millis(10)..=Duration::from_secs(86_400);
    parse_duration(name, text)
        .ok()
        .filter(|duration| range.contains(duration))
        .ok_or_else(|| {
            Error::invalid(format!(
                "option \"{name}\" is not a duration from 10ms to 1d: '{}'",
                text.escape_default()
            ))
            .hint("write it as '500ms', '10s' or '1m'")
        })
}

impl Outside {
    /// A configured connector, and how long a silent split of it holds back the watermark.
    pub(super) fn source(
        &self,
        connector: &str,
        options: &Options,
        physical: &SchemaRef,
    ) -> Result<(Arc<dyn Source>, Duration)> {
        let (options, idle_timeout) = engine_options(options)?;
        let source = millrace_connectors::create(connector, &options, physical)?;
        Ok((source, idle_timeout))
    }

    /// Asks the outside whether a source can be read; at its creation only, because a server starts
    /// again while a broker is away.
    pub(super) async fn validate(
        &self,
        connector: &str,
        options: &Options,
        physical: &SchemaRef,
    ) -> Result<()> {
        let (options, _) = engine_options(options)?;
        millrace_connectors::validate(connector, &options, physical).await
    }

    /// A sink into a lake table.
    pub(super) async fn lake_sink(
        &self,
        name: &LakeName,
        missing: Missing,
        id: RelationId,
        schema: &SchemaRef,
        append_only: bool,
        options: &Options,
    ) -> Result<(Arc<dyn Sink>, Option<Duration>)> {
        let options = IcebergOptions::parse(options)?;
        if !append_only && !options.changelog {
            return Err(Error::unsupported(format!(
                "\"{name}\" cannot take rows that change later"
            ))
            .detail("an append-only table would keep rows that were taken back")
            .hint(
                "use EMIT ON WINDOW CLOSE where windows are final, or WITH (changelog = 'op') \
                 to append each change with its sign and tick",
            ));
        }
        let interval = options.commit_interval;
        let table = table_name(name)?;
        let lake = Arc::clone(&self.lake);
        match missing {
            Missing::Create => {
                let sink = IcebergSink::create(lake, &table, id, schema, options).await?;
                Ok((sink, interval))
            }
            Missing::Fail => {
                let changelog = options.changelog;
                match IcebergSink::open(lake, &table, id, schema, options).await {
                    Ok(sink) => Ok((sink, interval)),
                    // The sink fails, not the view that is published through it.
                    Err(e) if e.kind == ErrorKind::NotFound => {
                        Ok((RefusedSink::new(e, changelog), interval))
                    }
                    Err(e) => Err(e),
                }
            }
        }
    }

    /// How often a sink into the lake with these options commits.
    pub(super) fn commit_interval(&self, options: &Options) -> Result<Option<Duration>> {
        Ok(IcebergOptions::parse(options)?.commit_interval)
    }

    /// The sink that counts and drops.
    pub(super) fn blackhole(&self, options: &Options) -> Result<Arc<dyn Sink>> {
        Ok(BlackholeSink::from_options(options)?)
    }

    /// A reader of the current snapshot of a lake table, and the snapshot's id.
    pub(super) async fn lake_reader(
        &self,
        name: &LakeName,
    ) -> Result<(Arc<dyn TableProvider>, Option<i64>)> {
        let table = LakeTable::open(Arc::clone(&self.lake), &table_name(name)?).await?;
        let snapshot = table.snapshot_id();
        Ok((table, snapshot))
    }

    /// Whether `lake.ns.t` is in the catalog.
    pub(super) async fn table_exists(&self, name: &str) -> Result<bool> {
        self.lake
            .table_exists(&table_name(&LakeName::parse(name)?)?)
            .await
    }

    /// Rows that `lake.ns.t` has now.
    pub(super) async fn table_rows(&self, name: &str) -> Result<u64> {
        let name = table_name(&LakeName::parse(name)?)?;
        let table = LakeTable::open(Arc::clone(&self.lake), &name).await?;
        table.row_count().await
    }

    /// Takes `lake.ns.t` from the catalog; with `purge` its files go too.
    pub(super) async fn drop_table(&self, name: &str, purge: bool) -> Result<bool> {
        self.lake
            .drop_table(&table_name(&LakeName::parse(name)?)?, purge)
            .await
    }
}

#[async_trait]
impl Facts for Outside {
    async fn discover_source(
        &self,
        connector: &str,
        options: &Options,
        declared: &SchemaRef,
    ) -> Result<Discovered> {
        let (source, _) = self.source(connector, options, declared)?;
        let schema = source.schema();
        // The generator's events come with a time that is in order up to what the options say.
        let event_time =
            (connector == "generator" && schema.index_of(EVENT_TIME).is_ok()).then(|| {
                let jitter_ms = options
                    .get("out_of_order_ms")
                    .and_then(|ms| ms.trim().parse::<i64>().ok());
                (
                    EVENT_TIME.to_string(),
                    jitter_ms.unwrap_or(0).saturating_mul(1_000),
                )
            });
        Ok(Discovered {
            schema: Some(schema),
            event_time,
            append_only: source.append_only(),
            bounded: source.bounded(),
            any_event_time: source.any_event_time(),
        })
    }

    async fn lake_table(&self, name: &LakeName) -> Result<Option<SchemaRef>> {
        match self.lake.load_table(&table_name(name)?).await {
            Ok(version) => {
                let schema = version.metadata.current_schema();
                Ok(Some(millrace_lake::schema::to_arrow(schema)?))
            }
            Err(e) if e.kind == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}
