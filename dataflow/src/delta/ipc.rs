//! A `Delta` between processes: diffs, then the batch as an Arrow IPC stream.
//!
//! Inside one process a `Delta` crosses threads as it is (its columns are shared, not copied); timely
//! asks for this form only for channels that leave the process.

use std::sync::Arc;

use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use timely::dataflow::channels::ContainerBytes;

use super::{Delta, Diffs};

/// 8 bytes: number of explicit diffs, or `u64::MAX` when all are +1; the diffs; the IPC stream;
/// padding to 8 bytes.
fn encode(delta: &Delta) -> Vec<u8> {
    let mut out = Vec::new();
    match &delta.diffs {
        Diffs::Ones => out.extend_from_slice(&u64::MAX.to_le_bytes()),
        Diffs::Each(each) => {
            out.extend_from_slice(&(each.len() as u64).to_le_bytes());
            for d in each.iter() {
                out.extend_from_slice(&d.to_le_bytes());
            }
        }
    }
    let mut writer =
        StreamWriter::try_new(&mut out, &delta.batch.schema()).expect("writing into memory");
    writer.write(&delta.batch).expect("writing into memory");
    writer.finish().expect("writing into memory");
    drop(writer);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let at = 8 * index;
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl ContainerBytes for Delta {
    fn from_bytes(bytes: timely::bytes::arc::Bytes) -> Self {
        let n = word(&bytes, 0);
        let (diffs, rest) = if n == u64::MAX {
            (Diffs::Ones, 8)
        } else {
            let n = n as usize;
            let each: Vec<i64> = (1..=n).map(|i| word(&bytes, i) as i64).collect();
            (Diffs::Each(Arc::from(each)), 8 + 8 * n)
        };
        let mut reader = StreamReader::try_new(&bytes[rest..], None)
            .expect("a peer of this incarnation wrote it");
        let batch = reader
            .next()
            .expect("one batch")
            .expect("a peer of this incarnation wrote it");
        Self { batch, diffs }
    }
    fn length_in_bytes(&self) -> usize {
        encode(self).len()
    }
    fn into_bytes<W: std::io::Write>(&self, writer: &mut W) {
        writer
            .write_all(&encode(self))
            .expect("timely's buffer has the announced length");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, RecordBatch};

    #[test]
    fn round_trip() {
        let batch = RecordBatch::try_from_iter([(
            "a",
            Arc::new(Int64Array::from(vec![1, 2, 3])) as arrow::array::ArrayRef,
        )])
        .expect("batch");
        for diffs in [Diffs::Ones, Diffs::from_vec(vec![1, -1, 3])] {
            let delta = Delta::new(batch.clone(), diffs);
            let mut bytes = timely::bytes::arc::BytesMut::from(encode(&delta));
            let len = bytes.len();
            let back = Delta::from_bytes(bytes.extract_to(len));
            assert_eq!(back.batch, delta.batch);
            assert_eq!(
                (0..3).map(|i| back.diffs.get(i)).collect::<Vec<_>>(),
                (0..3).map(|i| delta.diffs.get(i)).collect::<Vec<_>>()
            );
        }
    }
}
