//! Readers of a topic: partitions shared out between threads, one client for all of them.
//!
//! Nothing here waits for a broker but `poll`: opening succeeds while Kafka is away. Reader `r` of `n`
//! owns the partitions whose number is `r` modulo `n`, those that appear later included.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::source::{Offsets, Polled, Reader};
use millrace_interchange::format::Layout;
use millrace_interchange::json;

use super::client::Client;
use super::native::{Bell, PartitionQueue};
use super::partition::{Partition, lost};
use super::{KafkaConfig, Start};

/// How often the topic is looked at: new partitions are read, and one that was deleted is an error.
const DISCOVERY: Duration = Duration::from_secs(10);
/// Bounds of a question to the broker, whatever the engine's patience.
const QUESTION_MIN: Duration = Duration::from_millis(500);
const QUESTION_MAX: Duration = Duration::from_secs(5);

pub(super) fn open(
    config: &Arc<KafkaConfig>,
    start: &Offsets,
    layout: &Layout,
    readers: usize,
) -> Result<Vec<Box<dyn Reader>>> {
    let client = Arc::new(Client::new(config)?);
    let count = Arc::new(Mutex::new(Discovered {
        partitions: 0,
        asked: None,
    }));
    let reader = |number| {
        Box::new(KafkaReader {
            config: Arc::clone(config),
            client: Arc::clone(&client),
            discovered: Arc::clone(&count),
            start: start.clone(),
            layout: layout.clone(),
            number,
            readers,
            partitions: Vec::new(),
            opened: 0,
            initial: 0,
            bell: Arc::default(),
            turn: 0,
        }) as Box<dyn Reader>
    };
    Ok((0..readers).map(reader).collect())
}

/// Partitions known so far, shared by the readers of one source.
struct Discovered {
    partitions: usize,
    asked: Option<Instant>,
}

struct KafkaReader {
    // Partitions first: their queues end before the client does.
    partitions: Vec<Partition>,
    client: Arc<Client>,
    config: Arc<KafkaConfig>,
    discovered: Arc<Mutex<Discovered>>,
    start: Offsets,
    layout: Layout,
    number: usize,
    readers: usize,
    /// Partitions below this number have been looked at.
    opened: usize,
    /// Partitions of the first discovery; 0 before it.
    initial: usize,
    bell: Arc<Bell>,
    /// Where the next look begins, so that no partition starves another.
    turn: usize,
}

impl KafkaReader {
    /// Opens the partitions that are there and not open yet.
    fn open_partitions(&mut self, wait: Duration) -> Result<()> {
        let timeout = wait.clamp(QUESTION_MIN, QUESTION_MAX);
        let count = self.discover(timeout)?;
        if self.initial == 0 {
            self.initial = count;
        }
        while self.opened < count {
            if self.opened % self.readers == self.number {
                let partition = self.open_partition(self.opened, timeout)?;
                self.partitions.push(partition);
            }
            self.opened += 1;
        }
        Ok(())
    }

    /// Number of partitions, asked for at times.
    fn discover(&self, timeout: Duration) -> Result<usize> {
        let mut known = self
            .discovered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.asked.is_some_and(|asked| asked.elapsed() < DISCOVERY) {
            return Ok(known.partitions);
        }
        let found = match self.client.partitions(timeout) {
            // What is open goes on by itself; new partitions can wait for the broker.
            Err(e) if e.kind == ErrorKind::Unavailable && known.partitions > 0 => {
                known.asked = Some(Instant::now());
                return Ok(known.partitions);
            }
            found => found?,
        };
        let topic = &self.config.topic;
        let expected = self
            .start
            .0
            .keys()
            .filter_map(|split| split.parse::<usize>().ok())
            .max();
        let expected = expected.map_or(0, |last| last + 1).max(known.partitions);
        if found < expected {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("topic \"{topic}\" has {found} partitions, {expected} were read before"),
            )
            .hint("the topic was created anew; drop the source and create it again"));
        }
        *known = Discovered {
            partitions: found,
            asked: Some(Instant::now()),
        };
        Ok(found)
    }

    fn open_partition(&self, partition: usize, timeout: Duration) -> Result<Partition> {
        let split = partition.to_string();
        let (low, high) = self.client.range(partition, timeout)?;
        let known = self.start.0.get(&split).copied();
        let position = match known {
            Some(offset) if !(low..=high).contains(&offset) => {
                let place = format!("partition {split} of topic \"{}\"", self.config.topic);
                let detail =
                    format!("next is offset {offset}, the partition holds {low} to {high}");
                return Err(lost(&place, &detail));
            }
            Some(offset) => offset,
            // A partition that was added while others were read is new from its first record on.
            None if self.begins_latest(partition) => high,
            None => low,
        };
        let queue = PartitionQueue::start(
            Arc::clone(&self.client.handle),
            i32::try_from(partition).unwrap_or(i32::MAX),
            i64::try_from(position).unwrap_or(i64::MAX),
            Arc::clone(&self.bell),
        );
        let queue = queue.map_err(|reason| {
            Error::internal(format!("partition {split} cannot be started: {reason}"))
        })?;
        let decoder = json::decoder(&self.layout)?;
        let topic = self.config.topic.as_str().into();
        Ok(Partition::new(
            topic,
            split.into(),
            queue,
            decoder,
            position,
            known.is_some(),
        ))
    }

    /// `start = 'latest'` speaks of the partitions that are there when the source is first opened.
    fn begins_latest(&self, partition: usize) -> bool {
        self.config.start == Start::Latest && self.start.0.is_empty() && partition < self.initial
    }

    /// A chunk of the next partition in turn that has one.
    fn next_chunk(&mut self, limit: Option<&Offsets>) -> Result<Option<Polled>> {
        let count = self.partitions.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            let partition = &mut self.partitions[index];
            let limit = limit_of(limit, partition.split());
            if let Some(chunk) = partition.next_chunk(limit)? {
                self.turn = index + 1;
                return Ok(Some(Polled::Chunk(chunk)));
            }
        }
        Ok(None)
    }

    fn at_limit(&self, limit: Option<&Offsets>) -> bool {
        limit.is_some()
            && self
                .partitions
                .iter()
                .all(|p| p.at(limit_of(limit, p.split())))
    }
}

/// The limit of one split; a split that a limit does not name yields nothing.
fn limit_of(limit: Option<&Offsets>, split: &str) -> Option<u64> {
    limit.map(|limit| limit.0.get(split).copied().unwrap_or(0))
}

impl Reader for KafkaReader {
    fn poll(&mut self, limit: Option<&Offsets>, wait: Duration) -> Result<Polled> {
        let began = Instant::now();
        self.client.check()?;
        self.open_partitions(wait)?;
        loop {
            if let Some(chunk) = self.next_chunk(limit)? {
                return Ok(chunk);
            }
            if self.at_limit(limit) {
                return Ok(Polled::AtLimit);
            }
            let left = wait.saturating_sub(began.elapsed());
            if left.is_zero() || !self.bell.wait(left) {
                self.client.check()?;
                self.client.still_there()?;
                return Ok(Polled::Idle);
            }
        }
    }
}
