//! Relations in which the server shows itself, named `millrace.…`.

use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

/// Names of all of them.
pub const NAMES: &[&str] = &[STATE];

/// State by relation, operator and worker.
pub const STATE: &str = "millrace.state";

/// The columns of a system relation, if there is one of this name.
pub fn relation(name: &str) -> Option<SchemaRef> {
    (name == STATE).then(|| Arc::clone(&STATE_SCHEMA))
}

static STATE_SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    let column = |name: &str, data_type| Field::new(name, data_type, true);
    let number = |name| column(name, DataType::Int64);
    Arc::new(Schema::new(vec![
        column("relation", DataType::Utf8),
        column("kind", DataType::Utf8),
        column("operator", DataType::Utf8),
        number("worker"),
        number("rows"),
        number("bytes_resident"),
        number("bytes_paged"),
        // Those that hold rows, of 256.
        number("key_groups"),
        // As of the last checkpoint: `group:rows written since the one before`, most first.
        column("hottest_groups", DataType::Utf8),
        // No row is older.
        column(
            "oldest_row",
            DataType::Timestamp(TimeUnit::Microsecond, None),
        ),
    ]))
});
