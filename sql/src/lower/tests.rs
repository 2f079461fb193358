//! Statement in, plan out. The cases stand in `sql/tests/plans/*.txt`.

use std::fmt::Write;

use millrace_dataflow::plan::{Emit, Op};

use crate::testing::{bound, lowered, shown};
use crate::{Bound, Policy, explain, explain_plan};

/// One case: what is asked, up to `----`, and the answer, up to `====`.
fn cases(file: &str) -> Vec<(String, String)> {
    file.split("====\n")
        .filter(|c| !c.trim().is_empty())
        .map(|c| {
            let (ask, answer) = c.split_once("----\n").unwrap_or((c, ""));
            (ask.trim().to_string(), answer.trim_end().to_string())
        })
        .collect()
}

fn answer(ask: &str) -> String {
    match bound(ask, &[]) {
        Err(error) => shown(&error),
        Ok(Bound::CreateMaterializedView(_)) => match lowered(ask.trim_end_matches(';')) {
            Err(error) => shown(&error),
            Ok(lowered) => {
                let mut text = explain_plan(&lowered.plan);
                let timed: Vec<String> = lowered
                    .plan
                    .schema()
                    .fields()
                    .iter()
                    .zip(&lowered.event_time)
                    .filter_map(|(f, e)| Some(format!("{}+{}", f.name(), (*e)?)))
                    .collect();
                if !timed.is_empty() {
                    let _ = write!(text, "\nevent time {}", timed.join(", "));
                }
                for notice in &lowered.notices {
                    let _ = write!(text, "\nnotice: {notice}");
                }
                text
            }
        },
        Ok(Bound::Explain(def)) => match explain(def, &Policy) {
            Err(error) => shown(&error),
            Ok(text) => text,
        },
        Ok(Bound::CreateSource(def)) => {
            let mut text = format!("source {} connector {}", def.name, def.connector);
            for (field, expr) in def.plan.schema.fields().iter().zip(&def.plan.columns) {
                let _ = write!(
                    text,
                    "\n  {} {} = {expr}",
                    field.name(),
                    crate::sql_name(field.data_type())
                );
            }
            if let Some(w) = &def.plan.watermark {
                let _ = write!(
                    text,
                    "\n  watermark #{} = {}, ahead {:?}",
                    w.column, w.expr, w.max_ahead_us
                );
            }
            text
        }
        Ok(Bound::CreateSink(def)) => format!(
            "sink {} from {} ({}) into {:?} {:?}",
            def.name, def.from, def.relation, def.target, def.options
        ),
        Ok(Bound::CreateView(def)) => format!("view {} on {:?}", def.name, def.depends_on),
        Ok(Bound::Query(query)) => {
            let columns: Vec<String> = query
                .schema()
                .fields()
                .iter()
                .map(|f| format!("{} {}", f.name(), crate::sql_name(f.data_type())))
                .collect();
            format!("query ({})", columns.join(", "))
        }
        Ok(other) => format!("{other:?}"),
    }
}

fn check(name: &str, file: &str) {
    let mut actual = String::new();
    let mut wrong = Vec::new();
    for (ask, expected) in cases(file) {
        let got = answer(&ask);
        let _ = writeln!(actual, "{ask}\n----\n{got}\n====");
        assert!(!got.contains("likely caused by a bug"), "{ask}: {got}");
        if got != expected {
            wrong.push(format!("{ask}\n--- expected\n{expected}\n--- got\n{got}\n"));
        }
    }
    if !wrong.is_empty() {
        let path = std::env::temp_dir().join(format!("millrace-plans-{name}"));
        std::fs::write(&path, actual).expect("the temporary directory takes files");
        panic!(
            "{} cases differ; all answers are in {}\n\n{}",
            wrong.len(),
            path.display(),
            wrong.join("\n")
        );
    }
}

#[test]
fn views_lower_as_written_down() {
    check("views.txt", include_str!("../../tests/plans/views.txt"));
}

#[test]
fn refusals_say_why_and_what_to_do() {
    check("refused.txt", include_str!("../../tests/plans/refused.txt"));
}

#[test]
fn statements_bind_as_written_down() {
    check(
        "statements.txt",
        include_str!("../../tests/plans/statements.txt"),
    );
}

#[test]
fn the_fingerprint_depends_on_the_plan_and_on_nothing_else() {
    let of = |sql: &str| lowered(sql).expect("a plan").plan.fingerprint;
    let base = of(
        "CREATE MATERIALIZED VIEW v AS SELECT auction, count(*) AS n FROM bids GROUP BY auction",
    );
    let spaced = of(
        "create materialized view w as select auction, count(*) as n\n from bids\n group by auction",
    );
    let other = of(
        "CREATE MATERIALIZED VIEW v AS SELECT bidder AS auction, count(*) AS n FROM bids GROUP BY bidder",
    );
    assert_eq!(base, spaced);
    assert_ne!(base, other);
}

#[test]
fn nodes_stand_in_topological_order_and_the_result_is_last() {
    let plan = lowered(
        "CREATE MATERIALIZED VIEW v AS SELECT a.auction, b.n FROM TUMBLE(bids, at, INTERVAL '10' SECOND) a \
         JOIN hot b ON a.window_end = b.window_end AND a.auction = b.auction",
    )
    .expect("a plan")
    .plan;
    for (id, node) in plan.nodes.iter().enumerate() {
        let inputs = match &node.op {
            Op::Input { .. } | Op::Values { .. } => vec![],
            Op::Map { input, .. }
            | Op::Window { input, .. }
            | Op::Expand { input, .. }
            | Op::Aggregate { input, .. } => {
                vec![*input]
            }
            Op::Join { left, right, .. }
            | Op::SemiJoin { left, right, .. }
            | Op::CountedSet { left, right, .. } => {
                vec![*left, *right]
            }
            Op::Recompute { inputs, .. } | Op::Union { inputs } => inputs.clone(),
        };
        assert!(inputs.iter().all(|i| *i < id));
    }
    assert_eq!(plan.schema().field(1).name(), "n");
}

#[test]
fn on_close_every_aggregate_emits_on_close() {
    let plan = lowered(
        "CREATE MATERIALIZED VIEW v WITH (allowed_lateness = '5 s') AS \
         SELECT window_end, max(n) AS m FROM (SELECT auction, window_end, count(*) AS n \
         FROM HOP(bids, at, INTERVAL '2' SECOND, INTERVAL '10' SECOND) GROUP BY auction, window_end) x \
         GROUP BY window_end EMIT ON WINDOW CLOSE",
    )
    .expect("a plan")
    .plan;
    let closes: Vec<(i64, Emit)> = plan
        .nodes
        .iter()
        .filter_map(|n| match &n.op {
            Op::Aggregate { close, emit, .. } => Some((close.expect("closes").delay_us, *emit)),
            _ => None,
        })
        .collect();
    // The outer one waits as much longer as the inner one is allowed to.
    assert_eq!(closes, vec![(0, Emit::OnClose), (5_000_000, Emit::OnClose)]);
    assert!(plan.append_only);
}

#[test]
fn an_aggregate_reads_its_window_directly() {
    let plan = lowered(
        "CREATE MATERIALIZED VIEW v AS SELECT window_end, auction, count(*) AS n, max(price) AS top \
         FROM HOP(bids, at, INTERVAL '2' SECOND, INTERVAL '10' SECOND) GROUP BY auction, window_end",
    )
    .expect("a plan")
    .plan;
    let aggregate = plan.nodes.iter().find_map(|n| match &n.op {
        Op::Aggregate {
            input, keys, calls, ..
        } => Some((*input, keys, calls)),
        _ => None,
    });
    let (input, keys, calls) = aggregate.expect("an aggregate");
    assert!(matches!(plan.nodes[input].op, Op::Window { .. }));
    let below = &plan.nodes[input].schema;
    let names: Vec<&str> = keys
        .iter()
        .map(|k| below.field(*k).name().as_str())
        .collect();
    assert_eq!(names, ["auction", "window_end"]);
    let top = calls
        .iter()
        .find_map(|call| call.input)
        .expect("max reads a column");
    assert_eq!(below.field(top).name(), "price");
}

#[test]
fn a_statement_has_the_same_fingerprint_every_time() {
    let ask = "CREATE MATERIALIZED VIEW v AS SELECT auction FROM bids b \
               WHERE bidder NOT IN (SELECT k FROM changes) \
               AND price > (SELECT avg(price) FROM bids c WHERE c.auction = b.auction)";
    let first = lowered(ask).expect("a plan").plan.fingerprint;
    assert_eq!(lowered(ask).expect("a plan").plan.fingerprint, first);
}
