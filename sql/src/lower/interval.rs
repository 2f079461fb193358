//! Conditions that bound the times of two sides by each other: `a.at BETWEEN b.at - i AND b.at + i`.
//!
//! A row of the left side is useless once the right side is complete up to the last time that it may
//! join with; so both sides can be dropped by the watermark without being equal in time.

use datafusion::common::{Column, DFSchema, ScalarValue};
use datafusion::logical_expr::expr::{Between, Case};
use datafusion::logical_expr::{BinaryExpr, Expr, Operator};
use millrace_dataflow::plan::CloseRule;

use super::event::Event;
use crate::checked::as_checked;

/// A column of the left side, one of the right, microseconds.
type Bound = (usize, usize, i64);

/// What a condition says of the times of both sides.
#[derive(Debug, Clone, Default)]
pub(super) struct Bounds {
    /// The right column is at most the left one, and so much.
    right: Vec<Bound>,
    /// The left column is at most the right one, and so much.
    left: Vec<Bound>,
}

/// When rows of a side can be dropped, and by how much later its times are final among joined rows.
pub(super) struct Closed {
    pub(super) rule: CloseRule,
    pub(super) event: Event,
    pub(super) later_us: i64,
}

impl Bounds {
    /// Of terms that are all true of joined rows.
    pub(super) fn of(terms: &[Expr], left: &DFSchema, right: &DFSchema) -> Self {
        let mut bounds = Self::default();
        for term in terms {
            bounds.add(term, left, right);
        }
        bounds
    }

    pub(super) fn swap(&mut self) {
        std::mem::swap(&mut self.left, &mut self.right);
        for bound in self.left.iter_mut().chain(&mut self.right) {
            *bound = (bound.1, bound.0, bound.2);
        }
    }

    fn add(&mut self, term: &Expr, left: &DFSchema, right: &DFSchema) {
        match term {
            Expr::BinaryExpr(BinaryExpr {
                left: a,
                op: Operator::And,
                right: b,
            }) => {
                self.add(a, left, right);
                self.add(b, left, right);
            }
            Expr::BinaryExpr(BinaryExpr {
                left: a,
                op,
                right: b,
            }) => match op {
                Operator::LtEq | Operator::Lt => self.ordered(a, b, left, right),
                Operator::GtEq | Operator::Gt => self.ordered(b, a, left, right),
                Operator::Eq => {
                    self.ordered(a, b, left, right);
                    self.ordered(b, a, left, right);
                }
                _ => {}
            },
            Expr::Between(Between {
                expr,
                negated: false,
                low,
                high,
            }) => {
                self.ordered(low, expr, left, right);
                self.ordered(expr, high, left, right);
            }
            // A conjunction that looks at its members in order.
            Expr::Case(Case {
                expr: None,
                when_then_expr,
                ..
            }) => {
                for (when, then) in when_then_expr {
                    match (when.as_ref(), then.as_ref()) {
                        (
                            Expr::IsNotTrue(term),
                            Expr::Literal(ScalarValue::Boolean(Some(false)), _),
                        ) => self.add(term, left, right),
                        _ => return,
                    }
                }
            }
            _ => {}
        }
    }

    /// `first <= last`.
    fn ordered(&mut self, first: &Expr, last: &Expr, left: &DFSchema, right: &DFSchema) {
        let (Some((first, x)), Some((last, y))) = (shifted(first), shifted(last)) else {
            return;
        };
        let us = y.saturating_sub(x);
        let at = |schema: &DFSchema, column: &Column| schema.maybe_index_of_column(column);
        if let (Some(r), Some(l)) = (at(right, first), at(left, last)) {
            self.right.push((l, r, us));
        } else if let (Some(l), Some(r)) = (at(left, first), at(right, last)) {
            self.left.push((l, r, us));
        }
    }

    /// When rows of the left side join with nothing that may still come.
    pub(super) fn left_close(
        &self,
        left: &[Option<Event>],
        right: &[Option<Event>],
    ) -> Option<Closed> {
        close(
            self.right.iter().map(|(l, r, us)| (*l, *r, *us)),
            left,
            right,
        )
    }

    /// As [`Self::left_close`] for the right side.
    pub(super) fn right_close(
        &self,
        left: &[Option<Event>],
        right: &[Option<Event>],
    ) -> Option<Closed> {
        close(
            self.left.iter().map(|(l, r, us)| (*r, *l, *us)),
            right,
            left,
        )
    }
}

/// `bounds`: the other side's column is at most this side's, and so much.
fn close(
    bounds: impl Iterator<Item = Bound>,
    own: &[Option<Event>],
    other: &[Option<Event>],
) -> Option<Closed> {
    let closed = bounds.filter_map(|(key, other_key, us)| {
        let event = own.get(key).copied().flatten()?;
        let complete = other.get(other_key).copied().flatten()?;
        let delay_us = us.saturating_add(complete.delay_us);
        Some(Closed {
            // What comes late to this side finds the other one anyway.
            rule: CloseRule { key, delay_us },
            event,
            later_us: delay_us.saturating_sub(event.delay_us).max(0),
        })
    });
    closed.min_by_key(|closed| closed.rule.delay_us)
}

/// A column and a constant length of time.
fn shifted(expr: &Expr) -> Option<(&Column, i64)> {
    let (op, base, by) = match expr {
        Expr::Column(column) => return Some((column, 0)),
        Expr::Alias(alias) => return shifted(&alias.expr),
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => (*op, left.as_ref(), right.as_ref()),
        Expr::ScalarFunction(function) => match &function.args[..] {
            [base, by] => (as_checked(&function.func)?, base, by),
            _ => return None,
        },
        _ => return None,
    };
    let (column, us) = match op {
        Operator::Plus if length(base).is_some() => (shifted(by)?, length(base)?),
        Operator::Plus => (shifted(base)?, length(by)?),
        Operator::Minus => (shifted(base)?, length(by)?.checked_neg()?),
        _ => return None,
    };
    Some((column.0, column.1.checked_add(us)?))
}

/// Microseconds of a constant interval, rounded down.
fn length(expr: &Expr) -> Option<i64> {
    let Expr::Literal(value, _) = expr else {
        return None;
    };
    match value {
        ScalarValue::IntervalMonthDayNano(Some(i)) if i.months == 0 => i64::from(i.days)
            .checked_mul(86_400_000_000)?
            .checked_add(i.nanoseconds.div_euclid(1_000)),
        ScalarValue::IntervalDayTime(Some(i)) => i64::from(i.days)
            .checked_mul(86_400_000_000)?
            .checked_add(i64::from(i.milliseconds) * 1_000),
        ScalarValue::DurationMicrosecond(Some(us)) => Some(*us),
        _ => None,
    }
}
