//! The few calls into librdkafka that its Rust wrapper lacks: one queue per partition, read in batches.
//!
//! `BaseConsumer::poll` costs an event and several checks per message and needs a consumer group to
//! be assigned partitions. Here each partition is started at an explicit offset (no group, nothing
//! committed) into a queue of its own, which is emptied many messages at a time. A queue that is not
//! emptied stops being filled, which is how one partition waits while another catches up.
//!
//! All `unsafe` of this crate is in this file. What it relies on:
//! * a topic handle and a queue live no longer than their client: both hold an `Arc` of it;
//! * a message is owned by whoever took it from the queue, and is destroyed once;
//! * the callback of a queue runs on librdkafka's threads under the queue's lock, touches only the
//!   [`Bell`], and is switched off (under the same lock) before the bell is released.

use std::ffi::{CStr, CString, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::bindings as sys;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::types::RDKafkaRespErr;

use super::client::Context;

/// Wakes a reader when one of its queues is no longer empty.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for a ring since the last wait; false when there was none in time.
    pub(super) fn wait(&self, time: Duration) -> bool {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(rung, time, |rung| !*rung);
        let (mut rung, _) = waited.unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *rung)
    }
}

/// A consumer with a handle of one topic.
pub(super) struct TopicHandle {
    topic: NonNull<sys::rd_kafka_topic_t>,
    pub(super) consumer: BaseConsumer<Context>,
}

// SAFETY: librdkafka's handles may be used from any thread.
unsafe impl Send for TopicHandle {}
unsafe impl Sync for TopicHandle {}

impl TopicHandle {
    /// `None` if the name is no topic name.
    pub(super) fn new(consumer: BaseConsumer<Context>, topic: &str) -> Option<Self> {
        let name = CString::new(topic).ok()?;
        // SAFETY: the client is alive, the name is copied, and no configuration means the default.
        let topic = unsafe {
            sys::rd_kafka_topic_new(
                consumer.client().native_ptr(),
                name.as_ptr(),
                ptr::null_mut(),
            )
        };
        Some(Self {
            topic: NonNull::new(topic)?,
            consumer,
        })
    }
}

impl Drop for TopicHandle {
    fn drop(&mut self) {
        // SAFETY: ours, and released before the client, which is dropped after this.
        unsafe { sys::rd_kafka_topic_destroy(self.topic.as_ptr()) }
    }
}

/// The messages of one partition, as they arrive.
pub(super) struct PartitionQueue {
    queue: NonNull<sys::rd_kafka_queue_t>,
    partition: i32,
    buffer: Vec<*mut sys::rd_kafka_message_t>,
    /// What the queue's callback was given, to be released at the end.
    bell: *const Bell,
    topic: Arc<TopicHandle>,
}

// SAFETY: the queue may be used from any thread, the buffer is empty between calls, and the bell is
// shared by locks.
unsafe impl Send for PartitionQueue {}

impl PartitionQueue {
    /// Begins to fetch a partition at `offset`.
    pub(super) fn start(
        topic: Arc<TopicHandle>,
        partition: i32,
        offset: i64,
        bell: Arc<Bell>,
    ) -> Result<Self, String> {
        // SAFETY: the client is alive; the queue is ours until `drop`.
        let queue = unsafe { sys::rd_kafka_queue_new(topic.consumer.client().native_ptr()) };
        let queue = NonNull::new(queue).ok_or("no queue")?;
        let bell = Arc::into_raw(bell);
        let this = Self {
            queue,
            partition,
            buffer: Vec::new(),
            bell,
            topic,
        };
        // SAFETY: queue and topic are alive; the bell is held until the callback is switched off.
        let started = unsafe {
            sys::rd_kafka_queue_cb_event_enable(
                queue.as_ptr(),
                Some(ring),
                bell.cast_mut().cast::<c_void>(),
            );
            sys::rd_kafka_consume_start_queue(
                this.topic.topic.as_ptr(),
                partition,
                offset,
                queue.as_ptr(),
            )
        };
        if started == 0 {
            return Ok(this);
        }
        // SAFETY: plain calls that look at the last error of this thread.
        let reason = unsafe { CStr::from_ptr(sys::rd_kafka_err2str(sys::rd_kafka_last_error())) };
        Err(reason.to_string_lossy().into_owned())
    }

    /// Takes up to `most` messages that are there, without waiting.
    pub(super) fn take(&mut self, most: usize, mut each: impl FnMut(Message)) -> usize {
        self.buffer.resize(most, ptr::null_mut());
        // SAFETY: the buffer has room for `most` pointers.
        let count = unsafe {
            sys::rd_kafka_consume_batch_queue(
                self.queue.as_ptr(),
                0,
                self.buffer.as_mut_ptr(),
                most,
            )
        };
        let count = usize::try_from(count).unwrap_or(0);
        for message in self.buffer.drain(..).take(count) {
            if let Some(message) = NonNull::new(message) {
                each(Message(message));
            }
        }
        count
    }

    /// The end of the partition as the last answer of the broker told it.
    pub(super) fn high_watermark(&self) -> Option<u64> {
        let (mut low, mut high) = (0, 0);
        // SAFETY: the client and the topic's name are alive; the answer comes from memory.
        let error = unsafe {
            sys::rd_kafka_get_watermark_offsets(
                self.topic.consumer.client().native_ptr(),
                sys::rd_kafka_topic_name(self.topic.topic.as_ptr()),
                self.partition,
                &raw mut low,
                &raw mut high,
            )
        };
        if error != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return None;
        }
        u64::try_from(high).ok()
    }
}

impl Drop for PartitionQueue {
    fn drop(&mut self) {
        // SAFETY: first no more fetches, then no more callbacks, then nobody knows queue and bell.
        unsafe {
            sys::rd_kafka_consume_stop(self.topic.topic.as_ptr(), self.partition);
            sys::rd_kafka_queue_cb_event_enable(self.queue.as_ptr(), None, ptr::null_mut());
            sys::rd_kafka_queue_destroy(self.queue.as_ptr());
            drop(Arc::from_raw(self.bell));
        }
    }
}

extern "C" fn ring(_: *mut sys::rd_kafka_t, bell: *mut c_void) {
    // SAFETY: the pointer given at `start`, valid while the callback is on.
    unsafe { &*bell.cast::<Bell>() }.ring();
}

/// A message, or something to tell about the partition.
pub(super) struct Message(NonNull<sys::rd_kafka_message_t>);

// SAFETY: owned; librdkafka allows any thread to read and destroy it.
unsafe impl Send for Message {}

impl Message {
    #[inline]
    fn raw(&self) -> &sys::rd_kafka_message_t {
        // SAFETY: not destroyed before `drop`.
        unsafe { self.0.as_ref() }
    }
    #[inline]
    pub(super) fn offset(&self) -> u64 {
        u64::try_from(self.raw().offset).unwrap_or(0)
    }
    /// `None` for a tombstone.
    #[inline]
    pub(super) fn payload(&self) -> Option<&[u8]> {
        let raw = self.raw();
        if raw.payload.is_null() {
            return None;
        }
        // SAFETY: payload and length belong together and live as long as the message.
        Some(unsafe { std::slice::from_raw_parts(raw.payload.cast::<u8>(), raw.len) })
    }
    /// What happened, if this is no record.
    #[inline]
    pub(super) fn error(&self) -> Option<RDKafkaRespErr> {
        let error = self.raw().err;
        (error != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR).then_some(error)
    }
    pub(super) fn error_text(&self) -> String {
        // SAFETY: answers null or a string that lives as long as the message.
        unsafe {
            let text = sys::rd_kafka_message_errstr(self.0.as_ptr());
            if text.is_null() {
                return String::new();
            }
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: ours, once.
        unsafe { sys::rd_kafka_message_destroy(self.0.as_ptr()) }
    }
}
