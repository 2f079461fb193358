//! From a bound statement to what the catalog stores and the engine runs.
//!
//! Used when something is created and again at every start, so that both give the same: `draft`
//! plans, without I/O; [`connect`] builds the connectors and sinks and gives everything its ids.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use millrace_dataflow::engine::{Item, SinkItem, SourceItem, ViewItem};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::kernel::{errors_schema, nullable};
use millrace_dataflow::plan::{Op, Plan, RelationId};
use millrace_dataflow::served::rejected_schema;
use millrace_sql::bind::{Bound, SinkDef, SourceDef, ViewDef};
use millrace_sql::catalog as sql;
use millrace_sql::catalog::{LakeName, SystemRelation};
use millrace_sql::guard::{Policy, guard};
use millrace_sql::lower::{Lowered, lower};
use millrace_sql::parse::{Options, SinkTarget};

use super::facts::{Missing, Outside};
use super::world::{Detail, Entry, Made};
use crate::catalog::{Kind, Object};

/// A planned object, without ids.
#[derive(Debug)]
pub(super) struct Draft {
    pub name: String,
    pub text: String,
    pub depends_on: Vec<String>,
    pub fingerprint: String,
    pub notices: Vec<String>,
    /// Lake tables that the statement names.
    pub lake: LakeSchemas,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Source(SourceDef),
    View(ViewDef),
    MaterializedView {
        lowered: Lowered,
        schema: SchemaRef,
        published: Option<LakeName>,
        options: Options,
    },
    Sink(SinkDef),
}

impl Draft {
    /// Columns of a materialized view.
    pub(super) fn columns(&self) -> Option<&SchemaRef> {
        match &self.body {
            Body::MaterializedView { schema, .. } => Some(schema),
            _ => None,
        }
    }
    /// Options of the table that a materialized view is published as.
    pub(super) fn options(&self) -> Option<&Options> {
        match &self.body {
            Body::MaterializedView { options, .. } => Some(options),
            _ => None,
        }
    }
    /// The table of the lake that is written to.
    pub(super) fn table(&self) -> Option<&LakeName> {
        match &self.body {
            Body::MaterializedView { published, .. } => published.as_ref(),
            Body::Sink(SinkDef {
                target: SinkTarget::Lake(name),
                ..
            }) => Some(name),
            _ => None,
        }
    }
}

/// Columns of lake tables, as they were when a statement was purified.
pub(super) type LakeSchemas = BTreeMap<LakeName, SchemaRef>;

/// Plans a statement that creates something.
pub(super) fn draft(bound: Bound, lake: LakeSchemas, policy: &Policy) -> Result<Draft> {
    match bound {
        Bound::CreateSource(def) => Ok(Draft {
            name: def.name.clone(),
            text: def.text.clone(),
            depends_on: Vec::new(),
            fingerprint: fingerprint(&def.plan.schema),
            notices: Vec::new(),
            lake,
            body: Body::Source(def),
        }),
        Bound::CreateView(def) => Ok(Draft {
            name: def.name.clone(),
            text: def.text.clone(),
            depends_on: owners(&def.depends_on),
            fingerprint: fingerprint(&def.schema),
            notices: Vec::new(),
            lake,
            body: Body::View(def),
        }),
        Bound::CreateMaterializedView(def) => {
            let guarded = guard(def.query, policy)?;
            let lowered = lower(&guarded)?;
            Ok(Draft {
                name: def.name,
                text: def.text,
                depends_on: owners(&def.depends_on),
                fingerprint: format!("{:016x}", lowered.plan.fingerprint),
                notices: lowered.notices.clone(),
                lake,
                body: Body::MaterializedView {
                    // A failing expression can leave nulls where none were declared.
                    schema: nullable(lowered.plan.schema()),
                    lowered,
                    published: def.lake,
                    options: def.options,
                },
            })
        }
        Bound::CreateSink(def) => Ok(Draft {
            name: def.name.clone(),
            text: def.text.clone(),
            depends_on: vec![base_name(&def.from).to_string()],
            fingerprint: fingerprint(&def.schema),
            notices: Vec::new(),
            lake,
            body: Body::Sink(def),
        }),
        other => Err(Error::internal(format!(
            "not a statement that creates something: {other:?}"
        ))),
    }
}

/// The objects that own what a statement reads, each once.
fn owners(relations: &[String]) -> Vec<String> {
    let owners: BTreeSet<&str> = relations.iter().map(|name| base_name(name)).collect();
    owners.into_iter().map(str::to_string).collect()
}

/// The object that owns a relation: `bids` of `bids$rejected`.
pub(super) fn base_name(relation: &str) -> &str {
    relation.split_once('$').map_or(relation, |(base, _)| base)
}

/// A short text that differs when columns differ.
fn fingerprint(schema: &SchemaRef) -> String {
    let fields: Vec<String> = schema
        .fields()
        .iter()
        .map(|f| format!("{} {}", f.name(), f.data_type()))
        .collect();
    fields.join(", ")
}

/// How many ids a draft needs.
pub(super) fn ids_needed(draft: &Draft) -> u64 {
    match &draft.body {
        Body::Source(_) => 2,
        Body::View(_) | Body::Sink(_) => 1,
        Body::MaterializedView { published, .. } => 3 + u64::from(published.is_some()),
    }
}

/// The row of a draft with consecutive ids that start at `first`.
pub(super) fn object(draft: &Draft, first: RelationId, created_ms: u64) -> Object {
    let id = |n: u64| Some(RelationId(first.0 + n));
    let (kind, rejected, errors, late, companion) = match &draft.body {
        Body::Source(_) => (Kind::Source, id(1), None, None, None),
        Body::View(_) => (Kind::View, None, None, None, None),
        Body::Sink(_) => (Kind::Sink, None, None, None, None),
        Body::MaterializedView { published, .. } => {
            let companion = published.as_ref().and_then(|_| id(3));
            (Kind::MaterializedView, None, id(1), id(2), companion)
        }
    };
    Object {
        id: first,
        kind,
        name: draft.name.clone(),
        text: draft.text.clone(),
        rejected,
        errors,
        late,
        companion,
        depends_on: draft.depends_on.clone(),
        fingerprint: draft.fingerprint.clone(),
        created_ms,
        dataflow: first,
        seen: BTreeMap::new(),
    }
}

/// Asks the outside whether a new object can work.
pub(super) async fn validate(draft: &Draft, outside: &Outside) -> Result<()> {
    match &draft.body {
        Body::Source(def) => {
            outside
                .validate(&def.connector, &def.options, &def.physical)
                .await
        }
        _ => Ok(()),
    }
}

/// Builds what the engine runs.
pub(super) async fn connect(
    draft: Draft,
    object: Object,
    outside: &Outside,
    missing: Missing,
) -> Result<Made> {
    let (detail, picture, items) = match draft.body {
        Body::Source(def) => source(def, &object, outside)?,
        Body::View(def) => {
            let picture = sql::Item::View(sql::ViewItem { text: def.text });
            (
                Detail::View {
                    schema: def.schema,
                    lake: draft.lake,
                },
                picture,
                Vec::new(),
            )
        }
        Body::MaterializedView {
            lowered,
            schema,
            published,
            options,
        } => {
            let published = published.map(|lake| (lake, missing));
            view(lowered, schema, published, &options, &object, outside).await?
        }
        Body::Sink(def) => sink(def, &object, outside, missing).await?,
    };
    Ok(Made {
        entry: Entry {
            object,
            failed: None,
            detail,
        },
        picture,
        items,
    })
}

type Parts = (Detail, sql::Item, Vec<Item>);

fn source(def: SourceDef, object: &Object, outside: &Outside) -> Result<Parts> {
    let (source, idle_timeout) = outside.source(&def.connector, &def.options, &def.physical)?;
    let rejected = need(object.rejected, object)?;
    let item = SourceItem {
        id: object.id,
        name: object.name.clone(),
        source: Arc::clone(&source),
        plan: def.plan.clone(),
        rejected,
        idle_timeout,
    };
    let picture = sql::Item::Source(sql::SourceItem {
        id: object.id,
        schema: nullable(&def.plan.schema),
        event_time: def.event_time,
        append_only: def.append_only,
        bounded: def.bounded,
        text: def.text,
        system: vec![SystemRelation {
            suffix: "rejected".to_string(),
            id: rejected,
            schema: rejected_schema(),
            append_only: true,
        }],
    });
    let detail = Detail::Source {
        connector: def.connector,
        plan: def.plan,
        source,
    };
    Ok((detail, picture, vec![Item::Source(item)]))
}

async fn view(
    lowered: Lowered,
    schema: SchemaRef,
    lake: Option<(LakeName, Missing)>,
    options: &Options,
    object: &Object,
    outside: &Outside,
) -> Result<Parts> {
    let append_only = lowered.plan.append_only;
    let (errors, late) = (need(object.errors, object)?, need(object.late, object)?);
    let mut system = vec![SystemRelation {
        suffix: "errors".to_string(),
        id: errors,
        schema: errors_schema(),
        append_only: false,
    }];
    if let Some(schema) = late_schema(&lowered.plan) {
        system.push(SystemRelation {
            suffix: "late".to_string(),
            id: late,
            schema,
            append_only: false,
        });
    }
    let mut items = vec![Item::View(ViewItem {
        id: object.id,
        dataflow: object.dataflow,
        name: object.name.clone(),
        plan: lowered.plan,
        errors,
        late,
    })];
    if let Some((lake, missing)) = lake {
        let id = need(object.companion, object)?;
        let (sink, commit_interval) = outside
            .lake_sink(&lake, missing, id, &schema, append_only, options)
            .await?;
        items.push(Item::Sink(SinkItem {
            id,
            name: object.name.clone(),
            from: object.id,
            columns: schema.fields().len(),
            sink,
            commit_interval,
        }));
    }
    let picture = sql::Item::MaterializedView(sql::ViewRelation {
        id: object.id,
        schema: Arc::clone(&schema),
        event_time: lowered.event_time,
        append_only,
        text: object.text.clone(),
        system,
    });
    Ok((
        Detail::MaterializedView {
            schema,
            append_only,
        },
        picture,
        items,
    ))
}

async fn sink(def: SinkDef, object: &Object, outside: &Outside, missing: Missing) -> Result<Parts> {
    let (sink, commit_interval, into) = match &def.target {
        SinkTarget::Lake(lake) => {
            let (sink, interval) = outside
                .lake_sink(
                    lake,
                    missing,
                    object.id,
                    &def.schema,
                    def.append_only,
                    &def.options,
                )
                .await?;
            (sink, interval, lake.to_string())
        }
        SinkTarget::Blackhole => (
            outside.blackhole(&def.options)?,
            None,
            "blackhole".to_string(),
        ),
    };
    let item = Item::Sink(SinkItem {
        id: object.id,
        name: object.name.clone(),
        from: def.relation,
        columns: def.schema.fields().len(),
        sink,
        commit_interval,
    });
    let picture = sql::Item::Sink(sql::SinkItem {
        text: def.text,
        from: base_name(&def.from).to_string(),
    });
    Ok((
        Detail::Sink {
            from: def.from,
            into,
        },
        picture,
        vec![item],
    ))
}

/// Columns of the rows that come too late for a plan: what its first closing aggregate reads.
fn late_schema(plan: &Plan) -> Option<SchemaRef> {
    plan.nodes.iter().find_map(|node| match &node.op {
        Op::Aggregate {
            input,
            close: Some(_),
            ..
        } => Some(nullable(&plan.nodes[*input].schema)),
        _ => None,
    })
}

fn need(id: Option<RelationId>, object: &Object) -> Result<RelationId> {
    id.ok_or_else(|| {
        Error::new(
            millrace_dataflow::error::ErrorKind::Corrupt,
            format!("the catalog row of \"{}\" lacks an id", object.name),
        )
    })
}
