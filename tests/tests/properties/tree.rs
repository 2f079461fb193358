//! Queries as trees of text: what the generator makes, three dialects print, and the shrinker cuts.
//!
//! # Contract
//!
//! * A tree knows what it stands for (a relation with typed columns, an expression of a type, a part that
//!   may be left out) and nothing else about SQL: cutting makes candidates, running them says which of
//!   them are queries that still show the fault.
//! * The columns of every relation are called `c0`, `c1`, …, so a relation can stand for another one.

use std::collections::BTreeMap;

use super::data::Type;

/// Who reads the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// A view: base relations are what the changes arrive at.
    View,
    /// A one-shot query over the same contents.
    Batch,
    /// DuckDB.
    Duck,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Relation(Vec<Type>),
    Expression(Type),
    /// May be left out.
    Part,
    /// Neither replaced nor left out itself.
    Frame,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tree {
    pub(crate) kind: Kind,
    /// Operators that this node stands for, for the count.
    pub(crate) operators: Vec<&'static str>,
    pub(crate) pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    Text(String),
    /// Ours and DuckDB's.
    Either(String, String),
    /// A base relation.
    Table(String),
    Tree(Tree),
    /// A relation in FROM: a table by its name, anything else in parentheses.
    From(Tree),
    /// Trees with a text between them.
    List(Vec<Tree>, &'static str),
}

impl From<&str> for Piece {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

impl From<String> for Piece {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Tree> for Piece {
    fn from(tree: Tree) -> Self {
        Self::Tree(tree)
    }
}

/// Pieces from texts and trees.
macro_rules! pieces {
    ($($piece:expr),* $(,)?) => { vec![$($crate::tree::Piece::from($piece)),*] };
}
pub(crate) use pieces;

impl Tree {
    pub(crate) fn expression(ty: Type, pieces: Vec<Piece>) -> Self {
        Self {
            kind: Kind::Expression(ty),
            operators: vec![],
            pieces,
        }
    }

    pub(crate) fn relation(types: Vec<Type>, operator: &'static str, pieces: Vec<Piece>) -> Self {
        Self {
            kind: Kind::Relation(types),
            operators: vec![operator],
            pieces,
        }
    }

    pub(crate) fn part(pieces: Vec<Piece>) -> Self {
        Self {
            kind: Kind::Part,
            operators: vec![],
            pieces,
        }
    }

    pub(crate) fn frame(pieces: Vec<Piece>) -> Self {
        Self {
            kind: Kind::Frame,
            operators: vec![],
            pieces,
        }
    }

    #[must_use]
    pub(crate) fn with(mut self, operator: &'static str) -> Self {
        self.operators.push(operator);
        self
    }

    /// `SELECT * FROM name`.
    pub(crate) fn table(name: &str, types: &[Type]) -> Self {
        let pieces = vec![
            Piece::from("SELECT * FROM "),
            Piece::Table(name.to_string()),
        ];
        Self {
            kind: Kind::Relation(types.to_vec()),
            operators: vec![],
            pieces,
        }
    }

    fn table_name(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [Piece::Text(text), Piece::Table(name)] if text == "SELECT * FROM " => Some(name),
            _ => None,
        }
    }

    pub(crate) fn is_table(&self) -> bool {
        self.table_name().is_some()
    }

    pub(crate) fn types(&self) -> &[Type] {
        match &self.kind {
            Kind::Relation(types) => types,
            _ => &[],
        }
    }

    pub(crate) fn sql(&self, dialect: Dialect) -> String {
        let mut text = String::new();
        self.print(dialect, &mut text);
        text
    }

    fn print(&self, dialect: Dialect, out: &mut String) {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Either(ours, duck) => {
                    out.push_str(if dialect == Dialect::Duck { duck } else { ours })
                }
                Piece::Table(name) => out.push_str(&in_dialect(name, dialect)),
                Piece::Tree(tree) => tree.print(dialect, out),
                Piece::From(tree) => match tree.table_name() {
                    Some(name) => out.push_str(&in_dialect(name, dialect)),
                    None => {
                        out.push('(');
                        tree.print(dialect, out);
                        out.push(')');
                    }
                },
                Piece::List(trees, between) => {
                    for (i, tree) in trees.iter().enumerate() {
                        if i > 0 {
                            out.push_str(between);
                        }
                        tree.print(dialect, out);
                    }
                }
            }
        }
    }

    /// Adds the operators of this tree to a count, each once.
    pub(crate) fn count(&self, counts: &mut BTreeMap<&'static str, usize>) {
        let mut seen = std::collections::BTreeSet::new();
        self.visit(&mut |tree| seen.extend(tree.operators.iter().copied()));
        for operator in seen {
            *counts.entry(operator).or_default() += 1;
        }
    }

    /// The base relations it reads.
    pub(crate) fn tables(&self) -> Vec<String> {
        let mut names = Vec::new();
        self.visit(&mut |tree| {
            for piece in &tree.pieces {
                if let Piece::Table(name) = piece
                    && !names.contains(name)
                {
                    names.push(name.clone());
                }
            }
        });
        names
    }

    fn visit<'a>(&'a self, see: &mut impl FnMut(&'a Tree)) {
        see(self);
        for piece in &self.pieces {
            match piece {
                Piece::Tree(tree) | Piece::From(tree) => tree.visit(see),
                Piece::List(trees, _) => trees.iter().for_each(|tree| tree.visit(see)),
                _ => {}
            }
        }
    }

    pub(crate) fn rename(&mut self, name: &impl Fn(&str) -> String) {
        for piece in &mut self.pieces {
            match piece {
                Piece::Table(table) => *table = name(table),
                Piece::Tree(tree) | Piece::From(tree) => tree.rename(name),
                Piece::List(trees, _) => trees.iter_mut().for_each(|tree| tree.rename(name)),
                _ => {}
            }
        }
    }

    pub(crate) fn size(&self) -> usize {
        let mut size = 0;
        self.visit(&mut |tree| size += tree.pieces.len());
        size
    }

    /// Trees with one thing less, the boldest cuts first.
    pub(crate) fn cuts(&self) -> Vec<Tree> {
        let mut found = Vec::new();
        // A relation within may show the fault by itself.
        self.visit(&mut |tree| {
            if matches!(tree.kind, Kind::Relation(_)) && tree != self {
                found.push(tree.clone());
            }
        });
        found.extend(self.cuts_within());
        found.sort_by_key(Tree::size);
        found
    }

    fn cuts_within(&self) -> Vec<Tree> {
        let mut found = Vec::new();
        for (at, piece) in self.pieces.iter().enumerate() {
            let mut put = |piece: Piece| {
                let mut tree = self.clone();
                tree.pieces[at] = piece;
                found.push(tree);
            };
            match piece {
                Piece::Tree(tree) => {
                    if tree.kind == Kind::Part {
                        put(Piece::from(""));
                    }
                    tree.replacements()
                        .into_iter()
                        .for_each(|t| put(Piece::Tree(t)));
                }
                Piece::From(tree) => tree
                    .replacements()
                    .into_iter()
                    .for_each(|t| put(Piece::From(t))),
                Piece::List(trees, between) => {
                    for (i, tree) in trees.iter().enumerate() {
                        if tree.kind == Kind::Part && trees.len() > 1 {
                            let mut fewer = trees.clone();
                            fewer.remove(i);
                            put(Piece::List(fewer, between));
                        }
                        for t in tree.replacements() {
                            let mut other = trees.clone();
                            other[i] = t;
                            put(Piece::List(other, between));
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// What may stand in the place of this tree: something of its kind from within, a constant, or
    /// itself with a cut.
    fn replacements(&self) -> Vec<Tree> {
        let mut found = Vec::new();
        match &self.kind {
            Kind::Relation(types) => self.visit(&mut |tree| {
                if tree != self && tree.types().starts_with(types) {
                    found.push(tree.clone());
                }
            }),
            Kind::Expression(ty) => {
                if self.pieces.len() > 1 {
                    found.push(Tree::expression(*ty, pieces![ty.plain()]));
                }
                self.visit(&mut |tree| {
                    if tree != self && tree.kind == self.kind {
                        found.push(tree.clone());
                    }
                });
            }
            _ => {}
        }
        found.extend(self.cuts_within());
        found
    }
}

/// A table whose name begins with `e` is a source of events; one-shot queries read what a view of all
/// its rows holds.
fn in_dialect(name: &str, dialect: Dialect) -> String {
    if dialect == Dialect::Batch && name.starts_with('e') {
        format!("all_{name}")
    } else {
        name.to_string()
    }
}
