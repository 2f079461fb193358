//! What the digest of records costs, by their size: nanoseconds of CPU per record.

use std::hint::black_box;

use anyhow::Result;
use millrace_dataflow::source::Digest;

use crate::report::Stopwatch;

const RECORDS: u64 = 5_000_000;

pub(crate) fn run() -> Result<()> {
    for bytes in [16, 64, 150, 300, 1000] {
        let payloads: Vec<Vec<u8>> = (0..1024_u64)
            .map(|i| (0..bytes).map(|b| (b as u64 * 31 + i) as u8).collect())
            .collect();
        let mut digest = Digest::default();
        let watch = Stopwatch::start();
        for offset in 0..RECORDS {
            digest.add(offset, black_box(&payloads[offset as usize % 1024]));
        }
        let (_, cpu_s) = watch.stop();
        black_box(digest.take("0"));
        println!(
            "{{\"suite\":\"digest\",\"record_bytes\":{bytes},\"ns_per_record\":{:.1}}}",
            cpu_s * 1e9 / RECORDS as f64
        );
    }
    Ok(())
}
