use std::sync::Arc;

use arrow::array::{
    Array, AsArray, BinaryArray, BooleanArray, Decimal128Array, Float64Array, Int8Array,
    Int64Array, StringArray, TimestampMicrosecondArray, UInt64Array,
};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, TimeUnit};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

fn layout(fields: Vec<(&str, DataType)>) -> Layout {
    let fields: Vec<_> = fields
        .into_iter()
        .map(|(n, t)| Field::new(n, t, true))
        .collect();
    let projection = (0..fields.len()).collect();
    Layout {
        schema: Arc::new(Schema::new(fields)),
        projection,
        changelog: None,
    }
}

fn one(data_type: DataType, text: &str) -> Result<arrow::array::ArrayRef, Reject> {
    let mut decoder = JsonDecoder::new(&layout(vec![("x", data_type)])).unwrap();
    decoder.push(text.as_bytes())?;
    Ok(Arc::clone(decoder.finish().unwrap().batch.column(0)))
}

fn rejected(data_type: DataType, text: &str) -> String {
    match one(data_type, text) {
        Ok(array) => panic!("{text} was accepted as {array:?}"),
        Err(Reject(reason)) => reason,
    }
}

#[test]
fn a_rejected_record_leaves_no_trace() {
    let mut layout = layout(vec![
        ("a", DataType::Int64),
        ("b", DataType::Utf8),
        ("c", DataType::new_list(DataType::Utf8, true)),
        ("d", DataType::Boolean),
    ]);
    layout.projection = vec![2, 1, 0];
    let mut decoder = JsonDecoder::new(&layout).unwrap();
    let good = r#"{"a":1,"b":"one","c":["x",null],"d":true}"#;
    let also = r#" { "d" : null , "unknown":{"c":[1,{"x":"\u00e9"}]}, "c":[], "a":-2 } "#;
    decoder.push(good.as_bytes()).unwrap();
    for bad in [
        // The last column is not wanted, and still checked.
        r#"{"a":5,"b":"five","c":["y","z"],"d":"yes"}"#,
        r#"{"a":5,"b":"five","c":["y",7],"d":true}"#,
        r#"{"a":5,"b":"fi\ve"}"#,
        r#"{"a":5,"b":"five"} x"#,
        r#"{"a":5,"b":"five""#,
        "",
        "[]",
        "7",
    ] {
        assert!(decoder.push(bad.as_bytes()).is_err(), "{bad}");
    }
    assert!(decoder.push(b"{\"b\":\"\xff\"}").is_err());
    decoder.push(also.as_bytes()).unwrap();
    assert_eq!(decoder.rows(), 2);
    let batch = decoder.finish().unwrap().batch;
    assert_eq!(batch.num_rows(), 2);
    let lists = batch.column(0).as_list::<i32>();
    let first = lists.value(0);
    assert_eq!(
        first.as_string::<i32>(),
        &StringArray::from(vec![Some("x"), None])
    );
    assert_eq!((lists.value(1).len(), lists.is_null(1)), (0, false));
    assert_eq!(
        batch.column(1).as_string::<i32>(),
        &StringArray::from(vec![Some("one"), None])
    );
    assert_eq!(
        batch.column(2).as_primitive::<Int64Type>(),
        &Int64Array::from(vec![1, -2])
    );
    // And the next batch begins empty.
    decoder.push(good.as_bytes()).unwrap();
    assert_eq!(decoder.finish().unwrap().batch.num_rows(), 1);
}

#[test]
fn strict_types() {
    let decimal = DataType::Decimal128(10, 2);
    let timestamp = DataType::Timestamp(TimeUnit::Microsecond, None);
    for (data_type, value) in [
        (DataType::Int64, "\"1\""),
        (DataType::Int64, "1.0"),
        (DataType::Int64, "1e3"),
        (DataType::Int64, "9223372036854775808"),
        (DataType::Int64, "-9223372036854775809"),
        (DataType::Int64, "99999999999999999999999999"),
        (DataType::Int64, "01"),
        (DataType::Int64, "-"),
        (DataType::Int64, "true"),
        (DataType::Int8, "128"),
        (DataType::UInt8, "-1"),
        (DataType::UInt64, "18446744073709551616"),
        (DataType::UInt64, "-1"),
        (DataType::Float64, "\"1.5\""),
        (DataType::Float64, "1e999"),
        (DataType::Float64, "1."),
        (DataType::Float32, "1e39"),
        (decimal.clone(), "0.001"),
        (decimal.clone(), "100000000"),
        (decimal.clone(), "\"abc\""),
        (DataType::Utf8, "1"),
        (DataType::Utf8, "{\"a\":1}"),
        (DataType::Utf8, r#""\ud800""#),
        (DataType::Utf8, r#""\ud800\u0041""#),
        (DataType::Utf8, "\"a\u{1}b\""),
        (DataType::Binary, "\"a?\""),
        (DataType::Boolean, "1"),
        (DataType::Date32, "\"2024-02-30\""),
        (timestamp.clone(), "1700000000000"),
        (timestamp.clone(), "\"2024-02-30T00:00:00Z\""),
        (DataType::new_list(DataType::Int64, true), "1"),
        (DataType::new_list(DataType::Int64, true), "[1,]"),
    ] {
        let reason = rejected(data_type.clone(), &format!("{{\"x\":{value}}}"));
        assert!(reason.contains('x') || reason.contains("byte"), "{reason}");
        // No value in a reason: it may be a secret, and it would defeat grouping.
        for secret in ["9223372036854775808", "abc", "2024-02-30", "1700000000000"] {
            assert!(!reason.contains(secret), "{reason}");
        }
        // Not wanted, still refused.
        let mut unwanted = layout(vec![("x", data_type.clone())]);
        unwanted.projection.clear();
        let mut decoder = JsonDecoder::new(&unwanted).unwrap();
        assert!(
            decoder
                .push(format!("{{\"x\":{value}}}").as_bytes())
                .is_err(),
            "{value}"
        );
    }
    assert_eq!(
        rejected(DataType::Int64, r#"{"x":"secret"}"#),
        "column \"x\": expected BIGINT, found text"
    );
}

#[test]
fn values_of_every_type() {
    let x = |value: &str| format!("{{\"x\":{value}}}");
    let ints = one(DataType::Int64, &x("-9223372036854775808")).unwrap();
    assert_eq!(
        ints.as_ref(),
        &Int64Array::from(vec![i64::MIN]) as &dyn Array
    );
    let small = one(DataType::Int8, &x("-0")).unwrap();
    assert_eq!(small.as_ref(), &Int8Array::from(vec![0]) as &dyn Array);
    let large = one(DataType::UInt64, &x("18446744073709551615")).unwrap();
    assert_eq!(
        large.as_ref(),
        &UInt64Array::from(vec![u64::MAX]) as &dyn Array
    );
    let float = one(DataType::Float64, &x("-1.25e2")).unwrap();
    assert_eq!(
        float.as_ref(),
        &Float64Array::from(vec![-125.0]) as &dyn Array
    );
    let infinite = one(DataType::Float64, &x("\"-Infinity\"")).unwrap();
    assert_eq!(
        infinite.as_ref(),
        &Float64Array::from(vec![f64::NEG_INFINITY]) as &dyn Array
    );
    for same in ["12.50", "\"12.5\"", "1.25e1"] {
        let decimal = one(DataType::Decimal128(38, 2), &x(same)).unwrap();
        let expected = Decimal128Array::from(vec![1250])
            .with_precision_and_scale(38, 2)
            .unwrap();
        assert_eq!(decimal.as_ref(), &expected as &dyn Array);
    }
    let text = one(DataType::Utf8, &x(r#""a\u00e9\ud83d\ude00\/\n\"é😀""#)).unwrap();
    assert_eq!(
        text.as_ref(),
        &StringArray::from(vec!["aé😀/\n\"é😀"]) as &dyn Array
    );
    let bytes = one(DataType::Binary, &x(r#""\/\/8=""#)).unwrap();
    assert_eq!(
        bytes.as_ref(),
        &BinaryArray::from(vec![&[0xff, 0xff][..]]) as &dyn Array
    );
    let truth = one(DataType::Boolean, &x("false")).unwrap();
    assert_eq!(
        truth.as_ref(),
        &BooleanArray::from(vec![false]) as &dyn Array
    );
    let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let time = one(utc, &x("\"1970-01-01T01:00:00.000001+01:00\"")).unwrap();
    let expected = TimestampMicrosecondArray::from(vec![1]).with_timezone("UTC");
    assert_eq!(time.as_ref(), &expected as &dyn Array);
    let nested = DataType::Struct(
        vec![
            Field::new("a", DataType::Int64, true),
            Field::new_list("b", Field::new("item", DataType::Utf8, true), true),
        ]
        .into(),
    );
    let rows = one(nested.clone(), &x(r#"{"b":["p","q"],"z":[[[]]]}"#)).unwrap();
    let rows = rows.as_struct();
    assert!(rows.column(0).is_null(0));
    assert_eq!(rows.column(1).as_list::<i32>().value(0).len(), 2);
    assert!(one(nested, "{}").unwrap().is_null(0));
}

#[test]
fn the_last_of_equal_names_wins() {
    let array = one(DataType::Utf8, r#"{"x":"first","x":null,"\u0078":"last"}"#).unwrap();
    assert_eq!(
        array.as_ref(),
        &StringArray::from(vec!["last"]) as &dyn Array
    );
}

#[test]
fn depth_is_bounded() {
    let deep = |n: usize| format!("{{\"y\":{}{}}}", "[".repeat(n), "]".repeat(n));
    assert!(one(DataType::Int64, &deep(127)).is_ok());
    assert!(rejected(DataType::Int64, &deep(128)).contains("deep"));
    assert!(rejected(DataType::Int64, &deep(1_000_000)).contains("deep"));
}

#[test]
fn signs_become_diffs() {
    let mut layout = layout(vec![("x", DataType::Int64)]);
    layout.changelog = Some("op".into());
    let mut decoder = JsonDecoder::new(&layout).unwrap();
    decoder.push(br#"{"op":"+","x":1}"#).unwrap();
    for bad in [
        r#"{"x":1}"#,
        r#"{"x":1,"op":"*"}"#,
        r#"{"x":1,"op":null}"#,
        r#"{"x":1,"op":1}"#,
    ] {
        let Reject(reason) = decoder.push(bad.as_bytes()).unwrap_err();
        assert!(reason.starts_with("column \"op\""), "{reason}");
    }
    decoder.push(br#"{"x":1,"op":"-"}"#).unwrap();
    let decoded = decoder.finish().unwrap();
    assert_eq!(decoded.diffs, Some(vec![1, -1]));
    assert_eq!(decoded.batch.num_columns(), 1);
}

/// Any JSON value, strings with the characters that need escapes.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|f| json!(f)),
        "[ -~\\n\\t\u{0}-\u{1f}\"\\\\äß漢😀]{0,24}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec(("[a-c\"\\\\é]{0,3}", inner), 0..6)
                .prop_map(|entries| Value::Object(entries.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// Values for an integer, a float, a string, a boolean and an unknown field; mostly of these types.
fn record() -> impl Strategy<Value = Vec<Value>> {
    let mostly = |right: BoxedStrategy<Value>| prop_oneof![9 => right, 1 => any_value()];
    (
        mostly(any::<i64>().prop_map(Value::from).boxed()),
        mostly(any::<f64>().prop_map(|f| json!(f)).boxed()),
        mostly(
            "[ -~\\n\\t\"\\\\äß漢😀]{0,24}"
                .prop_map(Value::from)
                .boxed(),
        ),
        mostly(any::<bool>().prop_map(Value::from).boxed()),
        any_value(),
    )
        .prop_map(|(a, f, s, b, other)| vec![a, f, s, b, other])
}

/// Whether serde_json's reading of a value fits a column of the type.
fn fits(value: &Value, data_type: &DataType) -> bool {
    match data_type {
        _ if value.is_null() => true,
        DataType::Int64 => value.is_i64(),
        DataType::Float64 => {
            value.is_number() || matches!(value.as_str(), Some("NaN" | "Infinity" | "-Infinity"))
        }
        DataType::Utf8 => value.is_string(),
        _ => value.is_boolean(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What serde_json writes is read back equal, and accepted exactly when the types fit.
    #[test]
    fn agrees_with_serde_json(
        records in prop::collection::vec(record(), 1..8),
        pretty in any::<bool>(),
    ) {
        let types =
            [DataType::Int64, DataType::Float64, DataType::Utf8, DataType::Boolean];
        let names = ["a", "f", "s", "b"];
        let mut decoder = JsonDecoder::new(&layout(
            names.iter().copied().zip(types.iter().cloned()).collect(),
        )).unwrap();
        let mut expected = Vec::new();
        for values in &records {
            let mut object = Map::new();
            object.insert("other".into(), values[4].clone());
            for (name, value) in names.iter().zip(values) {
                object.insert((*name).into(), value.clone());
            }
            let value = Value::Object(object);
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let good = values.iter().zip(&types).all(|(v, t)| fits(v, t));
            prop_assert_eq!(decoder.push(text.unwrap().as_bytes()).is_ok(), good);
            if good {
                expected.push(values);
            }
        }
        let batch = decoder.finish().unwrap().batch;
        prop_assert_eq!(batch.num_rows(), expected.len());
        for (row, values) in expected.iter().enumerate() {
            let ints = batch.column(0).as_primitive::<Int64Type>();
            prop_assert_eq!(ints.is_valid(row).then(|| ints.value(row)), values[0].as_i64());
            let floats = batch.column(1).as_any().downcast_ref::<Float64Array>().unwrap();
            if let Some(float) = values[1].as_f64() {
                prop_assert_eq!(floats.value(row), float);
            }
            let texts = batch.column(2).as_string::<i32>();
            prop_assert_eq!(texts.is_valid(row).then(|| texts.value(row)), values[2].as_str());
            let truths = batch.column(3).as_boolean();
            prop_assert_eq!(truths.is_valid(row).then(|| truths.value(row)), values[3].as_bool());
        }
    }

    /// Damaged records never panic, and are accepted only if serde_json accepts them too.
    #[test]
    fn accepts_no_more_than_serde_json(
        values in prop::collection::vec(("[a-c\"\\\\é]{0,3}", any_value()), 0..5),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3), 1..3),
    ) {
        let object = Value::Object(values.into_iter().collect());
        let mut text = serde_json::to_vec(&object).unwrap();
        for (place, byte, edit) in edits {
            let at = place.index(text.len());
            match edit {
                0 if text.len() > 1 => { text.remove(at); }
                1 => text.insert(at, byte),
                _ => text[at] = b"{}[]\",:\\u0e.+- "[byte as usize % 15],
            }
        }
        let mut decoder = JsonDecoder::new(&layout(vec![("a", DataType::Int64)])).unwrap();
        if decoder.push(&text).is_ok() {
            let other =
                serde_json::from_slice::<std::collections::HashMap<String, serde::de::IgnoredAny>>(&text);
            prop_assert!(other.is_ok(), "{}", String::from_utf8_lossy(&text));
        }
    }
}
