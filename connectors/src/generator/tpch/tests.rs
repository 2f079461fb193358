use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use arrow::datatypes::Schema;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use millrace_dataflow::source::{Offsets, Polled, Source};

use super::super::{GeneratorSource, INFO, SPLIT};
use super::*;
use crate::options::Options;

fn try_source(options: &[(&str, &str)]) -> Result<GeneratorSource> {
    let mut map: BTreeMap<String, String> = options
        .iter()
        .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
        .collect();
    map.entry("kind".into()).or_insert("tpch".into());
    GeneratorSource::new(&Options::new(&INFO, &map).unwrap(), &Schema::empty())
}

fn source(table: &str, more: &[(&str, &str)]) -> GeneratorSource {
    let mut options = vec![("table", table)];
    options.extend_from_slice(more);
    try_source(&options).unwrap()
}

fn from(offset: u64) -> Offsets {
    Offsets([(SPLIT.to_string(), offset)].into())
}

/// Rows from `start` on as texts with their diffs, each with the offset after its chunk.
fn rows(source: &GeneratorSource, start: u64) -> Vec<(Vec<String>, i64)> {
    let all: Vec<usize> = (0..source.schema().fields().len()).collect();
    let mut reader = source.open(&from(start), &all).unwrap().remove(0);
    let mut rows = Vec::new();
    let mut at = start;
    loop {
        match reader.poll(None, Duration::ZERO).unwrap() {
            Polled::Chunk(chunk) => {
                assert_eq!(chunk.begin, at);
                at = chunk.end;
                let count = chunk.batch.num_rows();
                let diffs = chunk.diffs.unwrap_or(vec![1; count]);
                assert_eq!(diffs.len(), count);
                rows.extend(texts(&chunk.batch).into_iter().zip(diffs));
            }
            Polled::End => return rows,
            other => panic!("{other:?}"),
        }
    }
}

fn texts(batch: &RecordBatch) -> Vec<Vec<String>> {
    let options = FormatOptions::default();
    let columns: Vec<_> = batch
        .columns()
        .iter()
        .map(|c| ArrayFormatter::try_new(c.as_ref(), &options).unwrap())
        .collect();
    let row = |row| columns.iter().map(|c| c.value(row).to_string()).collect();
    (0..batch.num_rows()).map(row).collect()
}

/// What is there after all refreshes: every row once.
fn live(source: &GeneratorSource) -> Vec<Vec<String>> {
    let mut counts: HashMap<Vec<String>, i64> = HashMap::new();
    for (row, diff) in rows(source, 0) {
        let count = counts.entry(row).or_default();
        *count += diff;
        assert!((0..=1).contains(count), "comes once, before it goes");
    }
    let there = counts.into_iter().filter(|(_, count)| *count == 1);
    let mut there: Vec<_> = there.map(|(row, _)| row).collect();
    there.sort();
    there
}

fn long(text: &str) -> i64 {
    text.parse().unwrap()
}

/// 12.34 as 1234.
fn cents(text: &str) -> i64 {
    long(&text.replace('.', ""))
}

#[test]
fn any_offset_can_be_started_at() {
    for table in Table::NAMES {
        let refreshed = [("seed", "5"), ("refreshes", "3")];
        let whole = rows(&source(table, &refreshed), 0);
        let small = source(
            table,
            &[("seed", "5"), ("refreshes", "3"), ("batch_size", "13")],
        );
        assert_eq!(whole, rows(&small, 0), "{table} in small batches");
        let last = small.model.last().unwrap();
        let initial = small.model.paced_from();
        let inside = [1, initial / 2, initial - 1, initial, initial + 7];
        let late = [initial + 15, initial + 47, last.saturating_sub(1), last];
        for start in inside.into_iter().chain(late) {
            let rest = rows(&small, start.min(last));
            assert_eq!(
                rest,
                whole[whole.len() - rest.len()..],
                "{table} from {start}"
            );
        }
        assert!(rows(&small, last).is_empty());
        assert_ne!(whole[..4], rows(&source(table, &[("seed", "6")]), 0)[..4]);
    }
}

#[test]
fn what_a_limit_covers_has_whole_orders() {
    let source = source("lineitem", &[("refreshes", "2"), ("rate", "1")]);
    let mut reader = source.open(&from(14_990), &[0, 3]).unwrap().remove(0);
    let limit = from(15_020);
    let Polled::Chunk(chunk) = reader.poll(Some(&limit), Duration::ZERO).unwrap() else {
        panic!("no chunk");
    };
    assert_eq!((chunk.begin, chunk.end), (14_990, 15_020));
    let rows = texts(&chunk.batch);
    // 25 orders come, 5 go; each with lines from 1 on.
    let diffs = chunk.diffs.unwrap();
    let orders = |diff| {
        let of_diff = rows.iter().zip(&diffs).filter(|(_, d)| **d == diff);
        of_diff
            .map(|(row, _)| row[0].clone())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!((orders(1).len(), orders(-1).len()), (25, 5));
    assert_eq!(rows[0][1], "1");
    assert!(matches!(
        reader.poll(Some(&limit), Duration::ZERO),
        Ok(Polled::AtLimit)
    ));
}

#[test]
fn counts_go_with_the_scale() {
    let counts = [5, 25, 100, 1500, 2000, 8000, 15_000];
    for (table, count) in Table::NAMES.iter().zip(counts) {
        assert_eq!(rows(&source(table, &[]), 0).len(), count, "{table}");
        let double = rows(&source(table, &[("scale", "0.02")]), 0).len();
        assert_eq!(
            double,
            if count < 100 { count } else { 2 * count },
            "{table}"
        );
    }
    let lines = rows(&source("lineitem", &[]), 0).len();
    assert!((59_000..61_000).contains(&lines), "{lines}");
    let large = source("orders", &[("scale", "100"), ("refreshes", "2")]);
    assert_eq!(large.model.last(), Some(150_000_000 + 2 * 300_000));
}

#[test]
fn after_the_refreshes_orders_and_lines_are_as_replayed() {
    let refreshes = [("refreshes", "4"), ("seed", "3")];
    let (orders, lines) = (source("orders", &refreshes), source("lineitem", &refreshes));
    assert!(!orders.append_only() && !lines.append_only() && orders.bounded());
    let all = rows(&orders, 0);
    assert_eq!(all.len(), 15_000 + 4 * 30);
    // The oldest go: those of the initial rows, from the first one on.
    let gone: Vec<_> = all.iter().filter(|(_, diff)| *diff < 0).collect();
    let first: Vec<_> = all[..60].iter().map(|(row, _)| row).collect();
    assert_eq!(gone.iter().map(|(row, _)| row).collect::<Vec<_>>(), first);

    let (orders, lines) = (live(&orders), live(&lines));
    assert_eq!(orders.len(), 15_000);
    let keys: BTreeSet<i64> = orders.iter().map(|row| long(&row[0])).collect();
    assert_eq!(keys.len(), orders.len(), "keys are used once");
    assert!(
        keys.iter().all(|key| key / 8 % 4 <= 1),
        "initial and new keys"
    );
    let mut of_order: HashMap<&str, Vec<&Vec<String>>> = HashMap::new();
    for line in &lines {
        of_order.entry(&line[0]).or_default().push(line);
    }
    assert_eq!(of_order.len(), orders.len());
    for order in &orders {
        let lines = &of_order[order[0].as_str()];
        let mut numbers: Vec<i64> = lines.iter().map(|line| long(&line[3])).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=lines.len() as i64).collect::<Vec<_>>());
        let price = |line: &&&Vec<String>| {
            cents(&line[5]) * (100 - cents(&line[6])) * (100 + cents(&line[7]))
        };
        let total: i64 = lines.iter().map(|line| price(&line)).sum();
        assert_eq!((total + 5000) / 10_000, cents(&order[3]));
        let status: BTreeSet<&str> = lines.iter().map(|line| line[9].as_str()).collect();
        let expected = status.iter().next().filter(|_| status.len() == 1);
        assert_eq!(order[2], *expected.copied().get_or_insert("P"));
        assert_ne!(long(&order[1]) % 3, 0, "every third customer never orders");
        for line in lines {
            let (shipped, committed, received) = (&line[10], &line[11], &line[12]);
            assert!(order[4] < *shipped && shipped < received && order[4] < *committed);
            assert_eq!(line[9] == "O", shipped.as_str() > "1995-06-17");
            assert_eq!(line[8] == "N", received.as_str() > "1995-06-17");
        }
    }
}

#[test]
fn the_tables_refer_to_each_other() {
    let offers: BTreeSet<(i64, i64)> = rows(&source("partsupp", &[]), 0)
        .iter()
        .map(|(row, _)| (long(&row[0]), long(&row[1])))
        .collect();
    assert_eq!(offers.len(), 8000, "four different suppliers of each part");
    assert!(
        offers
            .iter()
            .all(|(_, supplier)| (1..=100).contains(supplier))
    );
    let parts = rows(&source("part", &[]), 0);
    for (line, _) in rows(&source("lineitem", &[]), 0) {
        assert!(offers.contains(&(long(&line[1]), long(&line[2]))));
        let part = &parts[long(&line[1]) as usize - 1].0;
        assert_eq!(cents(&line[4]) / 100 * cents(&part[7]), cents(&line[5]));
    }
    for (part, _) in &parts {
        assert_eq!(part[2].replace("Manufacturer", "Brand"), part[3][..7]);
        let colors: BTreeSet<&str> = part[1].split(' ').collect();
        assert_eq!(colors.len(), 5);
    }
    for (table, key) in [("supplier", 3), ("customer", 3)] {
        for (row, _) in rows(&source(table, &[]), 0) {
            let code = long(&row[4][..2]);
            assert_eq!((code, row[4].len()), (10 + long(&row[key]), 15));
        }
    }
}

#[test]
fn comments_say_what_queries_look_for() {
    let special = |text: &str| {
        text.split_once("special")
            .is_some_and(|(_, rest)| rest.contains("requests"))
    };
    let orders = rows(&source("orders", &[]), 0);
    let found = orders.iter().filter(|(row, _)| special(&row[8])).count();
    assert!((75..750).contains(&found), "{found}");
    assert!(
        orders
            .iter()
            .all(|(row, _)| (19..=78).contains(&row[8].len()))
    );
    for scale in ["0.01", "0.4"] {
        let suppliers = rows(&source("supplier", &[("scale", scale)]), 0);
        let told = |what: &str| {
            let told = suppliers.iter().filter(|(row, _)| {
                let after = row[6].split_once("Customer");
                after.is_some_and(|(_, rest)| rest.contains(what))
            });
            told.count()
        };
        let expected = suppliers.len().div_ceil(2000);
        assert_eq!(
            (told("Complaints"), told("Recommends")),
            (expected, expected)
        );
    }
}

#[test]
fn refreshes_keep_the_rate_and_the_first_rows_do_not_wait() {
    let source = source("orders", &[("refreshes", "1000"), ("rate", "2000")]);
    let mut reader = source.open(&from(0), &[0]).unwrap().remove(0);
    let began = Instant::now();
    let mut end = 0;
    while end < 15_000 + 600 {
        let polled = reader.poll(None, Duration::from_millis(500)).unwrap();
        let Polled::Chunk(chunk) = polled else {
            panic!("{polled:?}")
        };
        assert!(end < 15_000 || chunk.end - end <= 200);
        end = chunk.end;
    }
    // 0.3 s worth, of which 0.1 s may have been saved up.
    assert!(began.elapsed() > Duration::from_millis(180));
}

#[test]
fn options_are_checked() {
    let wrong = |options: &[(&str, &str)]| try_source(options).unwrap_err();
    for scale in ["0", "0.001", "-1", "x", "10001"] {
        let error = wrong(&[("table", "part"), ("scale", scale)]);
        assert!(error.message.contains("multiple of 0.01"), "{error:?}");
    }
    for scale in ["0.01", "1", "10.0", "10000"] {
        try_source(&[("table", "part"), ("scale", scale)]).unwrap();
    }
    let error = wrong(&[("table", "lineitems")]);
    assert!(error.hint.unwrap().contains("did you mean \"lineitem\"?"));
    let error = wrong(&[("table", "part"), ("max_events", "5")]);
    assert!(error.message.contains("does not belong to kind \"tpch\""));
    let error = wrong(&[("kind", "nexmark"), ("table", "bid"), ("scale", "1")]);
    assert!(
        error
            .message
            .contains("does not belong to kind \"nexmark\"")
    );
}
