//! `CREATE MATERIALIZED VIEW`: options, dependencies, what it promises to what it feeds.

use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{Emit, OnError};

use super::{BoundQuery, MaterializedViewDef, Purpose, ViewRules, output, plan_query, shape};
use crate::catalog::Context;
use crate::error::nearest;
use crate::lower::refuse_unmaintainable;
use crate::parse::{CreateMaterializedView, EmitClause, Options};

const OPTIONS: &[&str] = &["on_error", "allowed_lateness"];

pub(crate) fn bind(
    context: &Context<'_>,
    create: CreateMaterializedView,
    text: String,
) -> Result<MaterializedViewDef> {
    let mut options = create.options;
    let on_error = match options.remove("on_error").as_deref() {
        None | Some("continue") => OnError::Continue,
        Some("fail") => {
            return Err(Error::unsupported("on_error = 'fail' is not supported yet")
                .detail("a row that fails is left out and stands in the view's errors")
                .hint("leave the option out, and watch SELECT count(*) FROM name$errors"));
        }
        Some(other) => {
            return Err(
                Error::invalid(format!("\"{other}\" is no value of \"on_error\""))
                    .hint("on_error is 'continue'"),
            );
        }
    };
    let allowed_lateness_us = match options.remove("allowed_lateness") {
        Some(text) => duration_us(&text)?,
        None => 0,
    };
    if create.lake.is_none() {
        refuse_options(&options)?;
    }
    let emit = match create.emit {
        Some(EmitClause::OnWindowClose) => Emit::OnClose,
        Some(EmitClause::Changes) | None => Emit::Changes,
    };
    let plan = plan_query(context, *create.query)?;
    refuse_unmaintainable(&plan)?;
    output::unique_names(&plan)?;
    let plan = shape(plan)?;
    output::storable(&plan)?;
    let rules = ViewRules {
        on_error,
        allowed_lateness_us,
        emit,
        append_only: create.lake.is_some() && !options.contains_key("changelog"),
    };
    Ok(MaterializedViewDef {
        name: create.name,
        lake: create.lake,
        if_not_exists: create.if_not_exists,
        or_replace: create.or_replace,
        on_error,
        allowed_lateness_us,
        emit,
        depends_on: context.used(),
        options,
        query: BoundQuery {
            plan,
            purpose: Purpose::View(rules),
        },
        text,
    })
}

fn refuse_options(options: &Options) -> Result<()> {
    let Some(key) = options.keys().next() else {
        return Ok(());
    };
    let error = Error::invalid(format!("option \"{key}\" is unknown"));
    Err(match nearest(key, OPTIONS.iter().copied()) {
        Some(near) => error.hint(format!("did you mean \"{near}\"?")),
        None => error.hint("options of a view are on_error and allowed_lateness; those of a table belong to CREATE SINK"),
    })
}

/// `5 s`, `1 minute`, `250ms`.
pub(crate) fn duration_us(text: &str) -> Result<i64> {
    let wrong = || {
        Error::invalid(format!("\"{text}\" is not a length of time"))
            .hint("write it as '5 s', '250 ms' or '1 minute'")
    };
    let trimmed = text.trim().to_lowercase();
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit_us = match unit.trim() {
        "us" | "microsecond" | "microseconds" => 1.0,
        "ms" | "millisecond" | "milliseconds" => 1e3,
        "s" | "sec" | "second" | "seconds" => 1e6,
        "m" | "min" | "minute" | "minutes" => 60e6,
        "h" | "hour" | "hours" => 3_600e6,
        "d" | "day" | "days" => 86_400e6,
        _ => return Err(wrong()),
    };
    let us = number * unit_us;
    if us.is_finite() && us < 1e17 {
        Ok(us.round() as i64)
    } else {
        Err(wrong())
    }
}
