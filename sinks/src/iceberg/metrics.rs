//! What a manifest says about a data file, from the file's own footer.
//!
//! A bound must hold for every value of the column in the file; it need not be a value. A row group
//! with values but without statistics therefore leaves the column without bounds: none is right, one
//! from the other row groups would hide rows.

use std::collections::{HashMap, HashSet};

use iceberg::spec::{
    DataContentType, DataFile, DataFileBuilder, DataFileFormat, Datum, PrimitiveType, Struct, Type,
};
use millrace_dataflow::error::{Error, Result};
use parquet::data_type::AsBytes;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::statistics::Statistics;

use super::layout::Layout;

/// Describes a closed file.
pub(super) fn data_file(
    layout: &Layout,
    location: String,
    size: u64,
    footer: &ParquetMetaData,
    nans: HashMap<i32, u64>,
) -> Result<DataFile> {
    let (mut sizes, mut values, mut nulls) = (HashMap::new(), HashMap::new(), HashMap::new());
    let (mut lower, mut upper) = (HashMap::new(), HashMap::new());
    let mut unbounded = HashSet::new();
    for chunk in footer.row_groups().iter().flat_map(|group| group.columns()) {
        let info = chunk.column_descr().self_type().get_basic_info();
        if !info.has_id() {
            continue;
        }
        let id = info.id();
        *sizes.entry(id).or_insert(0) += chunk.compressed_size() as u64;
        // Counts and bounds inside lists mean something else.
        if chunk.column_descr().max_rep_level() > 0 {
            continue;
        }
        let Some(Type::Primitive(kind)) = layout.columns.field_by_id(id).map(|f| &*f.field_type)
        else {
            continue;
        };
        let count = chunk.num_values() as u64;
        *values.entry(id).or_insert(0) += count;
        let Some(statistics) = chunk.statistics() else {
            unbounded.insert(id);
            continue;
        };
        let null_count = statistics.null_count_opt();
        if let Some(null_count) = null_count {
            *nulls.entry(id).or_insert(0) += null_count;
        }
        if null_count == Some(count) {
            continue;
        }
        match (
            bound(kind, statistics, false),
            bound(kind, statistics, true),
        ) {
            (Some(min), Some(max)) => {
                keep(&mut lower, id, min, |new, old| new < old);
                keep(&mut upper, id, max, |new, old| new > old);
            }
            _ => {
                unbounded.insert(id);
            }
        }
    }
    lower.retain(|id, _| !unbounded.contains(id));
    upper.retain(|id, _| !unbounded.contains(id));
    DataFileBuilder::default()
        .content(DataContentType::Data)
        .file_path(location)
        .file_format(DataFileFormat::Parquet)
        .partition(Struct::empty())
        .partition_spec_id(layout.partition_spec)
        .record_count(footer.file_metadata().num_rows() as u64)
        .file_size_in_bytes(size)
        .column_sizes(sizes)
        .value_counts(values)
        .null_value_counts(nulls)
        .nan_value_counts(nans)
        .lower_bounds(lower)
        .upper_bounds(upper)
        .split_offsets(Some(
            footer
                .row_groups()
                .iter()
                .filter_map(|g| g.file_offset())
                .collect(),
        ))
        .build()
        .map_err(|e| Error::internal(format!("cannot describe a data file: {e}")))
}

fn keep(
    bounds: &mut HashMap<i32, Datum>,
    id: i32,
    datum: Datum,
    replaces: impl Fn(&Datum, &Datum) -> bool,
) {
    match bounds.get(&id) {
        Some(old) if !replaces(&datum, old) => {}
        _ => {
            bounds.insert(id, datum);
        }
    }
}

/// Smallest or largest value of a column chunk, or something beyond it.
fn bound(kind: &PrimitiveType, statistics: &Statistics, max: bool) -> Option<Datum> {
    use PrimitiveType as T;
    use Statistics as S;
    macro_rules! value {
        ($statistics:expr) => {
            *(if max {
                $statistics.max_opt()
            } else {
                $statistics.min_opt()
            })?
        };
    }
    let bytes = || {
        if max {
            statistics.max_bytes_opt()
        } else {
            statistics.min_bytes_opt()
        }
    };
    Some(match (kind, statistics) {
        (T::Boolean, S::Boolean(s)) => Datum::bool(value!(s)),
        (T::Int, S::Int32(s)) => Datum::int(value!(s)),
        (T::Date, S::Int32(s)) => Datum::date(value!(s)),
        (T::Long, S::Int64(s)) => Datum::long(value!(s)),
        (T::Time, S::Int64(s)) => Datum::time_micros(value!(s)).ok()?,
        (T::Timestamp, S::Int64(s)) => Datum::timestamp_micros(value!(s)),
        (T::Timestamptz, S::Int64(s)) => Datum::timestamptz_micros(value!(s)),
        (T::Float, S::Float(s)) => Datum::float(value!(s)),
        (T::Double, S::Double(s)) => Datum::double(value!(s)),
        (T::String, S::ByteArray(_)) => Datum::string(std::str::from_utf8(bytes()?).ok()?),
        (T::Binary, S::ByteArray(_)) => Datum::binary(bytes()?.to_vec()),
        // Iceberg's form of a decimal is big-endian, as Parquet's is in byte arrays.
        (T::Decimal { .. }, S::FixedLenByteArray(_)) => {
            Datum::try_from_bytes(bytes()?, kind.clone()).ok()?
        }
        (T::Decimal { .. }, S::Int32(s)) => {
            Datum::try_from_bytes(value!(s).to_be_bytes().as_bytes(), kind.clone()).ok()?
        }
        (T::Decimal { .. }, S::Int64(s)) => {
            Datum::try_from_bytes(value!(s).to_be_bytes().as_bytes(), kind.clone()).ok()?
        }
        _ => return None,
    })
}
