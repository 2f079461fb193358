//! A view of keyed state that later writes do not change.

use std::sync::Arc;

use super::held::PageRef;
use super::page::Page;
use crate::error::Result;

/// Rows of a [`super::KeyedState`] as they were at [`super::KeyedState::freeze`]. Cheap to clone; may
/// go to other threads.
#[derive(Debug, Clone, Default)]
pub struct Frozen {
    /// Ascending by group; none is empty.
    pub(super) groups: Arc<[FrozenGroup]>,
    pub(super) chained: bool,
}

#[derive(Debug)]
pub(super) struct FrozenGroup {
    pub(super) group: u8,
    pub(super) rows: u64,
    pub(super) pages: Vec<PageRef>,
}

/// A stored row: hash, key, value.
pub type StateRow<'a> = (u64, &'a [u8], &'a [u8]);

impl Frozen {
    pub fn len(&self) -> u64 {
        self.groups.iter().map(|group| group.rows).sum()
    }
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
    /// The rows, in memory as long as what is given.
    pub fn load(&self) -> Result<LoadedRows> {
        let pages = self.groups.iter().flat_map(|group| &group.pages);
        let pages = pages.map(PageRef::load).collect::<Result<_>>()?;
        Ok(LoadedRows { pages })
    }

    /// The rows in pieces of about `rows` rows each, page by page.
    pub fn chunks(&self, rows: usize) -> Vec<Self> {
        let mut chunks = Vec::new();
        let (mut pending, mut pending_rows) = (Vec::<FrozenGroup>::new(), 0);
        for group in self.groups.iter() {
            for page in &group.pages {
                let count = page.rows() as u64;
                match pending.last_mut().filter(|last| last.group == group.group) {
                    Some(last) => {
                        last.rows += count;
                        last.pages.push(page.clone());
                    }
                    None => pending.push(FrozenGroup {
                        group: group.group,
                        rows: count,
                        pages: vec![page.clone()],
                    }),
                }
                pending_rows += count;
                if pending_rows >= rows as u64 {
                    chunks.push(std::mem::take(&mut pending));
                    pending_rows = 0;
                }
            }
        }
        if !pending.is_empty() {
            chunks.push(pending);
        }
        let chained = self.chained;
        let chunk = |groups: Vec<_>| Self {
            groups: groups.into(),
            chained,
        };
        chunks.into_iter().map(chunk).collect()
    }
}

/// See [`Frozen::load`].
#[derive(Debug)]
pub struct LoadedRows {
    pages: Vec<Arc<Page>>,
}

impl LoadedRows {
    /// All rows, group by group.
    pub fn iter(&self) -> impl Iterator<Item = StateRow<'_>> {
        self.pages.iter().flat_map(|page| page.iter())
    }
}
