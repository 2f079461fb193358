//! A table behind a catalog: versions, snapshots, tokens, and the strangers who work on it too.

use std::collections::BTreeMap;

use millrace_lake::commit::token::{Link, Mark, Property, look};
use millrace_lake::commit::{Observed, Token};

/// A record of the source: split, offset, and which of its contents.
pub(super) type Row = (usize, u64, u8);

#[derive(Clone)]
struct Snapshot {
    parent: Option<i64>,
    mark: Option<Mark>,
    files: Vec<usize>,
}

#[derive(Default)]
pub(super) struct Table {
    snapshots: BTreeMap<i64, Snapshot>,
    head: Option<i64>,
    property: Option<Property>,
    version: u64,
    fence: u64,
    /// Every file ever written.
    files: Vec<Vec<Row>>,
}

impl Table {
    pub(super) fn put_up_fence(&mut self, incarnation: u64) {
        self.fence = self.fence.max(incarnation);
    }

    pub(super) fn observe(&self) -> Observed {
        let link = |id: i64| {
            self.snapshots.get(&id).map(|s| Link {
                parent: s.parent,
                sequence: id,
                mark: s.mark,
            })
        };
        let (progress, incarnation) = look(self.head, link, self.property);
        Observed {
            version: self.version.to_string(),
            progress,
            incarnation: incarnation.max(self.fence),
        }
    }

    /// Compare-and-set on the version, under the fence.
    pub(super) fn commit(&mut self, base: &str, token: &Token, files: &[Vec<Row>]) -> bool {
        if base != self.version.to_string() || token.incarnation < self.fence {
            return false;
        }
        let mark = Mark {
            frontier: token.frontier,
            incarnation: token.incarnation,
        };
        let mut live = self.live();
        for rows in files {
            self.files.push(rows.clone());
            live.push(self.files.len() - 1);
        }
        self.push_snapshot(Some(mark), live);
        self.property = Some(Property {
            mark,
            sequence: self.version as i64,
        });
        true
    }

    fn live(&self) -> Vec<usize> {
        let head = self.head.and_then(|id| self.snapshots.get(&id));
        head.map_or(vec![], |s| s.files.clone())
    }

    fn push_snapshot(&mut self, mark: Option<Mark>, files: Vec<usize>) {
        self.version += 1;
        let id = self.version as i64;
        let parent = self.head;
        let snapshot = Snapshot {
            parent,
            mark,
            files,
        };
        self.snapshots.insert(id, snapshot);
        self.head = Some(id);
    }

    /// A snapshot of somebody else.
    pub(super) fn foreign_commit(&mut self) {
        let live = self.live();
        self.push_snapshot(None, live);
    }

    /// All live files become one.
    pub(super) fn compact(&mut self) {
        let rows = self.rows();
        self.files.push(rows);
        self.push_snapshot(None, vec![self.files.len() - 1]);
    }

    /// Only the newest snapshot is left.
    pub(super) fn expire(&mut self) {
        let head = self.head;
        self.snapshots.retain(|id, _| Some(*id) == head);
        self.version += 1;
    }

    /// What a reader finds.
    pub(super) fn rows(&self) -> Vec<Row> {
        let live = self.live();
        live.iter()
            .flat_map(|file| self.files[*file].clone())
            .collect()
    }
}
