//! Random use against the standard library's maps; freezing; the stored form.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use proptest::prelude::*;

use super::testing::{budget, enter};
use super::*;
use crate::error::ErrorKind;
use crate::key::hash_bytes;

#[derive(Debug, Clone)]
enum Step {
    Put(u16, Vec<u8>),
    Remove(u16),
    Grow(u16, u8),
    Freeze,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop_oneof![8 => 0usize..40, 2 => 200usize..900, 1 => 15_000usize..40_000];
    let value = (length, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]);
    let step = prop_oneof![
        6 => (0u16..300, value).prop_map(|(k, v)| Step::Put(k, v)),
        3 => (0u16..300).prop_map(Step::Remove),
        3 => (0u16..300, any::<u8>()).prop_map(|(k, b)| Step::Grow(k, b)),
        1 => Just(Step::Freeze),
    ];
    prop::collection::vec(step, 0..400)
}

/// All keys share a few hashes, so that collisions of hash, tag and group are common.
fn key(number: u16) -> (u64, Vec<u8>) {
    let key = number.to_be_bytes().to_vec();
    let hash = hash_bytes(&(number % 50).to_be_bytes());
    (hash, key)
}

type Model = HashMap<Vec<u8>, Vec<u8>>;

fn contents(frozen: &Frozen) -> Model {
    let loaded = frozen.load().unwrap();
    loaded
        .iter()
        .map(|(_, key, value)| (key.to_vec(), value.to_vec()))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn plain_state_is_a_map(steps in steps(), budget in budget()) {
        let _entered = enter(budget);
        let mut state = KeyedState::plain();
        let mut model = Model::new();
        let mut views = Vec::new();
        for step in steps {
            state.relieve();
            match step {
                Step::Put(k, value) => {
                    let (hash, key) = key(k);
                    state.upsert(hash, &key, &value);
                    model.insert(key, value);
                }
                Step::Remove(k) => {
                    let (hash, key) = key(k);
                    prop_assert_eq!(state.remove(hash, &key), model.remove(&key).is_some());
                }
                Step::Grow(k, byte) => {
                    let (hash, key) = key(k);
                    state.update(hash, &key, |old| match old {
                        None => Change::Keep,
                        Some(old) if old.len() % 7 == 3 => Change::Remove,
                        Some(old) => Change::Put([old, &[byte]].concat()),
                    });
                    match model.get_mut(&key) {
                        Some(value) if value.len() % 7 == 3 => {
                            model.remove(&key);
                        }
                        Some(value) => value.push(byte),
                        None => {}
                    }
                }
                Step::Freeze => views.push((state.freeze(), model.clone())),
            }
        }
        prop_assert_eq!(state.len(), model.len() as u64);
        for number in 0..300 {
            let (hash, key) = key(number);
            prop_assert_eq!(state.get(hash, &key), model.get(&key).map(Vec::as_slice));
        }
        views.push((state.freeze(), model));
        for (frozen, model) in views {
            prop_assert_eq!(frozen.len(), model.len() as u64);
            prop_assert_eq!(contents(&frozen), model);
        }
    }

    #[test]
    fn chained_state_is_a_map_of_multisets(
        steps in prop::collection::vec((0u16..12, 0u8..30, -2i64..3, any::<bool>()), 0..500),
        cut in 0usize..500,
        budget in budget(),
    ) {
        let _entered = enter(budget);
        let mut state = KeyedState::chained();
        let mut model: BTreeMap<(u16, Vec<u8>), i64> = BTreeMap::new();
        let mut frozen = None;
        for (at, (k, row, diff, long)) in steps.into_iter().enumerate() {
            if at == cut {
                frozen = Some((state.freeze(), model.clone()));
            }
            state.relieve();
            if diff == 0 {
                continue;
            }
            let (hash, key) = key(k * 50); // one hash for all keys
            let row = vec![row; if long { 300 } else { 3 }];
            let count = state.add_row(hash, &key, &row, diff);
            let want = model.entry((k, row.clone())).or_default();
            *want += diff;
            prop_assert_eq!(count, *want);
            if *want == 0 {
                model.remove(&(k, row));
            }
        }
        prop_assert_eq!(state.len(), model.len() as u64);
        for k in 0..12u16 {
            let (hash, key) = key(k * 50);
            let mut got: Vec<_> = state.rows_of(hash, &key).map(|(r, d)| (r.to_vec(), d)).collect();
            got.sort();
            let of_key = model.iter().filter(|((have, _), _)| *have == k);
            let want: Vec<_> = of_key.map(|((_, row), d)| (row.clone(), *d)).collect();
            prop_assert_eq!(got, want);
        }
        if let Some((frozen, model)) = frozen {
            let mut again = KeyedState::chained();
            again.restore(frozen.load().unwrap().iter());
            prop_assert_eq!(again.len(), model.len() as u64);
            for ((k, row), diff) in model {
                let (hash, key) = key(k * 50);
                prop_assert!(again.rows_of(hash, &key).any(|(r, d)| r == row && d == diff));
            }
        }
    }
}

fn filled(rows: u16, chained: bool) -> KeyedState {
    let mut state = if chained {
        KeyedState::chained()
    } else {
        KeyedState::plain()
    };
    for number in 0..rows {
        let key = number.to_be_bytes();
        let hash = hash_bytes(&key);
        if chained {
            state.add_row(hash, &key, b"row", i64::from(number) + 1);
        } else {
            state.upsert(hash, &key, &key);
        }
    }
    state
}

#[test]
fn a_part_restores_onto_any_number_of_workers() {
    for chained in [false, true] {
        let mut state = filled(5000, chained);
        let name = "groups".to_string();
        let data = PartData::Keyed(state.snapshot());
        let mut bytes = Vec::new();
        write_part(&Part { name, data }, &mut bytes).unwrap();
        let bytes = Bytes::from(bytes);
        let (part, length) = read_part(&bytes).unwrap();
        assert_eq!((part.name.as_str(), length), ("groups", bytes.len()));
        for workers in [1, 3] {
            let mut all = Model::new();
            for worker in 0..workers {
                let mut share = filled(0, chained);
                let owned = crate::key::owned_groups(worker, workers);
                share.restore_part(&part, &owned).unwrap();
                let of_others = (0..=255).filter(|group| !owned.contains(&u16::from(*group)));
                assert!(
                    of_others
                        .flat_map(|g| share.rows_of_group(g))
                        .next()
                        .is_none()
                );
                all.extend(contents(&share.freeze()));
            }
            assert_eq!(all, contents(&state.freeze()));
        }
        assert!(filled(0, !chained).restore_part(&part, &(0..256)).is_err());
    }
}

#[test]
fn damage_anywhere_is_noticed() {
    let mut state = filled(40, true);
    let name = "w:10".to_string();
    let data = PartData::Keyed(state.snapshot());
    let mut bytes = Vec::new();
    write_part(&Part { name, data }, &mut bytes).unwrap();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        let error = read_part(&flipped.into()).unwrap_err();
        assert!(
            matches!(error.kind, ErrorKind::Corrupt | ErrorKind::Unsupported),
            "at {at}"
        );
        let torn = Bytes::copy_from_slice(&bytes[..at]);
        assert_eq!(
            read_part(&torn).unwrap_err().kind,
            ErrorKind::Corrupt,
            "at {at}"
        );
    }
}

#[test]
fn memory_is_used_again() {
    let mut state = KeyedState::plain();
    let mut peak = 0;
    for round in 0..50u32 {
        for number in 0..2000u32 {
            let key = number.to_be_bytes();
            state.upsert(
                hash_bytes(&key),
                &key,
                &vec![1; 20 + (round % 5) as usize * 10],
            );
        }
        if round == 10 {
            peak = state.bytes();
        }
        for number in (0..2000u32).filter(|n| n % 3 != 0) {
            let key = number.to_be_bytes();
            assert!(state.remove(hash_bytes(&key), &key));
        }
    }
    assert!(state.bytes() < peak * 2, "{} after {peak}", state.bytes());
    for number in (0..2000u32).step_by(3) {
        let key = number.to_be_bytes();
        assert!(state.remove(hash_bytes(&key), &key));
    }
    assert!(state.is_empty());
    assert!(state.freeze().is_empty());
}

#[test]
fn dirty_rows_are_those_written_since() {
    let mut state = filled(1000, false);
    assert_eq!(state.dirty_rows(), 1000);
    assert_eq!(state.snapshot().changes(), 1000);
    let key = 7u16.to_be_bytes();
    state.upsert(hash_bytes(&key), &key, b"xy");
    let frozen = state.freeze();
    state.get_mut(hash_bytes(&key), &key).unwrap()[0] = b'z';
    assert_eq!(state.dirty_rows(), 1);
    let loaded = frozen.load().unwrap();
    assert_eq!(
        loaded
            .iter()
            .filter(|(_, k, v)| *k == key && *v == b"xy")
            .count(),
        1
    );
}

#[test]
fn state_larger_than_its_budget_is_in_the_swap_file() {
    const ROWS: u32 = 60_000;
    const LIMIT: u64 = 2 << 20;
    let entered = enter(Some(LIMIT));
    let pager = entered.0.as_ref().unwrap();
    let mut state = KeyedState::plain();
    let key = |n: u32| (hash_bytes(&n.to_be_bytes()), n.to_be_bytes());
    for n in 0..ROWS {
        let (hash, key) = key(n);
        state.upsert(hash, &key, &[n as u8; 100]);
        state.relieve();
    }
    // The index stays, and one page per key group is being filled.
    assert!(
        pager.stats().resident < LIMIT * 5 / 4,
        "{:?}",
        pager.stats()
    );
    assert!(state.swapped_bytes() > u64::from(ROWS) * 100 / 2);
    let frozen = state.freeze();
    let snapshot = state.snapshot();
    for n in (0..ROWS).step_by(7) {
        let (hash, key) = key(n);
        state.get_mut(hash, &key).unwrap()[0] ^= 1;
        state.relieve();
    }
    for n in 0..ROWS {
        let (hash, key) = key(n);
        let first = n as u8 ^ u8::from(n % 7 == 0);
        let value = state.get(hash, &key).unwrap();
        assert_eq!((value[0], &value[1..]), (first, &[n as u8; 99][..]));
        state.relieve();
    }
    // Readers see what was there, also of pages that went out and came back since.
    assert_eq!(snapshot.rows(), u64::from(ROWS));
    for chunk in frozen.chunks(5000) {
        for (_, key, value) in chunk.load().unwrap().iter() {
            assert_eq!(value, [key[3]; 100]);
        }
    }
    let clean = pager.stats().written;
    for n in 0..ROWS {
        let (hash, key) = key(n);
        assert!(state.get(hash, &key).is_some());
        state.relieve();
    }
    for n in 0..ROWS {
        let (hash, key) = key(n);
        assert!(state.get(hash, &key).is_some());
        state.relieve();
    }
    // The second time nothing that came back was new to the swap file.
    assert!(pager.stats().written < clean + u64::from(ROWS) * 120 / 16384 + 400);
    drop((frozen, snapshot, state));
    assert_eq!((pager.stats().resident, pager.stats().swapped), (0, 0));
}

#[test]
fn growing_state_keeps_every_row_it_was_given() {
    let mut state = KeyedState::growing();
    for number in 0..3000u16 {
        let (hash, key) = key(number % 60);
        state.add_row(hash, &key, &number.to_be_bytes(), 1);
    }
    let (hash, first) = key(0);
    state.add_row(hash, &first, &0u16.to_be_bytes(), -1);
    let frozen = state.freeze();
    let mut again = KeyedState::growing();
    again.restore(frozen.load().unwrap().iter());
    for state in [state, again] {
        assert_eq!(state.len(), 3001);
        for number in 0..60u16 {
            let (hash, key) = key(number);
            let rows = state.rows_of(hash, &key);
            let mut rows: Vec<_> = rows
                .map(|(row, d)| (u16::from_be_bytes([row[0], row[1]]), d))
                .collect();
            rows.sort_unstable();
            let mut want: Vec<_> = (0..50).map(|n| (number + n * 60, 1)).collect();
            if number == 0 {
                want.insert(0, (0, -1));
            }
            assert_eq!(rows, want);
        }
    }
}

/// A chunk of a state as a checkpoint stores it, read back.
fn chunk(state: &mut KeyedState, changes_only: bool) -> StoredPart {
    let mut bytes = Vec::new();
    write_keyed("groups", &state.snapshot(), changes_only, &mut bytes).unwrap();
    read_part(&bytes.into()).unwrap().0
}

proptest! {
    /// All rows of one snapshot and the changes of those after it are the rows of the last.
    #[test]
    fn changes_on_top_of_all_rows_are_all_rows(
        chained in any::<bool>(),
        budget in budget(),
        rounds in prop::collection::vec(prop::collection::vec((0u16..400, 0usize..60, any::<bool>()), 0..200), 1..6),
    ) {
        let _entered = enter(budget);
        let mut state = filled(500, chained);
        let mut stored = chunk(&mut state, false);
        for round in rounds {
            for (number, length, insert) in round {
                let key = number.to_be_bytes();
                let hash = hash_bytes(&key);
                match (chained, insert) {
                    (true, true) => drop(state.add_row(hash, &key, &vec![7; length % 3], 1)),
                    (true, false) => drop(state.add_row(hash, &key, b"row", -1)),
                    (false, true) => state.upsert(hash, &key, &vec![9; length]),
                    (false, false) => drop(state.remove(hash, &key)),
                }
                state.relieve();
            }
            stored.push(chunk(&mut state, true)).unwrap();
        }
        let mut again = filled(0, chained);
        again.restore_part(&stored, &(0..256)).unwrap();
        prop_assert_eq!(sorted(&again), sorted(&state));
    }
}

fn sorted(state: &KeyedState) -> Vec<StateRow<'_>> {
    let mut rows: Vec<_> = (0..=255).flat_map(|g| state.rows_of_group(g)).collect();
    rows.sort_unstable();
    rows
}
