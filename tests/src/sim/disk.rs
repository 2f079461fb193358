//! A disk: what is written is there for the process, what is synced is there after the power was lost.

use std::collections::BTreeMap;

use millrace_dataflow::remap::log::{Effect, Event, Rules, SegmentId};
use millrace_dataflow::remap::record::{Record, decode};

use crate::rng::Rng;

#[derive(Default, Clone)]
struct File {
    bytes: Vec<u8>,
    /// What is durable.
    synced: usize,
    /// What the disk said is durable.
    said: usize,
}

/// The folder of the remap log.
#[derive(Default)]
pub(super) struct Disk {
    files: BTreeMap<SegmentId, File>,
    /// Something that was said to be durable is lost.
    pub(super) broke_its_word: bool,
}

/// How the disk treats one effect.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Mood {
    Well,
    Refuses,
    /// Says that it has synced.
    Lies,
}

impl Disk {
    pub(super) fn read(&self, before: u64) -> Vec<(SegmentId, Vec<u8>)> {
        let files = self.files.iter();
        files
            .filter(|(id, _)| id.incarnation < before)
            .map(|(id, file)| (*id, file.bytes.clone()))
            .collect()
    }

    /// Forgets the segments of older incarnations.
    pub(super) fn clear(&mut self, before: u64) {
        self.files.retain(|id, _| id.incarnation >= before);
    }

    pub(super) fn perform(&mut self, effect: &Effect, mood: Mood, rng: &mut Rng) -> Event {
        let refused = || Event::Failed("no space left on device".to_string());
        match effect {
            Effect::Write { segment, bytes } => {
                let Some(file) = self.files.get_mut(segment) else {
                    return Event::Failed("no such file".to_string());
                };
                if mood == Mood::Refuses {
                    // A part of it may be there.
                    let part = rng.below(bytes.len() + 1);
                    file.bytes.extend_from_slice(&bytes[..part]);
                    return refused();
                }
                file.bytes.extend_from_slice(bytes);
            }
            Effect::Create(segment) if mood == Mood::Refuses => {
                // The file may be there, and its folder could not be synced.
                if rng.coin() {
                    self.files.insert(*segment, File::default());
                }
                return refused();
            }
            _ if mood == Mood::Refuses => return refused(),
            Effect::Create(segment) => {
                self.files.insert(*segment, File::default());
            }
            Effect::Sync(segment) => {
                // A file that was removed under an old process is synced to nowhere.
                if let Some(file) = self.files.get_mut(segment) {
                    file.said = file.bytes.len();
                    if mood != Mood::Lies {
                        file.synced = file.bytes.len();
                    }
                }
            }
            Effect::CutBack { segment, length } => {
                if let Some(file) = self.files.get_mut(segment) {
                    file.bytes.truncate(*length as usize);
                    file.synced = file.synced.min(file.bytes.len());
                    file.said = file.said.min(file.bytes.len());
                }
            }
            Effect::List => return Event::Listed(self.files.keys().copied().collect()),
            Effect::Remove(segment) => {
                self.files.remove(segment);
            }
            other => unreachable!("not for a disk: {other:?}"),
        }
        Event::Done
    }

    /// What was not synced is there in part, or with holes, or not at all.
    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        const BLOCK: usize = 64;
        for file in self.files.values_mut() {
            let before = file.bytes.clone();
            match rng.below(3) {
                0 => {}
                1 => {
                    let kept = file.synced + rng.below(file.bytes.len() - file.synced + 1);
                    file.bytes.truncate(kept);
                }
                _ => {
                    for at in (file.synced..file.bytes.len()).step_by(BLOCK) {
                        if rng.coin() {
                            let end = (at + BLOCK).min(file.bytes.len());
                            file.bytes[at..end].fill(0);
                        }
                    }
                }
            }
            if file.bytes.get(..file.said) != before.get(..file.said) {
                self.broke_its_word = true;
            }
            file.synced = file.bytes.len();
            file.said = file.said.min(file.bytes.len());
        }
    }

    /// Flips a bit of what is durable, before a mark that is durable as well: of what stands behind the
    /// last mark nobody can tell whether it was ever whole.
    pub(super) fn rot(&mut self, rng: &mut Rng) -> bool {
        let pick = rng.below(self.files.len());
        let Some(file) = self.files.values_mut().nth(pick) else {
            return false;
        };
        let records = decode(&file.bytes[..file.synced], Rules::ALL).unwrap_or_default();
        let marks = records.iter().filter_map(|record| match record {
            Record::Synced(upto) => Some(*upto as usize),
            _ => None,
        });
        let Some(marked) = marks.max() else {
            return false;
        };
        let at = rng.below(marked);
        file.bytes[at] ^= 1 << rng.below(8);
        true
    }
}
