//! A `Delta` between processes: diffs, then the batch as an Arrow IPC stream.
//!
//! Inside one process a `Delta` crosses threads as it is (its columns are shared, not copied); timely
//! asks for this form only for channels that leave the process.

use std::cell::RefCell;
use std::sync::Arc;

use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use timely::dataflow::channels::ContainerBytes;

use super::{Delta, Diffs};
use crate::error::{Error, Result};

/// 8 bytes: number of explicit diffs, or `u64::MAX` when all are +1; the diffs; the IPC stream;
/// padding to 8 bytes.
pub fn encode(delta: &Delta) -> Vec<u8> {
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

fn word(bytes: &[u8], index: usize) -> Result<u64> {
    let word = bytes.get(8 * index..).and_then(|rest| rest.first_chunk());
    word.map(|word| u64::from_le_bytes(*word))
        .ok_or_else(|| damaged("it is too short"))
}

fn damaged(why: &str) -> Error {
    Error::internal("rows from another process cannot be read").detail(why)
}

/// Reads what [`encode`] wrote.
pub fn decode(bytes: &[u8]) -> Result<Delta> {
    let n = word(bytes, 0)?;
    let (diffs, rest) = if n == u64::MAX {
        (Diffs::Ones, 8)
    } else {
        let n = n as usize;
        if n > bytes.len() / 8 {
            return Err(damaged("it is too short"));
        }
        let each: Result<Vec<i64>> = (1..=n).map(|i| Ok(word(bytes, i)? as i64)).collect();
        (Diffs::Each(Arc::from(each?)), 8 + 8 * n)
    };
    let batch = StreamReader::try_new(&bytes[rest..], None)
        .and_then(|mut reader| reader.next().transpose())
        .map_err(|e| damaged(&e.to_string()))?
        .ok_or_else(|| damaged("it holds no batch"))?;
    if let Diffs::Each(each) = &diffs
        && each.len() != batch.num_rows()
    {
        return Err(damaged("it has another number of diffs than rows"));
    }
    Ok(Delta { batch, diffs })
}

thread_local! {
    /// The form of the delta whose length was asked for last, and where it stands.
    static ASKED: RefCell<Option<(usize, usize, Vec<u8>)>> = const { RefCell::new(None) };
}

/// Where a delta stands, and its rows.
fn place(delta: &Delta) -> (usize, usize) {
    let rows = delta
        .batch
        .columns()
        .first()
        .map_or(0, |c| Arc::as_ptr(c).addr());
    (std::ptr::from_ref(delta).addr(), rows)
}

impl ContainerBytes for Delta {
    fn from_bytes(bytes: timely::bytes::arc::Bytes) -> Self {
        decode(&bytes).expect("a peer of this incarnation wrote it")
    }
    fn length_in_bytes(&self) -> usize {
        let bytes = encode(self);
        let length = bytes.len();
        // Timely asks for the bytes next: they need not be made twice.
        let (at, rows) = place(self);
        ASKED.set(Some((at, rows, bytes)));
        length
    }
    fn into_bytes<W: std::io::Write>(&self, writer: &mut W) {
        let asked = ASKED
            .take()
            .filter(|(at, rows, _)| (*at, *rows) == place(self));
        let bytes = asked.map_or_else(|| encode(self), |(_, _, bytes)| bytes);
        writer
            .write_all(&bytes)
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
