//! Rows per CPU-second of the ways in: `throughput [seconds]`.
//!
//! With `MILLRACE_TEST_KAFKA` set to a broker, a topic is filled and read too. CPU time is that of the
//! whole process, all threads, as the kernel counts it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::datatypes::{DataType, Field, Schema};
use millrace_connectors::{OptionMap, create};
use millrace_dataflow::error::ErrorKind;
use millrace_dataflow::source::{Offsets, Polled, Reader, Source};
use millrace_interchange::format::Layout;
use millrace_interchange::json;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

const RECORD: &str = r#"{"auction":123456,"bidder":1017,"price":98765,"channel":"Google","url":"https://www.nexmark.com/abcde/fghij/klmno/item.htm?query=1","date_time":1700000000000,"extra":"qwertyuiopasdfghjklzxcvbnmqwertyuiopasdfghjklzxcvbnmqwertyui"}"#;

fn main() {
    let seconds = std::env::args()
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(2);
    let time = Duration::from_secs(seconds);
    for (name, projection) in [
        ("json, 3 numbers of 7 columns", vec![0, 2, 5]),
        ("json, 4 numbers of 7 columns", vec![0, 1, 2, 5]),
        ("json, all 7 columns", (0..7).collect()),
    ] {
        decode(name, &projection, time);
    }
    for (name, table, columns) in [
        (
            "generator, bid (auction, bidder, price, date_time)",
            "bid",
            vec![0, 1, 2, 5],
        ),
        ("generator, bid, all columns", "bid", (0..7).collect()),
        (
            "generator, auction, all columns",
            "auction",
            (0..10).collect(),
        ),
        ("generator, person, all columns", "person", (0..8).collect()),
    ] {
        generate(name, table, &columns, time);
    }
    if let Ok(servers) = std::env::var("MILLRACE_TEST_KAFKA") {
        kafka(&servers);
    }
}

fn bid_columns() -> Schema {
    let field = |name: &str, data_type| Field::new(name, data_type, true);
    Schema::new(vec![
        field("auction", DataType::Int64),
        field("bidder", DataType::Int64),
        field("price", DataType::Int64),
        field("channel", DataType::Utf8),
        field("url", DataType::Utf8),
        field("date_time", DataType::Int64),
        field("extra", DataType::Utf8),
    ])
}

fn decode(name: &str, projection: &[usize], time: Duration) {
    let layout = Layout {
        schema: Arc::new(bid_columns()),
        projection: projection.to_vec(),
        changelog: None,
    };
    let mut decoder = json::decoder(&layout).expect("the types are known");
    let meter = Meter::new();
    let mut rows = 0;
    while meter.began.elapsed() < time {
        for _ in 0..16_384 {
            decoder.push(RECORD.as_bytes()).expect("a good record");
        }
        rows += decoder.finish().expect("columns").batch.num_rows();
    }
    meter.report(name, rows, rows * RECORD.len());
}

fn generate(name: &str, table: &str, columns: &[usize], time: Duration) {
    let options = [("kind", "nexmark"), ("table", table)];
    let options: OptionMap = options.map(|(k, v)| (k.into(), v.into())).into();
    let source = create("generator", &options, &Schema::empty()).expect("a generator");
    let mut reader = source
        .open(&Offsets::default(), columns)
        .expect("opens")
        .remove(0);
    let meter = Meter::new();
    let (mut rows, mut bytes) = (0, 0);
    while meter.began.elapsed() < time {
        if let Polled::Chunk(chunk) = reader.poll(None, Duration::ZERO).expect("generates") {
            rows += chunk.batch.num_rows();
            bytes += chunk.bytes as usize;
        }
    }
    meter.report(name, rows, bytes);
}

fn kafka(servers: &str) {
    const ROWS: usize = 4_000_000;
    let topic = format!(
        "millrace-throughput-{}",
        millrace_dataflow::env::random_id()
    );
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", servers)
        .set("queue.buffering.max.messages", "1000000")
        .set("linger.ms", "20")
        .set("batch.size", "524288");
    let admin: AdminClient<_> = config.create().expect("a client");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    let new = NewTopic::new(&topic, 2, TopicReplication::Fixed(1));
    let created = runtime.block_on(admin.create_topics([&new], &AdminOptions::new()));
    created.expect("an answer").remove(0).expect("a new topic");
    let producer: BaseProducer = config.create().expect("a producer");
    for i in 0..ROWS {
        let mut record = BaseRecord::<(), str>::to(&topic)
            .partition((i % 2) as i32)
            .payload(RECORD);
        while let Err((_, back)) = producer.send(record) {
            record = back;
            producer.poll(Duration::from_millis(50));
        }
    }
    producer
        .flush(Duration::from_secs(60))
        .expect("all records sent");
    drop(producer);
    let options = [
        ("bootstrap_servers", servers),
        ("topic", &topic),
        ("format", "json"),
    ];
    let options: OptionMap = options.map(|(k, v)| (k.into(), v.into())).into();
    let source = create("kafka", &options, &bid_columns()).expect("a source");
    let meter = Meter::new();
    let readers = source
        .open(&Offsets::default(), &[0, 1, 2, 5])
        .expect("opens");
    let threads: Vec<_> = readers
        .into_iter()
        .map(|reader| std::thread::spawn(move || drain(reader, ROWS / 2)))
        .collect();
    let (mut rows, mut bytes, mut chunks) = (0, 0, 0);
    for thread in threads {
        let read = thread.join().expect("a reader");
        rows += read.0;
        bytes += read.1;
        chunks += read.2;
    }
    meter.report(
        "kafka, json, 4 numbers of 7 columns, 2 partitions",
        rows,
        bytes,
    );
    println!(
        "{:60} {:>10.0} rows per chunk",
        "",
        rows as f64 / chunks as f64
    );
    idle(&source);
    let _ = runtime.block_on(admin.delete_topics(&[&topic], &AdminOptions::new()));
}

/// What a source costs while nothing comes.
fn idle(source: &Arc<dyn Source>) {
    let end = Offsets([("0".into(), 2_000_000), ("1".into(), 2_000_000)].into());
    let mut readers = source.open(&end, &[0]).expect("opens");
    let meter = Meter::new();
    while meter.began.elapsed() < Duration::from_secs(10) {
        for reader in &mut readers {
            let _ = reader.poll(None, Duration::from_millis(500));
        }
    }
    let cpu = (cpu_seconds() - meter.cpu) * 6.0;
    println!("{:60} {cpu:>10.2} CPU-seconds per minute", "kafka, idle");
}

fn drain(mut reader: Box<dyn Reader>, wanted: usize) -> (usize, usize, usize) {
    let (mut rows, mut bytes, mut chunks) = (0, 0, 0);
    while rows < wanted {
        match reader.poll(None, Duration::from_millis(100)) {
            Ok(Polled::Chunk(chunk)) => {
                rows += chunk.batch.num_rows();
                bytes += chunk.bytes as usize;
                chunks += 1;
            }
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind, ErrorKind::Unavailable, "{e:?}"),
        }
    }
    (rows, bytes, chunks)
}

struct Meter {
    began: Instant,
    cpu: f64,
}

impl Meter {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            cpu: cpu_seconds(),
        }
    }
    fn report(&self, name: &str, rows: usize, bytes: usize) {
        let (wall, cpu) = (self.began.elapsed().as_secs_f64(), cpu_seconds() - self.cpu);
        println!(
            "{name:60} {:>10.2} M rows per CPU-second, {:>6.2} per second, {:>6.0} MB per CPU-second",
            rows as f64 / cpu / 1e6,
            rows as f64 / wall / 1e6,
            bytes as f64 / cpu / 1e6,
        );
    }
}

/// User and system time of this process, from /proc/self/stat in ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let ticks = |i: usize| {
        fields
            .get(i)
            .and_then(|f| f.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    (ticks(11) + ticks(12)) / 100.0
}
