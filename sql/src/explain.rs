//! Every stage as text. The text of a dataflow plan is stable: its hash is the plan's fingerprint.

use std::fmt::Write;
use std::sync::Arc;

use datafusion::physical_expr::PhysicalExpr;
use datafusion::sql::sqlparser::tokenizer::Token;
use millrace_dataflow::error::Result;
use millrace_dataflow::plan::{
    AggregateCall, AggregateKind, CloseRule, Emit, MapStep, Node, OnError, Op, Plan,
};

use crate::bind::{ExplainDef, Purpose};
use crate::error::planning;
use crate::guard::{Policy, guard};
use crate::lower::lower;
use crate::optimize::optimize_view;
use crate::parse;
use crate::stack::on_big_stack;
use crate::types::sql_name;

/// The plan of a query or view, as text of several lines.
pub fn explain(def: ExplainDef, policy: &Policy) -> Result<String> {
    let ExplainDef { verbose, query } = def;
    let guarded = guard(query, policy)?;
    let view = matches!(guarded.purpose(), Purpose::View(_));
    let mut text = String::new();
    if verbose || !view {
        let plan = guarded.plan();
        let (bound, optimized) = on_big_stack(|| {
            let optimized = optimize_view(plan.clone()).map_err(|e| planning(e).0)?;
            Ok::<_, millrace_dataflow::error::Error>((
                plan.display_indent().to_string(),
                optimized.display_indent().to_string(),
            ))
        })?;
        if verbose {
            let _ = writeln!(text, "bound plan\n{}", indent(&bound));
        }
        let _ = writeln!(text, "logical plan\n{}", indent(&optimized));
    }
    if view {
        let lowered = lower(&guarded)?;
        let _ = writeln!(text, "dataflow\n{}", indent(&explain_plan(&lowered.plan)));
        let timed: Vec<String> = lowered
            .plan
            .schema()
            .fields()
            .iter()
            .zip(&lowered.event_time)
            .filter_map(|(f, e)| Some(format!("{} + {}", f.name(), duration((*e)?))))
            .collect();
        if !timed.is_empty() {
            let _ = writeln!(
                text,
                "final when the watermark is at\n{}",
                indent(&timed.join(", "))
            );
        }
        for notice in &lowered.notices {
            let _ = writeln!(text, "notice: {notice}");
        }
    }
    Ok(text.trim_end().to_string())
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|l| format!("  {}", unmarked(l)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A line without the marks of names that stand twice.
fn unmarked(line: &str) -> String {
    let mut parts = line.split('\u{1f}');
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        out.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    out
}

/// A dataflow plan, one node a line; steps of a map indented below it.
pub fn explain_plan(plan: &Plan) -> String {
    let mut text = String::new();
    for (id, node) in plan.nodes.iter().enumerate() {
        let _ = write!(text, "%{id} = ");
        operator(&mut text, plan, node);
        let _ = writeln!(
            text,
            "{}",
            if node.append_only { "" } else { "  (changing)" }
        );
        if let Op::Map { steps, .. } = &node.op {
            for step in steps {
                match step {
                    MapStep::Filter(predicate) => {
                        let _ = writeln!(text, "     filter {}", readable(predicate));
                    }
                    MapStep::Project(exprs, schema) => {
                        let columns: Vec<String> = exprs
                            .iter()
                            .zip(schema.fields())
                            .map(|(e, f)| projected(e, f.name()))
                            .collect();
                        let _ = writeln!(text, "     project {}", columns.join(", "));
                    }
                }
            }
        }
    }
    let columns: Vec<String> = plan
        .schema()
        .fields()
        .iter()
        .map(|f| format!("{} {}", f.name(), sql_name(f.data_type())))
        .collect();
    let _ = write!(
        text,
        "-> {} ({}){}",
        if plan.append_only {
            "append-only"
        } else {
            "changing"
        },
        columns.join(", "),
        match plan.on_error {
            OnError::Continue => "",
            OnError::Fail => ", fails on errors",
        }
    );
    text
}

/// The expression with decimals as SQL writes them: `Some(908),3,3` is `0.908`.
fn readable(expr: &Arc<dyn PhysicalExpr>) -> String {
    let text = expr.to_string();
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find("Some(") {
        let (before, after) = (&rest[..at], &rest[at + "Some(".len()..]);
        out.push_str(before);
        match decimal(after) {
            Some((value, left)) => {
                out.push_str(&value);
                rest = left;
            }
            None => {
                out.push_str("Some(");
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

/// `908),3,3 …`: the value, and what follows.
fn decimal(text: &str) -> Option<(String, &str)> {
    let (digits, rest) = text.split_once("),")?;
    let units: i128 = digits.parse().ok()?;
    let (_, rest) = rest.split_once(',')?;
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    let scale: usize = rest[..end].parse().ok()?;
    let mut value = format!("{:0width$}", units.unsigned_abs(), width = scale + 1);
    if scale > 0 {
        value.insert(value.len() - scale, '.');
    }
    if units < 0 {
        value.insert(0, '-');
    }
    Some((value, &rest[end..]))
}

fn projected(expr: &Arc<dyn PhysicalExpr>, name: &str) -> String {
    let text = readable(expr);
    match text.split_once('@') {
        Some((column, index)) if column == name && index.chars().all(|c| c.is_ascii_digit()) => {
            text
        }
        _ => format!("{text} AS {name}"),
    }
}

fn operator(text: &mut String, plan: &Plan, node: &Node) {
    let name = |input: usize, column: usize| -> String {
        plan.nodes[input].schema.fields().get(column).map_or_else(
            || format!("#{column}"),
            |f| format!("{}@{column}", f.name()),
        )
    };
    let _ = match &node.op {
        Op::Input { relation, columns } => {
            let columns: Vec<String> = node
                .schema
                .fields()
                .iter()
                .zip(columns)
                .map(|(f, c)| format!("{}@{c} {}", f.name(), sql_name(f.data_type())))
                .collect();
            write!(text, "input {relation} [{}]", columns.join(", "))
        }
        Op::Values { rows } => write!(text, "values, {} rows", rows.num_rows()),
        Op::Map { input, .. } => write!(text, "map %{input}"),
        Op::Window {
            input,
            time,
            window,
        } if window.size_us == window.slide_us => write!(
            text,
            "tumble %{input} on {}, size {}",
            name(*input, *time),
            duration(window.size_us)
        ),
        Op::Window {
            input,
            time,
            window,
        } => write!(
            text,
            "hop %{input} on {}, slide {}, size {}",
            name(*input, *time),
            duration(window.slide_us),
            duration(window.size_us)
        ),
        Op::Aggregate {
            input,
            keys,
            calls,
            close,
            emit,
            allowed_lateness_us,
        } => {
            let keys_text: Vec<String> = keys.iter().map(|k| name(*input, *k)).collect();
            let calls: Vec<String> = calls.iter().map(|c| call(c, |i| name(*input, i))).collect();
            let _ = write!(text, "aggregate %{input} by [{}]", keys_text.join(", "));
            if !calls.is_empty() {
                let _ = write!(text, " {}", calls.join(", "));
            }
            if let Some(CloseRule { key, delay_us }) = close {
                let _ = write!(
                    text,
                    ", closes at {}",
                    at(&name(*input, keys[*key]), *delay_us)
                );
            }
            if *allowed_lateness_us > 0 {
                let _ = write!(text, ", lateness {}", duration(*allowed_lateness_us));
            }
            match emit {
                Emit::Changes => Ok(()),
                Emit::OnClose => write!(text, ", emits on close"),
            }
        }
        Op::Join {
            left,
            right,
            on,
            null_equal,
            filter,
            left_close,
            right_close,
        } => {
            let pairs = on.iter().map(|(l, r)| (name(*left, *l), name(*right, *r)));
            let pairs = equal(pairs, *null_equal);
            let _ = write!(text, "join %{left} with %{right} on {pairs}");
            if let Some(filter) = filter {
                let _ = write!(text, " where {filter}");
            }
            for (side, close) in [(*left, left_close), (*right, right_close)] {
                if let Some(CloseRule { key, delay_us }) = close {
                    let _ = write!(
                        text,
                        ", drops %{side} at {}",
                        at(&name(side, *key), *delay_us)
                    );
                }
            }
            Ok(())
        }
        Op::SemiJoin {
            left,
            right,
            on,
            anti,
            null_equal,
            close,
        } => {
            let kind = if *anti { "anti" } else { "semi" };
            let pairs = on.iter().enumerate();
            let pairs = pairs.map(|(r, l)| (name(*left, *l), name(*right, r)));
            let pairs = equal(pairs, *null_equal);
            let _ = write!(text, "{kind}-join %{left} with %{right} on {pairs}");
            if let Some(CloseRule { key, delay_us }) = close {
                let at = at(&name(*right, *key), *delay_us);
                let _ = write!(text, ", drops both at {at}");
            }
            Ok(())
        }
        Op::CountedSet {
            left,
            right,
            except,
            close,
        } => {
            let kind = if *except { "except" } else { "intersect" };
            let _ = write!(text, "{kind} all %{left}, %{right}");
            if let Some(CloseRule { key, delay_us }) = close {
                let at = at(&name(*left, *key), *delay_us);
                let _ = write!(text, ", drops both at {at}");
            }
            Ok(())
        }
        Op::Union { inputs } => {
            let inputs: Vec<String> = inputs.iter().map(|i| format!("%{i}")).collect();
            write!(text, "union {}", inputs.join(", "))
        }
        Op::Expand { input, compute } => {
            write!(text, "expand %{input}: {}", one_line(&compute.text))
        }
        Op::Recompute {
            inputs,
            keys,
            compute,
            close,
            emit,
            allowed_lateness_us,
            first,
        } => {
            let of = |(input, keys): (&usize, &Vec<usize>)| {
                let keys: Vec<String> = keys.iter().map(|k| name(*input, *k)).collect();
                format!("%{input} by [{}]", keys.join(", "))
            };
            let parts: Vec<String> = inputs.iter().zip(keys).map(of).collect();
            let _ = write!(text, "recompute {}", parts.join(", "));
            if let Some(first) = first {
                let _ = write!(text, ", the first {first}");
            }
            if let (Some(CloseRule { key, delay_us }), Some(input)) = (close, inputs.first()) {
                let column = name(*input, keys[0][*key]);
                let _ = write!(text, ", closes at {}", at(&column, *delay_us));
            }
            if *allowed_lateness_us > 0 {
                let _ = write!(text, ", lateness {}", duration(*allowed_lateness_us));
            }
            if *emit == Emit::OnClose {
                let _ = write!(text, ", emits on close");
            }
            write!(text, ": {}", one_line(&compute.text))
        }
    };
}

/// A plan in one line, outermost first.
fn one_line(plan: &str) -> String {
    let lines: Vec<&str> = plan.lines().map(str::trim).collect();
    lines.join(" <- ")
}

/// Pairs of equal columns.
fn equal(pairs: impl Iterator<Item = (String, String)>, null_equal: bool) -> String {
    let equal = if null_equal { "is" } else { "=" };
    let pairs: Vec<String> = pairs.map(|(l, r)| format!("{l} {equal} {r}")).collect();
    match pairs.is_empty() {
        true => "true".to_string(),
        false => pairs.join(" and "),
    }
}

fn at(column: &str, delay_us: i64) -> String {
    match delay_us {
        0 => column.to_string(),
        d => format!("{column} + {}", duration(d)),
    }
}

fn call(call: &AggregateCall, name: impl Fn(usize) -> String) -> String {
    let function = match call.kind {
        AggregateKind::Count => "count",
        AggregateKind::Sum => "sum",
        AggregateKind::Avg => "avg",
        AggregateKind::Min => "min",
        AggregateKind::Max => "max",
    };
    let argument = call.input.map_or_else(|| "*".to_string(), &name);
    match call.filter {
        Some(filter) => format!("{function}({argument}) filter {}", name(filter)),
        None => format!("{function}({argument})"),
    }
}

/// A length of time in its largest whole unit.
pub(crate) fn duration(us: i64) -> String {
    for (unit, length) in [
        ("h", 3_600_000_000),
        ("min", 60_000_000),
        ("s", 1_000_000),
        ("ms", 1_000),
    ] {
        if us != 0 && us % length == 0 {
            return format!("{} {unit}", us / length);
        }
    }
    format!("{us} us")
}

/// A hash of everything that stored state depends on. Stable over versions and machines.
pub(crate) fn fingerprint(plan: &Plan) -> u64 {
    let mut text = explain_plan(plan);
    for node in &plan.nodes {
        for field in node.schema.fields() {
            let _ = write!(text, "|{}", field.data_type());
        }
        if let Op::Values { rows } = &node.op {
            let _ = write!(text, "|{rows:?}");
        }
    }
    // FNV-1a.
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A stored statement for SHOW CREATE: values of secret options are replaced.
pub fn show_create(text: &str) -> String {
    let (tokens, _) = parse::tokenize(text);
    let lines = parse::Lines::of(text);
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut copied = 0;
    let mut depth = 0usize;
    let mut options_depth = None;
    for (i, token) in tokens.iter().enumerate() {
        match &token.token {
            Token::LParen => {
                depth += 1;
                let with = i.checked_sub(1).and_then(|p| tokens.get(p)).is_some_and(
                    |t| matches!(&t.token, Token::Word(w) if w.value.eq_ignore_ascii_case("with")),
                );
                if with {
                    options_depth = Some(depth);
                }
            }
            Token::RParen => {
                if options_depth == Some(depth) {
                    options_depth = None;
                }
                depth = depth.saturating_sub(1);
            }
            Token::Eq if options_depth.is_some() => {
                let key = i
                    .checked_sub(1)
                    .and_then(|p| tokens.get(p))
                    .map(|t| match &t.token {
                        Token::Word(w) => w.value.to_lowercase(),
                        Token::SingleQuotedString(s) => s.to_lowercase(),
                        _ => String::new(),
                    });
                let (Some(key), Some(value)) = (key, tokens.get(i + 1)) else {
                    continue;
                };
                if is_secret(&key) {
                    let from = lines.offset((value.span.start.line, value.span.start.column));
                    let to = lines.offset((value.span.end.line, value.span.end.column));
                    out.extend(&chars[copied..from]);
                    out.push_str("'[secret]'");
                    copied = to;
                }
            }
            _ => {}
        }
    }
    out.extend(&chars[copied..]);
    out
}

/// Options whose values are never shown.
pub fn is_secret(key: &str) -> bool {
    let key = key.to_lowercase();
    ["password", "secret", "token", "credential"]
        .iter()
        .any(|word| key.contains(word))
}
