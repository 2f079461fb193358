//! Against a real broker, whose address is in `MILLRACE_TEST_KAFKA`; without it most of this is
//! skipped, and says so.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Field, Int64Type};
use millrace_dataflow::env;
use millrace_dataflow::error::ErrorKind;
use millrace_dataflow::source::{Chunk, Polled};
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};

use super::*;

const WAIT: Duration = Duration::from_millis(200);

fn source(servers: &str, topic: &str, more: &[(&str, &str)]) -> KafkaSource {
    let mut map: BTreeMap<String, String> = more
        .iter()
        .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
        .collect();
    for (key, value) in [
        ("bootstrap_servers", servers),
        ("topic", topic),
        ("format", "json"),
    ] {
        map.insert(key.into(), value.into());
    }
    let columns = Schema::new(vec![Field::new("id", DataType::Int64, true)]);
    KafkaSource::new(&Options::new(&INFO, &map).unwrap(), &columns).unwrap()
}

/// A broker, and topics that are nobody else's.
struct Broker {
    servers: String,
    admin: AdminClient<DefaultClientContext>,
    producer: BaseProducer,
    runtime: tokio::runtime::Runtime,
}

impl Broker {
    fn new() -> Option<Self> {
        let Ok(servers) = std::env::var("MILLRACE_TEST_KAFKA") else {
            println!("skipped: MILLRACE_TEST_KAFKA does not name a broker");
            return None;
        };
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &servers);
        Some(Self {
            admin: config.create().unwrap(),
            producer: config.create().unwrap(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            servers,
        })
    }
    fn topic(&self, partitions: i32) -> String {
        let name = format!("millrace-test-{}", env::random_id());
        self.create(&name, partitions);
        name
    }
    fn create(&self, name: &str, partitions: i32) {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let patience = AdminOptions::new();
        let created = self.admin.create_topics([&topic], &patience);
        self.runtime.block_on(created).unwrap().remove(0).unwrap();
    }
    fn delete(&self, name: &str) {
        let (names, patience) = ([name], AdminOptions::new());
        let deleted = self.admin.delete_topics(&names, &patience);
        self.runtime.block_on(deleted).unwrap().remove(0).unwrap();
    }
    fn send(&self, topic: &str, partition: i32, payload: Option<&str>) {
        let mut record = BaseRecord::<(), str>::to(topic).partition(partition);
        record.payload = payload;
        self.producer.send(record).unwrap();
        self.producer.poll(Duration::ZERO);
    }
    fn send_ids(&self, topic: &str, partition: i32, ids: std::ops::Range<i64>) {
        for id in ids {
            self.send(topic, partition, Some(&format!("{{\"id\":{id}}}")));
        }
        self.producer.flush(Duration::from_secs(10)).unwrap();
    }
}

/// Reads until nothing has come for a while, or the limit is reached by all readers.
fn read(readers: &mut [Box<dyn Reader>], limit: Option<&Offsets>, rows: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut done = 0;
        for reader in &mut *readers {
            loop {
                match reader.poll(limit, WAIT).unwrap() {
                    Polled::Chunk(chunk) => chunks.push(chunk),
                    Polled::Idle => break,
                    Polled::AtLimit => {
                        done += 1;
                        break;
                    }
                    Polled::End => panic!("a topic does not end"),
                }
            }
        }
        let have: usize = chunks.iter().map(|c| c.batch.num_rows()).sum();
        let all = if limit.is_some() {
            done == readers.len()
        } else {
            have >= rows
        };
        if all {
            return chunks;
        }
        assert!(Instant::now() < deadline, "{have} of {rows} rows came");
    }
}

fn ids(chunks: &[Chunk], split: &str) -> Vec<i64> {
    let of_split = chunks.iter().filter(|c| c.split.as_ref() == split);
    of_split
        .flat_map(|c| {
            c.batch
                .column(0)
                .as_primitive::<Int64Type>()
                .values()
                .to_vec()
        })
        .collect()
}

fn ends(chunks: &[Chunk]) -> Offsets {
    Offsets(
        chunks
            .iter()
            .map(|c| (c.split.to_string(), c.end))
            .collect(),
    )
}

fn offsets(entries: &[(&str, u64)]) -> Offsets {
    Offsets(
        entries
            .iter()
            .map(|(split, offset)| ((*split).to_string(), *offset))
            .collect(),
    )
}

#[test]
fn partitions_limits_restarts_and_rejects() {
    let Some(broker) = Broker::new() else { return };
    let topic = broker.topic(2);
    broker.send_ids(&topic, 0, 0..30_000);
    broker.send_ids(&topic, 1, 100_000..100_010);
    broker.send(&topic, 1, Some("{\"id\":\"not a number\"}"));
    broker.send(&topic, 1, None);
    broker.send_ids(&topic, 1, 100_012..100_020);
    let source = source(&broker.servers, &topic, &[]);
    source.validate().unwrap();

    let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
    assert_eq!(readers.len(), 2);
    let all = read(&mut readers, None, 30_018);
    assert_eq!(ids(&all, "0"), (0..30_000).collect::<Vec<_>>());
    let expected: Vec<_> = (100_000..100_010).chain(100_012..100_020).collect();
    assert_eq!(ids(&all, "1"), expected);
    assert_eq!(ends(&all), offsets(&[("0", 30_000), ("1", 20)]));
    let rejected: Vec<_> = all.iter().flat_map(|c| &c.rejected).collect();
    assert_eq!(
        rejected
            .iter()
            .map(|r| (r.split.as_str(), r.offset, r.reason.as_str()))
            .collect::<Vec<_>>(),
        [
            ("1", 10, "column \"id\": expected BIGINT, found text"),
            ("1", 11, "empty record")
        ]
    );
    assert_eq!(rejected[0].bytes, b"{\"id\":\"not a number\"}");
    let last = all.iter().rfind(|c| c.split.as_ref() == "0").unwrap();
    assert_eq!(last.remaining, Some(0));
    // What comes later comes to the open readers.
    broker.send_ids(&topic, 1, 7..9);
    assert_eq!(ids(&read(&mut readers, None, 2), "1"), [7, 8]);

    // Again from the middle up to a limit, then on without one.
    let start = offsets(&[("0", 29_000), ("1", 5)]);
    let mut readers = source.open(&start, &[0]).unwrap();
    let limit = offsets(&[("0", 29_500), ("1", 11)]);
    let some = read(&mut readers, Some(&limit), 0);
    assert_eq!(ids(&some, "0"), (29_000..29_500).collect::<Vec<_>>());
    assert_eq!(ids(&some, "1"), (100_005..100_010).collect::<Vec<_>>());
    assert_eq!(ends(&some), limit);
    assert_eq!(some.iter().map(|c| c.rejected.len()).sum::<usize>(), 1);
    let rest = read(&mut readers, None, 510);
    assert_eq!(ids(&rest, "0"), (29_500..30_000).collect::<Vec<_>>());
    assert_eq!(ends(&rest), offsets(&[("0", 30_000), ("1", 22)]));
    // A split that the limit leaves out yields nothing.
    let mut readers = source.open(&start, &[0]).unwrap();
    let only = read(&mut readers, Some(&offsets(&[("1", 6)])), 0);
    assert_eq!((ids(&only, "0").len(), ids(&only, "1").len()), (0, 1));

    // A partition that is added later is read from its start, wherever the source began.
    let (three, patience) = (NewPartitions::new(&topic, 3), AdminOptions::new());
    let more = broker.admin.create_partitions([&three], &patience);
    broker.runtime.block_on(more).unwrap().remove(0).unwrap();
    // A producer that does not remember two partitions.
    let Some(broker) = Broker::new() else { return };
    broker.send_ids(&topic, 2, 1..4);
    let mut readers = source
        .open(&offsets(&[("0", 30_000), ("1", 22)]), &[0])
        .unwrap();
    assert_eq!(ids(&read(&mut readers, None, 3), "2"), [1, 2, 3]);
}

#[test]
fn latest_is_settled_at_the_first_opening() {
    let Some(broker) = Broker::new() else { return };
    let topic = broker.topic(1);
    broker.send_ids(&topic, 0, 0..5);
    let source = source(&broker.servers, &topic, &[("start", "latest")]);
    let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
    let first = loop {
        match readers[0].poll(None, WAIT).unwrap() {
            Polled::Chunk(chunk) => break chunk,
            Polled::Idle => {}
            other => panic!("{other:?}"),
        }
    };
    // Told before there is a record, so that a restart here loses nothing.
    assert_eq!((first.end, first.batch.num_rows()), (5, 0));
    drop(readers);
    broker.send_ids(&topic, 0, 5..8);
    let mut readers = source.open(&offsets(&[("0", 5)]), &[0]).unwrap();
    assert_eq!(ids(&read(&mut readers, None, 3), "0"), [5, 6, 7]);
}

/// The error that the readers come to.
fn error_of(source: &KafkaSource, start: &Offsets) -> Error {
    let mut readers = source.open(start, &[0]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for reader in &mut readers {
            match reader.poll(None, WAIT) {
                Err(error) => return error,
                Ok(Polled::Chunk(chunk)) => assert_eq!(chunk.batch.num_rows(), 0),
                Ok(_) => {}
            }
        }
        assert!(Instant::now() < deadline, "no error came");
    }
}

#[test]
fn what_is_not_held_is_an_error() {
    let Some(broker) = Broker::new() else { return };
    let topic = broker.topic(1);
    broker.send_ids(&topic, 0, 0..10);
    let source = source(&broker.servers, &topic, &[]);
    let beyond = error_of(&source, &offsets(&[("0", 11)]));
    assert_eq!(beyond.kind, ErrorKind::Corrupt);
    assert_eq!(
        beyond.detail.unwrap(),
        "next is offset 11, the partition holds 0 to 10"
    );
    assert!(beyond.hint.unwrap().contains("retention"));
    // Retention passes while the source is away.
    let mut upto = TopicPartitionList::new();
    upto.add_partition_offset(&topic, 0, Offset::Offset(4))
        .unwrap();
    let patience = AdminOptions::new();
    let deleted = broker.admin.delete_records(&upto, &patience);
    broker.runtime.block_on(deleted).unwrap();
    assert_eq!(
        error_of(&source, &offsets(&[("0", 3)])).kind,
        ErrorKind::Corrupt
    );
    let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
    assert_eq!(
        ids(&read(&mut readers, None, 6), "0"),
        (4..10).collect::<Vec<_>>()
    );
    // The topic goes while it is read.
    broker.delete(&topic);
    let deadline = Instant::now() + Duration::from_secs(30);
    let error = loop {
        match readers[0].poll(None, WAIT) {
            Err(error) if error.kind != ErrorKind::Unavailable => break error,
            _ => assert!(Instant::now() < deadline, "no error came"),
        }
    };
    assert_eq!(error.kind, ErrorKind::NotFound, "{error:?}");
    assert_eq!(source.validate().unwrap_err().kind, ErrorKind::NotFound);
}

#[test]
fn a_topic_created_anew_is_an_error() {
    let Some(broker) = Broker::new() else { return };
    let topic = broker.topic(1);
    broker.send_ids(&topic, 0, 0..10);
    let source = source(&broker.servers, &topic, &[]);
    let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
    assert_eq!(ids(&read(&mut readers, None, 10), "0").len(), 10);
    broker.delete(&topic);
    broker.create(&topic, 1);
    let Some(broker) = Broker::new() else { return };
    broker.send_ids(&topic, 0, 0..3);
    let deadline = Instant::now() + Duration::from_secs(30);
    let error = loop {
        match readers[0].poll(None, WAIT) {
            Ok(Polled::Chunk(chunk)) => panic!("read {:?}", chunk.batch),
            Err(error) if error.kind != ErrorKind::Unavailable => break error,
            _ => assert!(Instant::now() < deadline, "no error came"),
        }
    };
    assert!(
        matches!(error.kind, ErrorKind::Corrupt | ErrorKind::NotFound),
        "{error:?}"
    );
    assert_eq!(
        error_of(&source, &offsets(&[("0", 10)])).kind,
        ErrorKind::Corrupt
    );
}

/// librdkafka's own broker in this process, because it can be switched off.
#[test]
fn a_broker_that_comes_back_is_read_on() {
    let broker = rdkafka::mocking::MockCluster::new(1).unwrap();
    broker.create_topic("t", 1, 1).unwrap();
    let servers = broker.bootstrap_servers();
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &servers)
        .create()
        .unwrap();
    let send = |ids: std::ops::Range<i64>| {
        for id in ids {
            let text = format!("{{\"id\":{id}}}");
            producer
                .send(BaseRecord::<(), _>::to("t").partition(0).payload(&text))
                .unwrap();
        }
        producer.flush(Duration::from_secs(10)).unwrap();
    };
    send(0..100);
    let source = source(&servers, "t", &[]);
    let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
    assert_eq!(
        ids(&read(&mut readers, None, 100), "0"),
        (0..100).collect::<Vec<_>>()
    );
    broker.broker_down(1).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let error = loop {
        match readers[0].poll(None, WAIT) {
            Err(error) => break error,
            Ok(_) => assert!(
                Instant::now() < deadline,
                "the broker's absence was not told"
            ),
        }
    };
    assert_eq!(error.kind, ErrorKind::Unavailable);
    broker.broker_up(1).unwrap();
    send(100..150);
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut more = Vec::new();
    while ids(&more, "0").len() < 50 {
        match readers[0].poll(None, WAIT) {
            Ok(Polled::Chunk(chunk)) => more.push(chunk),
            Err(error) => assert_eq!(error.kind, ErrorKind::Unavailable, "{error:?}"),
            Ok(_) => {}
        }
        assert!(
            Instant::now() < deadline,
            "nothing came after the broker was back"
        );
    }
    assert_eq!(ids(&more, "0"), (100..150).collect::<Vec<_>>());
}

#[test]
fn only_committed_transactions_are_read() {
    let Some(broker) = Broker::new() else { return };
    let topic = broker.topic(1);
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &broker.servers)
        .set("transactional.id", &topic)
        .create()
        .unwrap();
    let patience = Duration::from_secs(10);
    producer.init_transactions(patience).unwrap();
    for (ids, commit) in [(0..3, true), (3..6, false), (6..9, true)] {
        producer.begin_transaction().unwrap();
        for id in ids {
            let text = format!("{{\"id\":{id}}}");
            producer
                .send(BaseRecord::<(), _>::to(&topic).partition(0).payload(&text))
                .unwrap();
        }
        producer.flush(patience).unwrap();
        let end = if commit {
            producer.commit_transaction(patience)
        } else {
            producer.abort_transaction(patience)
        };
        end.unwrap();
    }
    let source = source(&broker.servers, &topic, &[]);
    let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
    let mut all = read(&mut readers, None, 6);
    assert_eq!(ids(&all, "0"), [0, 1, 2, 6, 7, 8]);
    // Nine records and three markers: the end is behind the last marker.
    while ends(&all) != offsets(&[("0", 12)]) {
        if let Polled::Chunk(chunk) = readers[0].poll(None, WAIT).unwrap() {
            all.push(chunk);
        }
    }
    // A limit may fall into a gap or behind the last record, and is reached all the same.
    for (limit, expected) in [(12, 6), (11, 6), (6, 3), (4, 3), (3, 3)] {
        let limit = offsets(&[("0", limit)]);
        let mut readers = source.open(&Offsets::default(), &[0]).unwrap();
        let some = read(&mut readers, Some(&limit), 0);
        assert_eq!(ids(&some, "0").len(), expected, "{limit:?}");
        assert!(ends(&some).0["0"] <= limit.0["0"]);
    }
}

#[test]
fn a_broker_that_is_away_is_unavailable() {
    // Nothing listens there.
    let source = source("127.0.0.1:1", "t", &[]);
    let began = Instant::now();
    let error = source.validate().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(began.elapsed() < Duration::from_secs(8));
    assert!(error.hint.unwrap().contains("validate = 'off'"));
    // Opening does not wait for it.
    let mut readers = source.open(&offsets(&[("0", 5)]), &[0]).unwrap();
    let error = readers[0]
        .poll(None, Duration::from_millis(10))
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    self::source("127.0.0.1:1", "t", &[("validate", "off")])
        .validate()
        .unwrap();
}

#[test]
fn a_missing_topic_gets_a_hint() {
    let Some(broker) = Broker::new() else { return };
    let topic = broker.topic(1);
    let error = source(&broker.servers, &format!("{topic}x"), &[])
        .validate()
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(error.hint.unwrap(), format!("did you mean \"{topic}\"?"));
}
