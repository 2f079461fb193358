//! A client of one topic: configuration, questions about the topic, and whether brokers are there.
//!
//! Creating a client does not touch the network; every question has a time-out and is `Unavailable`
//! when nobody answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millrace_dataflow::error::{Error, ErrorKind, Result};
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;

use super::KafkaConfig;
use super::native::TopicHandle;
use crate::options::closest;

/// How long a broker may take to answer when a source is created.
pub(super) const CREATION_TIMEOUT: Duration = Duration::from_secs(5);

/// Puts librdkafka's lines into our log.
pub(super) struct Context;

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
                tracing::warn!(facility, message, "kafka client");
            }
            // An absent broker is reported by `poll`; its many lines are for those who ask.
            _ => tracing::debug!(facility, message, "kafka client"),
        }
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka client");
    }
}

impl ConsumerContext for Context {}

/// A client of the topic of one source.
pub(super) struct Client {
    pub(super) handle: Arc<TopicHandle>,
    config: Arc<KafkaConfig>,
    /// The client has said that no broker is reachable, and nobody has answered since.
    away: AtomicBool,
}

impl Client {
    pub(super) fn new(config: &Arc<KafkaConfig>) -> Result<Self> {
        let consumer = client_config(&config.servers).create_with_context(Context);
        let consumer: BaseConsumer<Context> = consumer.map_err(|e| {
            Error::invalid("kafka client cannot be configured")
                .detail(e.to_string())
                .hint("bootstrap_servers is a list such as 'host1:9092,host2:9092'")
        })?;
        let handle = TopicHandle::new(consumer, &config.topic).ok_or_else(|| {
            Error::invalid(format!(
                "\"{}\" cannot be the name of a topic",
                config.topic
            ))
        })?;
        Ok(Self {
            handle: Arc::new(handle),
            config: Arc::clone(config),
            away: false.into(),
        })
    }

    /// Number of partitions. A missing topic is `NotFound`.
    pub(super) fn partitions(&self, timeout: Duration) -> Result<usize> {
        let topic = &self.config.topic;
        let metadata = self.handle.consumer.fetch_metadata(Some(topic), timeout);
        let metadata = metadata.map_err(|e| self.question_failed(&e))?;
        self.away.store(false, Ordering::Relaxed);
        let found = metadata.topics().iter().find(|t| t.name() == topic);
        let error = found.and_then(|t| t.error());
        match (found, error) {
            (Some(found), None) if !found.partitions().is_empty() => Ok(found.partitions().len()),
            (_, Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED)) => {
                Err(Error::new(
                    ErrorKind::Denied,
                    format!("kafka denies access to topic \"{topic}\""),
                ))
            }
            (_, Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_EXCEPTION)) => Err(Error::invalid(
                format!("\"{topic}\" cannot be the name of a topic"),
            )),
            (None, _) | (_, Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)) => {
                Err(self.topic_missing(timeout))
            }
            // A topic that is being created has partitions or leaders in a moment.
            _ => Err(Error::unavailable(format!(
                "topic \"{topic}\" is not ready"
            ))),
        }
    }

    /// First offset held and next offset to be written.
    pub(super) fn range(&self, partition: usize, timeout: Duration) -> Result<(u64, u64)> {
        let number = i32::try_from(partition).unwrap_or(i32::MAX);
        let range = self
            .handle
            .consumer
            .fetch_watermarks(&self.config.topic, number, timeout);
        let (low, high) = range.map_err(|e| self.question_failed(&e))?;
        Ok((
            u64::try_from(low).unwrap_or(0),
            u64::try_from(high).unwrap_or(0),
        ))
    }

    /// Takes in what the client has to tell. `Err` if it cannot go on, or if no broker answers.
    pub(super) fn check(&self) -> Result<()> {
        while let Some(event) = self.handle.consumer.poll(Duration::ZERO) {
            match event {
                Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AllBrokersDown)) => {
                    self.away.store(true, Ordering::Relaxed);
                }
                Err(KafkaError::MessageConsumption(RDKafkaErrorCode::Authentication)) => {
                    return Err(Error::new(
                        ErrorKind::Denied,
                        "kafka refuses the credentials",
                    ));
                }
                Err(KafkaError::MessageConsumptionFatal(code)) => {
                    return Err(Error::internal(format!("kafka client failed: {code}")));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// If the brokers are said to be away: asks once more, and tells.
    pub(super) fn still_there(&self) -> Result<()> {
        if self.away.load(Ordering::Relaxed) {
            self.partitions(Duration::from_millis(500))?;
        }
        Ok(())
    }

    fn question_failed(&self, error: &KafkaError) -> Error {
        if let Some(RDKafkaErrorCode::UnknownTopicOrPartition) = error.rdkafka_error_code() {
            return self.topic_missing(Duration::from_secs(1));
        }
        Error::unavailable(format!("kafka at {} does not answer", self.config.servers))
            .detail(error.to_string())
            .hint(
                "check bootstrap_servers and that the broker runs; with validate = 'off' a source \
                 can be created before its broker is there",
            )
    }

    pub(super) fn topic_missing(&self, timeout: Duration) -> Error {
        let topic = &self.config.topic;
        let error = Error::new(
            ErrorKind::NotFound,
            format!("topic \"{topic}\" does not exist"),
        );
        let Ok(metadata) = self.handle.consumer.fetch_metadata(None, timeout) else {
            return error;
        };
        let names = metadata
            .topics()
            .iter()
            .map(|t| t.name())
            .filter(|n| !n.starts_with("__"));
        let broker = &self.config.servers;
        error.hint(match closest(topic, names.clone()) {
            Some(name) => format!("did you mean \"{name}\"?"),
            None if names.clone().count() == 0 => format!("the broker at {broker} has no topics"),
            None => format!("the broker at {broker} has {} other topics", names.count()),
        })
    }
}

fn client_config(servers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", servers)
        .set("client.id", "millrace")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_committed")
        // Tells that a partition is read up to its end, control records included.
        .set("enable.partition.eof", "true")
        .set("allow.auto.create.topics", "false")
        .set("enable.metrics.push", "false")
        // Large answers, and enough of them waiting that decoding never does. The bound holds for each
        // partition; more than 8 MB gained nothing when measured.
        .set("fetch.message.max.bytes", "4194304")
        .set("fetch.max.bytes", "52428800")
        .set("receive.message.max.bytes", "134217728")
        .set("queued.min.messages", "200000")
        .set("queued.max.messages.kbytes", "8192")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.error.backoff.ms", "100")
        // An answer leaves the broker as soon as there is one record; this is only how long an idle
        // broker holds the question, so a short time would cost CPU and gain nothing.
        .set("fetch.min.bytes", "1")
        .set("fetch.wait.max.ms", "250")
        .set("reconnect.backoff.max.ms", "2000")
        // A connection whose other end is gone without a word is given up after this.
        .set("socket.timeout.ms", "15000")
        .set("socket.connection.setup.timeout.ms", "5000")
        .set("topic.metadata.refresh.interval.ms", "30000")
        // How soon a topic that was deleted is an error.
        .set("topic.metadata.propagation.max.ms", "5000")
        .set_log_level(RDKafkaLogLevel::Warning);
    config
}
