//! A real broker: topics made and filled by the tests.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Address of the broker of the tests. `None` (said aloud) when there is none, which CI forbids.
pub fn broker() -> Option<String> {
    let address =
        std::env::var("MILLRACE_TEST_KAFKA").unwrap_or_else(|_| "127.0.0.1:9092".to_string());
    if std::net::TcpStream::connect(&address).is_ok() {
        return Some(address);
    }
    let required = std::env::var("CI").is_ok() || std::env::var("MILLRACE_TEST_KAFKA").is_ok();
    assert!(
        !required,
        "no broker at {address}: run tests/services/kafka.sh start"
    );
    println!("SKIPPED: no broker at {address}; tests/services/kafka.sh start would give one");
    None
}

/// A script of `tests/services`.
pub fn service_script(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("services")
        .join(name)
}

/// A broker of a test's own, which it may stop and start.
#[derive(Debug)]
pub struct OwnBroker {
    pub port: u16,
}

impl OwnBroker {
    pub fn new() -> Self {
        // Broker and controller take two neighbouring ports.
        loop {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
            let port = listener.local_addr().expect("bound").port();
            if port < 65_000 && std::net::TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
                return Self { port };
            }
        }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn start(&self) {
        self.script("start");
    }

    pub fn stop(&self) {
        self.script("stop");
    }

    fn script(&self, command: &str) {
        let status = Command::new(service_script("kafka.sh"))
            .arg(command)
            .env("KAFKA_PORT", self.port.to_string())
            .env("KAFKA_HEAP", "256m")
            .stdout(std::process::Stdio::null())
            .status()
            .expect("the script runs");
        assert!(status.success(), "kafka.sh {command}: {status}");
    }
}

impl Default for OwnBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for OwnBroker {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        } else {
            let _ = Command::new(service_script("kafka.sh"))
                .arg("stop")
                .env("KAFKA_PORT", self.port.to_string())
                .status();
        }
        let home = std::env::var("SERVICES_DIR")
            .map(PathBuf::from)
            .or_else(|_| {
                std::env::var("HOME")
                    .map(|home| PathBuf::from(home).join(".cache/millrace-services"))
            });
        if let Ok(home) = home {
            let _ = std::fs::remove_dir_all(home.join(format!("kafka-{}", self.port)));
        }
    }
}

/// A topic, deleted when dropped.
#[derive(Debug)]
pub struct Topic {
    pub broker: String,
    pub name: String,
    pub partitions: i32,
}

impl Topic {
    /// Makes a topic with a name of its own that begins with `name`.
    pub fn create(broker: &str, name: &str, partitions: i32) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let clock = clock.map_or(0, |d| d.as_millis());
        let name = format!("{name}-{}-{clock}-{number}", std::process::id());
        Self::create_named(broker, &name, partitions)
    }

    /// Makes a topic of exactly that name.
    pub fn create_named(broker: &str, name: &str, partitions: i32) -> Self {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let made = block_on(admin(broker).create_topics([&topic], &options())).expect("an answer");
        for result in made {
            result.unwrap_or_else(|(topic, code)| panic!("topic {topic}: {code}"));
        }
        // The broker answers before others can see it.
        crate::wait::until("the topic", Duration::from_secs(30), || {
            let client = admin(broker);
            let seen = client
                .inner()
                .fetch_metadata(Some(name), Duration::from_secs(5));
            let seen = seen.map_err(|e| e.to_string())?;
            let topic = seen.topics().iter().find(|topic| topic.name() == name);
            match topic.filter(|topic| topic.error().is_none()) {
                Some(topic) if topic.partitions().len() == partitions as usize => Ok(()),
                _ => Err("it is not there yet".to_string()),
            }
        });
        Self {
            broker: broker.to_string(),
            name: name.to_string(),
            partitions,
        }
    }
}

impl Drop for Topic {
    fn drop(&mut self) {
        // A broker that is gone takes its topics along.
        if std::net::TcpStream::connect(&self.broker).is_ok() {
            let _ = block_on(admin(&self.broker).delete_topics(&[&self.name], &options()));
        }
    }
}

fn admin(broker: &str) -> AdminClient<DefaultClientContext> {
    config(broker).create().expect("an admin client")
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .operation_timeout(Some(TIMEOUT))
        .request_timeout(Some(TIMEOUT))
}

fn config(broker: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", broker)
        .set("broker.address.family", "v4");
    config
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(work)
}

/// Counts what the broker has confirmed.
#[derive(Debug, Default, Clone)]
struct Delivered {
    good: Arc<AtomicU64>,
    bad: Arc<AtomicU64>,
}

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): Self::DeliveryOpaque) {
        let counter = if result.is_ok() {
            &self.good
        } else {
            &self.bad
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes records in order; each exactly once on the broker.
pub struct Writer {
    producer: ThreadedProducer<Delivered>,
    delivered: Delivered,
    sent: u64,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

impl Writer {
    pub fn new(broker: &str) -> Self {
        let delivered = Delivered::default();
        let producer = config(broker)
            .set("enable.idempotence", "true")
            .set("linger.ms", "5")
            .set("queue.buffering.max.messages", "200000")
            .set("compression.type", "zstd")
            .create_with_context(delivered.clone())
            .expect("a producer");
        Self {
            producer,
            delivered,
            sent: 0,
        }
    }

    /// Queues a record.
    pub fn send(&mut self, topic: &Topic, partition: i32, payload: &[u8]) {
        loop {
            let record: BaseRecord<'_, (), [u8]> = BaseRecord::to(&topic.name)
                .partition(partition)
                .payload(payload);
            match self.producer.send(record) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err((e, _)) => panic!("cannot produce: {e}"),
            }
        }
        self.sent += 1;
    }

    /// Waits until the broker has confirmed everything.
    pub fn flush(&self) {
        self.producer.flush(TIMEOUT).expect("the broker confirms");
        crate::wait::until("delivery reports", TIMEOUT, || {
            let good = self.delivered.good.load(Ordering::Relaxed);
            let bad = self.delivered.bad.load(Ordering::Relaxed);
            assert_eq!(bad, 0, "records were refused");
            if good == self.sent {
                Ok(())
            } else {
                Err(format!("{good} of {}", self.sent))
            }
        });
    }
}
