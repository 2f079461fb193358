//! How the key groups of an operator are used, as a checkpoint sees it.
//!
//! Taken from the parts of a checkpoint behind the workers, so that it costs the path of a row nothing:
//! the marks of what was written since the checkpoint before say which groups are hot. Single keys are
//! not told apart.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::state::{Part, PartData};

/// Hot groups that are named.
const HOTTEST: usize = 3;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Groups that hold rows, of 256; `None` for state that has no key.
    pub groups: Option<u32>,
    /// The groups most of whose rows were written between the last two checkpoints, and how many.
    pub hottest: Vec<(u8, u64)>,
}

impl Usage {
    /// Of the parts of one stage of one worker.
    pub fn of(parts: &[Part]) -> Self {
        let mut groups = BTreeMap::<u8, (u64, u64)>::new();
        let mut keyed = false;
        for part in parts {
            if let PartData::Keyed(snapshot) = &part.data {
                keyed = true;
                for (group, rows, written) in snapshot.uses() {
                    let sum = groups.entry(group).or_default();
                    *sum = (sum.0 + rows, sum.1 + written);
                }
            }
        }
        if !keyed {
            return Self::default();
        }
        let filled = groups.values().filter(|(rows, _)| *rows > 0).count();
        let mut hottest: Vec<(u8, u64)> = groups
            .into_iter()
            .map(|(group, (_, written))| (group, written))
            .filter(|(_, written)| *written > 0)
            .collect();
        hottest.sort_by_key(|(group, written)| (std::cmp::Reverse(*written), *group));
        hottest.truncate(HOTTEST);
        Self {
            groups: u32::try_from(filled).ok(),
            hottest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::key_group;
    use crate::state::KeyedState;

    #[test]
    fn groups_are_counted_and_the_hot_ones_named() {
        let mut state = KeyedState::plain();
        let hash = |n: u64| n << 40 | n;
        for n in 0..10 {
            state.upsert(hash(n), &n.to_le_bytes(), b"value");
        }
        let parts = |state: &mut KeyedState| {
            vec![Part {
                name: "rows".to_string(),
                data: PartData::Keyed(state.snapshot()),
            }]
        };
        let filled = (0..10)
            .map(|n| key_group(hash(n)))
            .collect::<std::collections::BTreeSet<_>>();
        let first = Usage::of(&parts(&mut state));
        assert_eq!(first.groups, u32::try_from(filled.len()).ok());
        state.upsert(hash(3), &3u64.to_le_bytes(), b"other");
        let second = Usage::of(&parts(&mut state));
        assert_eq!(second.hottest, [(key_group(hash(3)), 1)]);
        assert_eq!(second.groups, first.groups);
        assert_eq!(Usage::of(&[]), Usage::default());
    }
}
