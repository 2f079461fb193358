//! Which columns are event time, and when a row of theirs is final.
//!
//! A column with delay `d` promises: rows with value `v` are complete once the watermark is at
//! `v + d`. Columns that speak of the same instant share an *origin* (`window_start` with the size
//! as delay and `window_end` with none, for example): what is learned of one holds for the others.

use std::collections::HashMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) delay_us: i64,
    origin: usize,
}

/// Makes origins.
#[derive(Debug, Default)]
pub(super) struct Events {
    origins: usize,
}

impl Events {
    pub(super) fn fresh(&mut self, delay_us: i64) -> Event {
        self.origins += 1;
        Event {
            delay_us,
            origin: self.origins,
        }
    }

    /// `window_start` and `window_end` of windows over a column: the last row of a window has a time
    /// one microsecond before its end.
    pub(super) fn window(&mut self, time: Event, size_us: i64) -> [Option<Event>; 2] {
        let end = self.fresh(time.delay_us.saturating_sub(1));
        let start = Event {
            delay_us: end.delay_us.saturating_add(size_us),
            ..end
        };
        [Some(start), Some(end)]
    }

    /// A column of a union is final when it is in every input.
    pub(super) fn union(&mut self, inputs: &[Vec<Option<Event>>]) -> Vec<Option<Event>> {
        let width = inputs.first().map_or(0, Vec::len);
        let mut known: HashMap<Vec<usize>, usize> = HashMap::new();
        (0..width)
            .map(|column| {
                let parts: Option<Vec<Event>> = inputs.iter().map(|i| i[column]).collect();
                let parts = parts?;
                let delay_us = parts.iter().map(|e| e.delay_us).max()?;
                if parts.iter().any(|e| e.delay_us != delay_us) {
                    return Some(self.fresh(delay_us));
                }
                let origins: Vec<usize> = parts.iter().map(|e| e.origin).collect();
                if let Some(origin) = known.get(&origins) {
                    return Some(Event {
                        delay_us,
                        origin: *origin,
                    });
                }
                let event = self.fresh(delay_us);
                known.insert(origins, event.origin);
                Some(event)
            })
            .collect()
    }
}

/// The columns that still promise something when rows of the origin of `key` come `later_us` later.
pub(super) fn only(events: &[Option<Event>], key: Event, later_us: i64) -> Vec<Option<Event>> {
    events
        .iter()
        .map(|e| {
            e.filter(|e| e.origin == key.origin)
                .map(|e| later(e, later_us))
        })
        .collect()
}

pub(super) fn later(event: Event, by_us: i64) -> Event {
    Event {
        delay_us: event.delay_us.saturating_add(by_us),
        ..event
    }
}
