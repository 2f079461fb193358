//! Bids as JSON in a topic, produced before the clock starts.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result};
use arrow::array::AsArray;
use arrow::datatypes::{Int64Type, TimestampMicrosecondType};
use millrace_dataflow::source::{Offsets, Polled};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

/// Fills a topic with the bids of `events` events (once; its name tells the count) and gives the
/// statement that reads it.
pub(crate) fn source(bootstrap: &str, events: u64) -> Result<String> {
    let topic = format!("nexmark-bid-{events}");
    fill(bootstrap, &topic, events).with_context(|| format!("cannot fill topic {topic}"))?;
    Ok(format!(
        "CREATE SOURCE bid (auction BIGINT, bidder BIGINT, price BIGINT, channel TEXT, url TEXT, \
         date_time TIMESTAMP, extra TEXT, WATERMARK FOR date_time AS date_time) \
         WITH (connector = 'kafka', bootstrap_servers = '{bootstrap}', topic = '{topic}', format = 'json')"
    ))
}

fn fill(bootstrap: &str, topic: &str, events: u64) -> Result<()> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        .set("queue.buffering.max.messages", "2000000")
        .set("linger.ms", "20");
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let created = futures_block(admin.create_topics(
        &[NewTopic::new(topic, 2, TopicReplication::Fixed(1))],
        &AdminOptions::new(),
    ))?;
    match &created[0] {
        Ok(_) => {}
        Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => return Ok(()),
        Err((_, code)) => anyhow::bail!("{code}"),
    }
    let producer: BaseProducer = config.create()?;
    let options = [
        ("kind", "nexmark".to_string()),
        ("table", "bid".to_string()),
        ("seed", "1".to_string()),
        ("max_events", events.to_string()),
    ];
    let options = options
        .into_iter()
        .map(|(k, v)| (k.to_string(), v))
        .collect();
    let generator =
        millrace_connectors::create("generator", &options, &arrow::datatypes::Schema::empty())?;
    let all: Vec<usize> = (0..generator.schema().fields().len()).collect();
    let mut count = 0u64;
    let mut line = String::new();
    for mut reader in generator.open(&Offsets::default(), &all)? {
        loop {
            let chunk = match reader.poll(None, Duration::from_secs(1))? {
                Polled::Chunk(chunk) => chunk,
                Polled::Idle => continue,
                Polled::AtLimit | Polled::End => break,
            };
            let b = &chunk.batch;
            let int = |i: usize| b.column(i).as_primitive::<Int64Type>();
            let text = |i: usize| b.column(i).as_string::<i32>();
            let time = b.column(5).as_primitive::<TimestampMicrosecondType>();
            for row in 0..b.num_rows() {
                let at = time.value_as_datetime(row).context("a time")?;
                line.clear();
                write!(
                    line,
                    r#"{{"auction":{},"bidder":{},"price":{},"channel":"{}","url":"{}","date_time":"{}","extra":"{}"}}"#,
                    int(0).value(row),
                    int(1).value(row),
                    int(2).value(row),
                    text(3).value(row),
                    text(4).value(row),
                    at.format("%Y-%m-%dT%H:%M:%S%.3f"),
                    text(6).value(row)
                )?;
                let mut record = BaseRecord::<(), str>::to(topic)
                    .partition((count % 2) as i32)
                    .payload(&line);
                while let Err((e, back)) = producer.send(record) {
                    if e.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                        return Err(e.into());
                    }
                    producer.poll(Duration::from_millis(20));
                    record = back;
                }
                count += 1;
            }
            producer.poll(Duration::ZERO);
        }
    }
    producer.flush(Duration::from_secs(60))?;
    Ok(())
}

fn futures_block<F: Future>(future: F) -> F::Output {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(future))
}
