//! Bounds on statements, so that every later recursion fits its stack.
//!
//! `a AND b AND …` parses into a tree as deep as the chain is long. Such chains are first rebuilt
//! as balanced trees (AND and OR are associative, also with nulls, and keep their order); what is
//! deeper than [`MAX_DEPTH`] after that is refused.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{BinaryOperator, Expr, Query, SetExpr, VisitMut, VisitorMut};
use millrace_dataflow::error::{Error, Result};

use crate::error::TOO_COMPLEX;

/// Deepest nesting of expressions and queries.
pub(crate) const MAX_DEPTH: usize = 250;
/// Terms of one chain of ANDs or ORs.
pub(crate) const MAX_TERMS: usize = 2_000;

pub(crate) fn too_deep() -> Error {
    Error::invalid("the statement is nested too deeply")
        .code(TOO_COMPLEX)
        .detail(format!(
            "expressions and queries nest at most {MAX_DEPTH} levels deep"
        ))
        .hint("split the statement into several views, or use IN instead of a chain of comparisons")
}

pub(crate) fn too_large(bytes: usize) -> Error {
    Error::invalid("the statement is too long")
        .code(TOO_COMPLEX)
        .detail(format!("a script has at most {} MiB", bytes >> 20))
}

fn too_many_terms() -> Error {
    Error::invalid("a condition has too many terms")
        .code(TOO_COMPLEX)
        .detail(format!(
            "a chain of AND or OR has at most {MAX_TERMS} terms"
        ))
        .hint("use IN, or join with a relation that holds the values")
}

/// Balances logical chains and refuses what is still too deep.
pub(crate) fn check<T: VisitMut>(tree: &mut T) -> Result<()> {
    let mut bounds = Bounds { depth: 0 };
    match tree.visit(&mut bounds) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}

struct Bounds {
    depth: usize,
}

impl Bounds {
    fn enter(&mut self) -> ControlFlow<Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            ControlFlow::Break(too_deep())
        } else {
            ControlFlow::Continue(())
        }
    }
    fn leave(&mut self) -> ControlFlow<Error> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }
}

impl VisitorMut for Bounds {
    type Break = Error;

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<Error> {
        if let Err(error) = balance(expr) {
            return ControlFlow::Break(error);
        }
        self.enter()
    }
    fn post_visit_expr(&mut self, _: &mut Expr) -> ControlFlow<Error> {
        self.leave()
    }
    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<Error> {
        let mut sets = 0;
        let mut body = &*query.body;
        while let SetExpr::SetOperation { left, .. } = body {
            sets += 1;
            body = left;
        }
        if sets > MAX_DEPTH {
            return ControlFlow::Break(too_deep());
        }
        self.enter()
    }
    fn post_visit_query(&mut self, _: &mut Query) -> ControlFlow<Error> {
        self.leave()
    }
}

fn balance(expr: &mut Expr) -> Result<()> {
    let Expr::BinaryOp {
        op: op @ (BinaryOperator::And | BinaryOperator::Or),
        left,
        ..
    } = &*expr
    else {
        return Ok(());
    };
    // A balanced tree of all the terms there may be leans no further than this.
    let mut leaning = 0;
    let mut down = &**left;
    while let Expr::BinaryOp { left, op: o, .. } = down
        && o == op
    {
        leaning += 1;
        down = left;
    }
    if leaning <= 16 {
        return Ok(());
    }
    let op = op.clone();
    let mut terms = Vec::new();
    let mut rest = std::mem::replace(expr, placeholder());
    loop {
        match rest {
            Expr::BinaryOp { left, op: o, right } if o == op => {
                terms.push(*right);
                rest = *left;
            }
            last => {
                terms.push(last);
                break;
            }
        }
    }
    if terms.len() > MAX_TERMS {
        return Err(too_many_terms());
    }
    terms.reverse();
    *expr = tree(terms, &op);
    Ok(())
}

fn placeholder() -> Expr {
    Expr::Identifier("".into())
}

fn tree(mut terms: Vec<Expr>, op: &BinaryOperator) -> Expr {
    if terms.len() == 1 {
        return terms.pop().expect("one term is there");
    }
    let right = terms.split_off(terms.len() / 2);
    Expr::BinaryOp {
        left: Box::new(tree(terms, op)),
        op: op.clone(),
        right: Box::new(tree(right, op)),
    }
}
