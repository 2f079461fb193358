//! A small market to test against: sources, views, tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::ScalarValue;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;

use crate::catalog::{
    CatalogPicture, Item, LakeName, SinkItem, SourceItem, SystemRelation, ViewItem, ViewRelation,
};
use crate::purify::Purified;
use crate::types::timestamp;
use crate::{Bound, Discovered, Lowered, Parsed, Policy, bind, guard, lower, parse, parse_one};

pub(crate) fn schema(columns: &[(&str, DataType)]) -> SchemaRef {
    let fields: Vec<Field> = columns
        .iter()
        .map(|(n, t)| Field::new(*n, t.clone(), true))
        .collect();
    Arc::new(Schema::new(fields))
}

fn system(id: u64, suffix: &str, append_only: bool) -> SystemRelation {
    SystemRelation {
        suffix: suffix.into(),
        id: RelationId(id),
        schema: schema(&[("reason", DataType::Utf8), ("bytes", DataType::Binary)]),
        append_only,
    }
}

fn source(id: u64, columns: &[(&str, DataType)], append_only: bool, bounded: bool) -> Item {
    let schema = schema(columns);
    let event_time = schema
        .fields()
        .iter()
        .map(|f| (f.name() == "at").then_some(1))
        .collect();
    Item::Source(SourceItem {
        id: RelationId(id),
        schema,
        event_time,
        append_only,
        bounded,
        text: String::new(),
        system: vec![system(id + 100, "rejected", true)],
    })
}

pub(crate) const BID_COLUMNS: [(&str, DataType); 4] = [
    ("auction", DataType::Int64),
    ("bidder", DataType::Int64),
    ("price", DataType::Int64),
    (
        "at",
        DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, None),
    ),
];

/// Sources `bids`, `auctions`, `sales` (bounded), `changes` (bounded, retracting); views over them.
pub(crate) fn market() -> CatalogPicture {
    let mut picture = CatalogPicture::default();
    let mut add = |name: &str, item: Item| picture.items.insert(name.to_string(), item);
    add("bids", source(1, &BID_COLUMNS, true, false));
    add(
        "auctions",
        source(
            2,
            &[
                ("id", DataType::Int32),
                ("item", DataType::Utf8),
                ("category", DataType::Int32),
                ("reserve", DataType::Decimal128(18, 2)),
                ("at", timestamp()),
            ],
            true,
            false,
        ),
    );
    add(
        "sales",
        source(
            3,
            &[
                ("id", DataType::Int64),
                ("x", DataType::Int64),
                ("y", DataType::Int64),
                ("f", DataType::Float64),
                ("name", DataType::Utf8),
                ("at", timestamp()),
            ],
            true,
            true,
        ),
    );
    add(
        "changes",
        source(
            4,
            &[
                ("k", DataType::Int64),
                ("v", DataType::Int64),
                ("at", timestamp()),
            ],
            false,
            true,
        ),
    );
    add(
        "dear",
        Item::View(ViewItem {
            text: "CREATE VIEW dear AS SELECT auction, price AS amount, at FROM bids WHERE price > 100".into(),
        }),
    );
    add(
        "hot",
        Item::MaterializedView(ViewRelation {
            id: RelationId(10),
            schema: schema(&[
                ("auction", DataType::Int64),
                ("window_end", timestamp()),
                ("n", DataType::Int64),
            ]),
            event_time: vec![None, Some(0), None],
            append_only: true,
            text: "CREATE MATERIALIZED VIEW hot AS SELECT auction, window_end, count(*) AS n FROM TUMBLE(bids, at, INTERVAL '10' SECOND) GROUP BY auction, window_end EMIT ON WINDOW CLOSE".into(),
            system: vec![system(11, "errors", false), system(12, "late", false)],
        }),
    );
    add(
        "totals",
        Item::MaterializedView(ViewRelation {
            id: RelationId(20),
            schema: schema(&[("auction", DataType::Int64), ("total", DataType::Decimal128(38, 0))]),
            event_time: vec![None, None],
            append_only: false,
            text: "CREATE MATERIALIZED VIEW totals AS SELECT auction, sum(price) AS total FROM bids GROUP BY auction".into(),
            system: vec![system(21, "errors", false)],
        }),
    );
    add(
        "out",
        Item::Sink(SinkItem {
            text: String::new(),
            from: "hot".into(),
        }),
    );
    picture.lake.insert(
        LakeName::parse("lake.market.prices").expect("a name"),
        schema(&[
            ("auction", DataType::Int64),
            ("price", DataType::Decimal128(18, 2)),
        ]),
    );
    picture
}

/// Facts as a test gives them.
pub(crate) fn purified(parsed: Parsed) -> Purified {
    Purified {
        source: Some(Discovered {
            append_only: true,
            ..Discovered::default()
        }),
        lake: BTreeMap::new(),
        parsed,
    }
}

pub(crate) fn bound(sql: &str, params: &[ScalarValue]) -> Result<Bound> {
    let mut script = parse(sql);
    match (script.error, script.statements.pop()) {
        (Some(error), _) => Err(error),
        (None, Some(parsed)) => bind(purified(parsed), &market(), params),
        (None, None) => Err(Error::invalid("nothing to parse")),
    }
}

pub(crate) fn lowered(sql: &str) -> Result<Lowered> {
    let parsed = parse_one(sql)?;
    match bind(purified(parsed), &market(), &[])? {
        Bound::CreateMaterializedView(def) => lower(&guard(def.query, &Policy)?),
        other => panic!("not a view: {other:?}"),
    }
}

/// An error as a test writes it.
pub(crate) fn shown(error: &Error) -> String {
    let mut text = format!("error {}: {}", error.code, error.message);
    if let Some(position) = error.position {
        text.push_str(&format!(" at {position}"));
    }
    if let Some(detail) = &error.detail {
        text.push_str(&format!("\n  detail: {detail}"));
    }
    if let Some(hint) = &error.hint {
        text.push_str(&format!("\n  hint: {hint}"));
    }
    text
}
