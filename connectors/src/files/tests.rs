use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use ::parquet::arrow::ArrowWriter;
use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type};
use millrace_dataflow::source::{Chunk, Polled};
use tempfile::TempDir;

use super::*;

fn source(options: &[(&str, &str)], columns: &[(&str, DataType)]) -> Result<FilesSource> {
    let map: BTreeMap<String, String> = options
        .iter()
        .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
        .collect();
    let fields = columns.iter().map(|(n, t)| Field::new(*n, t.clone(), true));
    let schema = Schema::new(fields.collect::<Vec<_>>());
    FilesSource::new(&Options::new(&INFO, &map).unwrap(), &schema)
}

fn chunks(source: &FilesSource, start: &Offsets, limit: Option<&Offsets>) -> Vec<Chunk> {
    let all: Vec<usize> = (0..source.schema().fields().len()).collect();
    let mut reader = source.open(start, &all).unwrap().remove(0);
    let mut chunks = Vec::new();
    loop {
        match reader.poll(limit, Duration::ZERO).unwrap() {
            Polled::Chunk(chunk) => chunks.push(chunk),
            Polled::End => {
                assert!(limit.is_none());
                return chunks;
            }
            Polled::AtLimit => return chunks,
            Polled::Idle => panic!("idle"),
        }
    }
}

fn ids(chunks: &[Chunk]) -> Vec<i64> {
    let column = |c: &Chunk| {
        c.batch
            .column(0)
            .as_primitive::<Int64Type>()
            .values()
            .to_vec()
    };
    chunks.iter().flat_map(column).collect()
}

fn write(dir: &TempDir, name: &str, text: &str) -> String {
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

const ID: (&str, DataType) = ("id", DataType::Int64);

#[test]
fn lines_of_several_files_in_order_with_rejects() {
    let dir = TempDir::new().unwrap();
    let b = write(&dir, "b.json", "{\"id\":4}\n\n{\"id\":\"x\"}\r\n{\"id\":5}");
    let a = write(&dir, "a.json", "{\"id\":1}\n{\"id\":2}\n{\"id\":3}\n");
    write(&dir, "_note.json", "no");
    write(&dir, "other.txt", "no");
    let pattern = dir.path().join("*.json");
    let path = pattern.to_str().unwrap();
    let source = source(&[("path", path), ("format", "json")], &[ID]).unwrap();
    assert!(source.bounded() && source.append_only());
    let all = chunks(&source, &Offsets::default(), None);
    assert_eq!(ids(&all), [1, 2, 3, 4, 5]);
    assert_eq!(
        all.iter()
            .map(|c| (c.split.to_string(), c.end))
            .collect::<Vec<_>>(),
        [(a.clone(), 3), (b.clone(), 3)]
    );
    let rejected = &all[1].rejected[0];
    assert_eq!(
        (rejected.offset, rejected.bytes.as_slice()),
        (1, &b"{\"id\":\"x\"}"[..])
    );
    assert_eq!(
        rejected.reason,
        "column \"id\": expected BIGINT, found text"
    );
    // From the middle of both, and only up to a limit.
    let start = Offsets([(a.clone(), 1), (b.clone(), 2)].into());
    assert_eq!(ids(&chunks(&source, &start, None)), [2, 3, 5]);
    let limit = Offsets([(a.clone(), 2), (b.clone(), 3)].into());
    assert_eq!(ids(&chunks(&source, &start, Some(&limit))), [2, 5]);
    // What a limit does not name yields nothing, and reading goes on behind it.
    let mut reader = source.open(&start, &[0]).unwrap().remove(0);
    let only_b = Offsets([(b.clone(), 3)].into());
    let Polled::Chunk(first) = reader.poll(Some(&only_b), Duration::ZERO).unwrap() else {
        panic!()
    };
    assert_eq!(ids(&[first]), [5]);
    assert!(matches!(
        reader.poll(Some(&only_b), Duration::ZERO).unwrap(),
        Polled::AtLimit
    ));
    let Polled::Chunk(rest) = reader.poll(None, Duration::ZERO).unwrap() else {
        panic!()
    };
    assert_eq!(ids(&[rest]), [2, 3]);
}

#[test]
fn what_was_read_must_still_be_there() {
    let dir = TempDir::new().unwrap();
    let a = write(&dir, "a.json", "{\"id\":1}\n{\"id\":2}\n");
    let path = dir.path().to_str().unwrap();
    let source = source(&[("path", path), ("format", "json")], &[ID]).unwrap();
    let past = Offsets([(a.clone(), 3)].into());
    let mut reader = source.open(&past, &[0]).unwrap().remove(0);
    assert_eq!(
        reader.poll(None, Duration::ZERO).unwrap_err().kind,
        ErrorKind::Corrupt
    );
    let mut reader = source.open(&Offsets::default(), &[0]).unwrap().remove(0);
    assert!(matches!(
        reader.poll(Some(&past), Duration::ZERO).unwrap(),
        Polled::Chunk(_)
    ));
    assert_eq!(
        reader.poll(Some(&past), Duration::ZERO).unwrap_err().kind,
        ErrorKind::Corrupt
    );
    let gone = Offsets([("/nowhere/else.json".to_string(), 1)].into());
    assert_eq!(
        source.open(&gone, &[0]).err().unwrap().kind,
        ErrorKind::NotFound
    );
    fs::remove_file(&a).unwrap();
    let mut reader = source.open(&Offsets::default(), &[0]).unwrap().remove(0);
    assert_eq!(
        reader.poll(None, Duration::ZERO).unwrap_err().kind,
        ErrorKind::NotFound
    );
    // A server starts without them; it is a source that is created that needs them.
    let source = self::source(&[("path", path), ("format", "json")], &[ID]).unwrap();
    assert!(source.open(&Offsets::default(), &[0]).is_err());
    let error = source.validate().unwrap_err();
    assert_eq!((error.kind, error.code), (ErrorKind::NotFound, "58P01"));
}

#[test]
fn a_changelog_loses_its_sign_column() {
    let dir = TempDir::new().unwrap();
    let text = "op,id,name\n+,1,\"two\nlines\"\n-,1,\"two\nlines\"\n*,3,c\n+,4,\n";
    let path = write(&dir, "a.csv", text);
    let options = [
        ("path", path.as_str()),
        ("format", "csv"),
        ("changelog", "op"),
    ];
    let text = DataType::Utf8;
    let declared = [("op", text.clone()), ID, ("name", text)];
    for columns in [&declared[..], &declared[1..], &[]] {
        let source = source(&options, columns).unwrap();
        let names: Vec<_> = source
            .schema()
            .fields()
            .iter()
            .map(|f| f.name().clone())
            .collect();
        assert_eq!(names, ["id", "name"]);
        assert!(!source.append_only());
        let all = chunks(&source, &Offsets::default(), None);
        assert_eq!(ids(&all), [1, 1, 4]);
        assert_eq!(all[0].diffs, Some(vec![1, -1, 1]));
        let names: Vec<_> = all[0].batch.column(1).as_string::<i32>().iter().collect();
        assert_eq!(names, [Some("two\nlines"), Some("two\nlines"), None]);
        assert_eq!((all[0].rejected[0].offset, all[0].end), (2, 4));
        assert_eq!(
            ids(&chunks(&source, &Offsets([(path.clone(), 3)].into()), None)),
            [4]
        );
        source.validate().unwrap();
    }
}

#[test]
fn fields_without_names_stand_as_declared() {
    let dir = TempDir::new().unwrap();
    let path = write(&dir, "a.csv", "1|+|a\n2|-|b\n");
    let options = [
        ("path", path.as_str()),
        ("format", "csv"),
        ("header", "false"),
        ("delimiter", "|"),
        ("changelog", "op"),
    ];
    let columns = [ID, ("op", DataType::Utf8), ("name", DataType::Utf8)];
    let all = chunks(
        &source(&options, &columns).unwrap(),
        &Offsets::default(),
        None,
    );
    assert_eq!(
        (ids(&all), all[0].diffs.clone()),
        (vec![1, 2], Some(vec![1, -1]))
    );
    let error = source(&options, &[]).unwrap_err();
    assert!(
        error
            .message
            .starts_with("changelog field \"op\" is not in file"),
        "{error}"
    );
}

#[test]
fn parquet_stops_and_goes_on_anywhere() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a.parquet");
    let batch = RecordBatch::try_from_iter([
        (
            "name",
            Arc::new(StringArray::from_iter_values(
                (0..40_000).map(|i| i.to_string()),
            )) as ArrayRef,
        ),
        (
            "id",
            Arc::new(Int64Array::from_iter_values(0..40_000)) as ArrayRef,
        ),
    ]);
    let batch = batch.unwrap();
    let mut writer =
        ArrowWriter::try_new(fs::File::create(&path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let path = path.to_str().unwrap();
    let options = [("path", path), ("format", "parquet")];
    let found =
        discover(&Options::new(&INFO, &options.map(|(k, v)| (k.into(), v.into())).into()).unwrap());
    assert_eq!(found.unwrap().field(0).name(), "name");
    let source = source(&options, &[ID]).unwrap();
    source.validate().unwrap();
    let at = |offset| Offsets([(path.to_string(), offset)].into());
    let all = chunks(&source, &Offsets::default(), None);
    assert!(
        all.iter()
            .all(|c| c.batch.num_rows() <= 16_384 && c.batch.num_columns() == 1)
    );
    assert_eq!(ids(&all), (0..40_000).collect::<Vec<_>>());
    assert_eq!(all.last().unwrap().remaining, Some(0));
    // Limits that fall between and within batches; each time the rest stays readable.
    let mut reader = source.open(&at(5), &[0]).unwrap().remove(0);
    let mut read = Vec::new();
    for limit in [7, 7, 16_391, 33_000, 40_000] {
        while let Polled::Chunk(chunk) = reader.poll(Some(&at(limit)), Duration::ZERO).unwrap() {
            assert!(chunk.end <= limit);
            read.extend(ids(&[chunk]));
        }
    }
    assert_eq!(read, (5..40_000).collect::<Vec<_>>());
    let error = self::source(&options, &[("other", DataType::Int64)])
        .unwrap()
        .validate();
    assert!(
        error
            .unwrap_err()
            .message
            .starts_with("column \"other\" is not in file")
    );
}

#[test]
fn a_line_without_an_end_is_one_record() {
    let dir = TempDir::new().unwrap();
    let long = format!(
        "{{\"id\":1}}\n{{\"id\":\"{}\"}}\n{{\"id\":2}}\n",
        "x".repeat(20 << 20)
    );
    let path = write(&dir, "a.json", &long);
    let source = source(&[("path", &path), ("format", "json")], &[ID]).unwrap();
    let all = chunks(&source, &Offsets::default(), None);
    assert_eq!(ids(&all), [1, 2]);
    let rejected: Vec<_> = all.iter().flat_map(|c| &c.rejected).collect();
    assert_eq!((rejected.len(), rejected[0].offset), (1, 1));
    assert_eq!(rejected[0].reason, "record is longer than 16 MiB");
    assert_eq!(
        ids(&chunks(&source, &Offsets([(path, 2)].into()), None)),
        [2]
    );
}

#[test]
fn wrong_options_say_what_is_right() {
    let wrong = |options: &[(&str, &str)]| {
        let checked = source(options, &[ID]).and_then(|source| source.validate());
        checked.unwrap_err()
    };
    let error = wrong(&[("path", "/nowhere/at/all"), ("format", "json")]);
    assert_eq!(
        (error.kind, error.message.as_str()),
        (
            ErrorKind::NotFound,
            "no file or directory \"/nowhere/at/all\""
        )
    );
    let error = wrong(&[("path", "/nowhere/*.json"), ("format", "json")]);
    assert_eq!(error.message, "no file matches \"/nowhere/*.json\"");
    let error = wrong(&[("path", "/tmp"), ("format", "parqet")]);
    assert!(error.hint.unwrap().starts_with("did you mean \"parquet\"?"));
    let error = wrong(&[("path", "/tmp"), ("format", "json"), ("header", "true")]);
    assert_eq!(error.message, "option \"header\" belongs to format \"csv\"");
    let error = wrong(&[("format", "json")]);
    assert_eq!(error.message, "connector \"files\" needs option \"path\"");
}
