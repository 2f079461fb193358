use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, Field, Int64Type, TimestampMicrosecondType};

use super::*;

fn source(options: &[(&str, &str)]) -> GeneratorSource {
    let mut map: BTreeMap<String, String> = options
        .iter()
        .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
        .collect();
    map.entry("kind".into()).or_insert("nexmark".into());
    GeneratorSource::new(&Options::new(&INFO, &map).unwrap(), &Schema::empty()).unwrap()
}

fn from(offset: u64) -> Offsets {
    Offsets([(SPLIT.to_string(), offset)].into())
}

/// All rows of a bounded source as text, from `start` on.
fn rows(source: &GeneratorSource, start: u64, columns: &[usize]) -> Vec<String> {
    let mut reader = source.open(&from(start), columns).unwrap().remove(0);
    let mut rows = Vec::new();
    loop {
        match reader.poll(None, Duration::ZERO).unwrap() {
            Polled::Chunk(chunk) => rows.extend(texts(&chunk.batch)),
            Polled::End => return rows,
            other => panic!("{other:?}"),
        }
    }
}

fn texts(batch: &RecordBatch) -> Vec<String> {
    let options = arrow::util::display::FormatOptions::default();
    let columns: Vec<_> = batch
        .columns()
        .iter()
        .map(|c| arrow::util::display::ArrayFormatter::try_new(c.as_ref(), &options).unwrap())
        .collect();
    (0..batch.num_rows())
        .map(|row| {
            columns
                .iter()
                .map(|c| c.value(row).to_string())
                .collect::<Vec<_>>()
                .join("|")
        })
        .collect()
}

#[test]
fn an_event_depends_on_its_number_and_column_only() {
    for (table, count) in [("person", 1), ("auction", 3), ("bid", 46)] {
        let small = source(&[
            ("table", table),
            ("max_events", "5000"),
            ("batch_size", "7"),
        ]);
        let large = source(&[("table", table), ("max_events", "5000")]);
        let all: Vec<usize> = (0..small.schema.fields().len()).collect();
        let rows_all = rows(&large, 0, &all);
        assert_eq!(rows_all.len(), 100 * count);
        assert_eq!(rows_all, rows(&small, 0, &all));
        // From the middle of a round on, the same rows.
        let later = rows(&small, 2525, &all);
        assert_eq!(later, rows_all[rows_all.len() - later.len()..]);
        // One column alone, the same values.
        let first = rows(&large, 0, &[0]);
        assert!(
            rows_all
                .iter()
                .zip(&first)
                .all(|(row, id)| row.split('|').next() == Some(id))
        );
        let other = source(&[("table", table), ("max_events", "5000"), ("seed", "1")]);
        assert_ne!(rows_all, rows(&other, 0, &all));
    }
}

fn longs(source: &GeneratorSource, column: &str) -> Vec<i64> {
    let index = source.schema.index_of(column).unwrap();
    rows(source, 0, &[index])
        .iter()
        .map(|text| text.parse().unwrap())
        .collect()
}

#[test]
fn the_tables_refer_to_each_other() {
    let with = |table| source(&[("table", table), ("max_events", "500000"), ("seed", "7")]);
    let (person, auction, bid) = (with("person"), with("auction"), with("bid"));
    let people = longs(&person, "id");
    assert_eq!(people, (1000..11_000).collect::<Vec<_>>());
    let auctions = longs(&auction, "id");
    assert_eq!(auctions, (1000..31_000).collect::<Vec<_>>());
    // References run ahead by ten at most, so nearly all of them exist.
    let people: HashSet<_> = people.into_iter().collect();
    let sellers = longs(&auction, "seller");
    let bidders = longs(&bid, "bidder");
    let targets = longs(&bid, "auction");
    let known = |ids: &[i64], all: &HashSet<i64>| ids.iter().filter(|id| all.contains(id)).count();
    assert!(known(&sellers, &people) + 10 > sellers.len());
    assert!(known(&bidders, &people) + 200 > bidders.len());
    let auctions: HashSet<_> = auctions.into_iter().collect();
    assert!(known(&targets, &auctions) + 500 > targets.len());
    // Hot keys: one in two bids, three in four bidders and sellers.
    let share = |ids: &[i64], hot: i64| {
        ids.iter().filter(|id| **id % 100 == hot).count() as f64 / ids.len() as f64
    };
    assert!(
        (0.49..0.53).contains(&share(&targets, 0)),
        "{}",
        share(&targets, 0)
    );
    assert!(
        (0.74..0.78).contains(&share(&bidders, 1)),
        "{}",
        share(&bidders, 1)
    );
    assert!(
        (0.74..0.78).contains(&share(&sellers, 0)),
        "{}",
        share(&sellers, 0)
    );
    let prices = longs(&bid, "price");
    assert!(prices.iter().all(|p| (100..=100_000_000).contains(p)));
    let high = prices.iter().filter(|p| **p >= 100_000).count() as f64 / prices.len() as f64;
    assert!((0.49..0.51).contains(&high), "{high}");
    let mut categories = longs(&auction, "category");
    categories.sort_unstable();
    categories.dedup();
    assert_eq!(categories, [10, 11, 12, 13, 14]);
}

#[test]
fn event_time_goes_by_number_and_jitters_backwards() {
    let times = |options: &[(&str, &str)]| -> Vec<i64> {
        let mut all = vec![("table", "bid"), ("max_events", "10000")];
        all.extend_from_slice(options);
        let source = source(&all);
        let mut reader = source.open(&from(0), &[5]).unwrap().remove(0);
        let Polled::Chunk(chunk) = reader.poll(Some(&from(10_000)), Duration::ZERO).unwrap() else {
            panic!("no chunk");
        };
        chunk
            .batch
            .column(0)
            .as_primitive::<TimestampMicrosecondType>()
            .values()
            .to_vec()
    };
    let even = times(&[]);
    assert_eq!(even[0], DEFAULT_BASE_US + 400);
    assert!(even.is_sorted() && even.len() == 9200);
    let by_rate = times(&[("rate", "3"), ("base_time", "1970-01-01T00:00:00Z")]);
    assert_eq!(by_rate[..3], [1_333_333, 1_666_666, 2_000_000]);
    let jittered = times(&[("out_of_order_ms", "50")]);
    assert!(!jittered.is_sorted());
    let early = even.iter().zip(&jittered).map(|(turn, time)| turn - time);
    assert!(early.clone().all(|us| (0..=50_000).contains(&us)));
    assert!(early.max() > Some(45_000));
}

#[test]
fn auctions_expire_after_they_begin() {
    let source = source(&[
        ("table", "auction"),
        ("max_events", "100000"),
        ("out_of_order_ms", "9"),
    ]);
    let mut reader = source.open(&from(0), &[5, 6]).unwrap().remove(0);
    let Polled::Chunk(chunk) = reader.poll(None, Duration::ZERO).unwrap() else {
        panic!("no chunk")
    };
    let column = |i: usize| {
        chunk
            .batch
            .column(i)
            .as_primitive::<TimestampMicrosecondType>()
            .clone()
    };
    let (begin, end) = (column(0), column(1));
    let lengths = begin.values().iter().zip(end.values()).map(|(b, e)| e - b);
    // 1666 events ahead are 166 ms at 10,000 events per second; up to twice that.
    assert!(lengths.clone().all(|us| (1_000..=333_000).contains(&us)));
    assert!(lengths.max() > Some(300_000));
}

#[test]
fn limits_and_ends() {
    let source = source(&[("table", "bid"), ("max_events", "1000")]);
    let mut reader = source.open(&from(10), &[0]).unwrap().remove(0);
    let limited = reader.poll(Some(&from(100)), Duration::ZERO).unwrap();
    let Polled::Chunk(chunk) = limited else {
        panic!("{limited:?}")
    };
    assert_eq!((chunk.end, chunk.batch.num_rows()), (100, 86));
    assert!(matches!(
        reader.poll(Some(&from(100)), Duration::ZERO),
        Ok(Polled::AtLimit)
    ));
    assert!(matches!(
        reader.poll(Some(&Offsets::default()), Duration::ZERO),
        Ok(Polled::AtLimit)
    ));
    let rest = reader.poll(None, Duration::ZERO).unwrap();
    let Polled::Chunk(chunk) = rest else {
        panic!("{rest:?}")
    };
    assert_eq!((chunk.end, chunk.remaining), (1000, Some(0)));
    let first = chunk.batch.column(0).as_primitive::<Int64Type>();
    assert_eq!((first.len(), first.null_count()), (828, 0));
    assert!(matches!(reader.poll(None, Duration::ZERO), Ok(Polled::End)));
    assert!(source.bounded() && source.any_event_time());
}

#[test]
fn a_rate_is_kept() {
    let source = source(&[("table", "bid"), ("rate", "20000")]);
    assert!(!source.bounded());
    let mut reader = source.open(&from(0), &[0]).unwrap().remove(0);
    let began = Instant::now();
    let mut end = 0;
    while end < 8_000 {
        let chunk = reader.poll(None, Duration::from_millis(500)).unwrap();
        let Polled::Chunk(chunk) = chunk else {
            panic!("{chunk:?}")
        };
        assert!(chunk.end - end <= 2_000, "more than 100 ms worth at once");
        end = chunk.end;
    }
    // 0.4 s worth. A busy machine may be slower, never faster.
    assert!(
        began.elapsed() > Duration::from_millis(350),
        "{:?}",
        began.elapsed()
    );
    // A replay does not wait.
    let began = Instant::now();
    let mut reader = source.open(&from(0), &[0]).unwrap().remove(0);
    while !matches!(
        reader.poll(Some(&from(200_000)), Duration::ZERO).unwrap(),
        Polled::AtLimit
    ) {}
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn declared_columns_are_checked() {
    let map = [("kind", "nexmark"), ("table", "bid")];
    let map = map.map(|(k, v)| (k.to_string(), v.to_string())).into();
    let options = Options::new(&INFO, &map).unwrap();
    let declare = |name: &str, data_type| {
        GeneratorSource::new(
            &options,
            &Schema::new(vec![Field::new(name, data_type, true)]),
        )
    };
    assert_eq!(
        declare("price", DataType::Int64)
            .unwrap()
            .schema
            .fields()
            .len(),
        1
    );
    assert_eq!(declare("price", DataType::Utf8).unwrap_err().code, "42804");
    let unknown = declare("biddr", DataType::Int64).unwrap_err();
    assert!(
        unknown
            .hint
            .unwrap()
            .starts_with("did you mean \"bidder\"?")
    );
}
