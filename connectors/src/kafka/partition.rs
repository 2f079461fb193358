//! One partition being read: messages to chunks, up to a limit.

use std::collections::VecDeque;
use std::sync::Arc;

use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::source::{Chunk, Digest, Rejected};
use millrace_interchange::format::Decoder;
use rdkafka::types::RDKafkaRespErr;

use super::native::{Message, PartitionQueue};

/// Most records of a chunk, and most bytes of one (the last record may pass it).
const CHUNK_RECORDS: usize = 16_384;
const CHUNK_BYTES: u64 = 16 << 20;

/// One partition and where it is.
pub(super) struct Partition {
    topic: Arc<str>,
    split: Arc<str>,
    /// Taken from the queue, not decoded yet: behind a limit, or left over.
    waiting: VecDeque<Message>,
    queue: PartitionQueue,
    decoder: Box<dyn Decoder>,
    /// Everything before it has been handed out or is known to hold no record.
    position: u64,
    /// Of the records in the decoder.
    digest: Digest,
    /// The `end` of the last chunk.
    told: Option<u64>,
    /// Where reading began.
    began: u64,
}

impl Partition {
    /// `told` says whether the engine knows `position` already.
    pub(super) fn new(
        topic: Arc<str>,
        split: Arc<str>,
        queue: PartitionQueue,
        decoder: Box<dyn Decoder>,
        position: u64,
        told: bool,
    ) -> Self {
        let told = told.then_some(position);
        Self {
            topic,
            split,
            queue,
            decoder,
            waiting: VecDeque::new(),
            position,
            digest: Digest::default(),
            told,
            began: position,
        }
    }

    pub(super) fn split(&self) -> &str {
        &self.split
    }

    pub(super) fn at(&self, limit: Option<u64>) -> bool {
        limit.is_some_and(|limit| self.position >= limit)
    }

    /// What can be said without waiting.
    pub(super) fn next_chunk(&mut self, limit: Option<u64>) -> Result<Option<Chunk>> {
        if self.at(limit) {
            return Ok(None);
        }
        // Only then: what has been taken no longer counts against the bound of the queue.
        if self.waiting.is_empty() {
            let waiting = &mut self.waiting;
            self.queue
                .take(CHUNK_RECORDS, |message| waiting.push_back(message));
        }
        let mut rejected = Vec::new();
        let mut bytes = 0;
        while self.decoder.rows() < CHUNK_RECORDS && bytes < CHUNK_BYTES {
            let Some(message) = self.waiting.front() else {
                break;
            };
            let offset = message.offset();
            match message.error() {
                None if limit.is_some_and(|limit| offset >= limit) => {
                    // Nothing is left before the limit. The message stays for a later call.
                    self.position = self.position.max(limit.unwrap_or(0));
                    break;
                }
                // Seen before: a fetch that was repeated.
                None if offset < self.position => {}
                None => {
                    let payload = message.payload().unwrap_or_default();
                    bytes += payload.len() as u64;
                    self.digest.add(offset, payload);
                    if let Some(reject) = decode(self.decoder.as_mut(), &self.split, message) {
                        rejected.push(reject);
                    }
                    self.position = offset + 1;
                }
                // The end: what was passed since the last record are control records.
                Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR__PARTITION_EOF) => {
                    self.position = self.position.max(offset);
                }
                Some(error) => {
                    let error = failure(&self.topic, &self.split, error, message);
                    // Good records before it go out first; the error is met again.
                    if self.decoder.rows() > 0 || !rejected.is_empty() {
                        break;
                    }
                    self.waiting.pop_front();
                    return Err(error);
                }
            }
            self.waiting.pop_front();
        }
        self.chunk(limit, rejected, bytes)
    }

    fn chunk(
        &mut self,
        limit: Option<u64>,
        rejected: Vec<Rejected>,
        bytes: u64,
    ) -> Result<Option<Chunk>> {
        let end = limit.map_or(self.position, |limit| self.position.min(limit));
        let nothing = self.decoder.rows() == 0 && rejected.is_empty();
        if nothing && self.told.is_some_and(|told| told >= end) {
            return Ok(None);
        }
        let begin = self.told.replace(end).unwrap_or(self.began);
        let batch = self.decoder.finish()?.batch;
        let remaining = self
            .queue
            .high_watermark()
            .map(|high| high.saturating_sub(self.position));
        Ok(Some(Chunk {
            split: Arc::clone(&self.split),
            begin,
            end,
            batch,
            diffs: None,
            rejected,
            bytes,
            digest: Some(self.digest.take(&self.split)),
            remaining,
        }))
    }
}

fn decode(decoder: &mut dyn Decoder, split: &str, message: &Message) -> Option<Rejected> {
    let payload = message.payload();
    let reason = match payload {
        None => "empty record".to_string(),
        Some(payload) => decoder.push(payload).err()?.0,
    };
    Some(Rejected {
        split: split.to_string(),
        offset: message.offset(),
        bytes: payload.unwrap_or_default().to_vec(),
        reason,
    })
}

/// What an error on a partition means for its source.
fn failure(topic: &str, split: &str, error: RDKafkaRespErr, message: &Message) -> Error {
    let place = format!("partition {split} of topic \"{topic}\"");
    let detail = message.error_text();
    match error {
        RDKafkaRespErr::RD_KAFKA_RESP_ERR__AUTO_OFFSET_RESET
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR__LOG_TRUNCATION => lost(&place, &detail),
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_ID => Error::new(
            ErrorKind::NotFound,
            format!("{place} does not exist any more"),
        )
        .detail(detail)
        .hint("drop the source, or create it again for the new topic"),
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED => {
            Error::new(ErrorKind::Denied, format!("kafka denies access to {place}"))
        }
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR__BAD_MSG
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR__BAD_COMPRESSION
        | RDKafkaRespErr::RD_KAFKA_RESP_ERR__NOT_IMPLEMENTED => {
            Error::new(ErrorKind::Corrupt, format!("{place} cannot be read")).detail(detail)
        }
        _ => Error::unavailable(format!("{place} cannot be read at the moment")).detail(detail),
    }
}

/// Records that were to be read are not there.
pub(super) fn lost(place: &str, detail: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{place} does not hold the next offset to read"),
    )
    .detail(detail)
    .hint(
        "records were deleted before they were read (retention), or the topic was created anew; \
             drop the source and create it again to read what is there now",
    )
}
