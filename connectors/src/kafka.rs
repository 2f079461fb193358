//! A Kafka topic: one split per partition, one record per message.
//!
//! # Contract
//!
//! * Offsets are ours: every partition is read from an explicit offset, no consumer group is joined
//!   and nothing is committed to Kafka. `start` decides once, where the source is opened for the first
//!   time; the offsets it meant are reported by a chunk without rows, so that a restart keeps them.
//! * Nothing is skipped: an offset that the topic no longer holds (retention), or does not hold yet
//!   (the topic was created anew), stops the source with the reason.
//! * Only committed transactions are read. Gaps in the offsets (control records, compaction) are
//!   normal; that a partition is read up to a limit is told by its position, not by the record seen.
//! * A broker that is away is `Unavailable` from `poll`; the client reconnects by itself.

use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::source::{Offsets, Reader, Source};
use millrace_interchange::format::Layout;
use millrace_interchange::json;

use crate::options::{ConnectorInfo, Options, option};

mod client;
mod native;
mod partition;
mod reader;
#[cfg(test)]
mod tests;

use client::Client;

pub(crate) const INFO: ConnectorInfo = ConnectorInfo {
    name: "kafka",
    options: &[
        option(
            "bootstrap_servers",
            "host:port of one or more brokers, separated by commas",
        ),
        option("topic", "name of the topic"),
        option("format", "json: one object per message"),
        option(
            "start",
            "where a new source begins: earliest (default) or latest",
        ),
        option(
            "validate",
            "on (default): broker and topic must be there at creation; off",
        ),
    ],
};

/// Readers per source: more threads than this would fight for the engine's cores.
const READERS: usize = 2;

#[derive(Debug, Clone)]
pub(crate) struct KafkaSource {
    schema: SchemaRef,
    config: Arc<KafkaConfig>,
    validate: bool,
}

#[derive(Debug)]
struct KafkaConfig {
    servers: String,
    topic: String,
    start: Start,
}

/// Where a partition begins that has never been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Earliest,
    Latest,
}

impl KafkaSource {
    pub(crate) fn new(options: &Options<'_>, columns: &Schema) -> Result<Self> {
        let config = KafkaConfig {
            servers: options.required("bootstrap_servers")?.to_string(),
            topic: options.required("topic")?.to_string(),
            start: match options.word("start", &["earliest", "latest"])? {
                "earliest" => Start::Earliest,
                _ => Start::Latest,
            },
        };
        options.required_word("format", &["json"])?;
        if columns.fields().is_empty() {
            return Err(
                Error::invalid("a source over kafka needs its columns declared")
                    .hint("for example: CREATE SOURCE s (id BIGINT, name VARCHAR) WITH (…)"),
            );
        }
        let source = Self {
            schema: Arc::new(columns.clone()),
            config: Arc::new(config),
            validate: options.word("validate", &["on", "off"])? == "on",
        };
        // Types that the format cannot read are an error now, not when rows arrive.
        json::decoder(&source.layout(&[]))?;
        Ok(source)
    }

    /// Whether the broker answers and has the topic.
    pub(crate) fn validate(&self) -> Result<()> {
        if !self.validate {
            return Ok(());
        }
        Client::new(&self.config)?
            .partitions(client::CREATION_TIMEOUT)
            .map(drop)
    }

    fn layout(&self, projection: &[usize]) -> Layout {
        Layout {
            schema: Arc::clone(&self.schema),
            projection: projection.to_vec(),
            changelog: None,
        }
    }
}

impl Source for KafkaSource {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
    fn open(&self, start: &Offsets, projection: &[usize]) -> Result<Vec<Box<dyn Reader>>> {
        reader::open(&self.config, start, &self.layout(projection), READERS)
    }
    fn bounded(&self) -> bool {
        false
    }
    fn append_only(&self) -> bool {
        true
    }
    fn begins_where_first_read(&self) -> bool {
        self.config.start == Start::Latest
    }
}
