//! Panes: the pieces of time that every window is made of.
//!
//! A pane begins at a multiple of the greatest common divisor of size and slide, so each window is a
//! whole number of panes, and the rows of a pane belong to the same windows.

use crate::plan::TimeWindow;

#[derive(Debug, Clone, Copy)]
pub(super) struct Panes {
    pub size: i64,
    slide: i64,
    length: i64,
}

impl Panes {
    pub(super) fn new(window: TimeWindow) -> Self {
        let (mut a, mut b) = (window.size_us, window.slide_us);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        Self {
            size: window.size_us,
            slide: window.slide_us,
            length: a,
        }
    }

    /// All windows around `time` can be written as timestamps.
    pub(super) fn fits(&self, time: i64) -> bool {
        let around = self.size.saturating_add(self.slide);
        time.checked_sub(around).is_some() && time.checked_add(around).is_some()
    }

    /// Start of the pane of each time; all of them fit.
    pub(super) fn of(&self, times: &[i64]) -> Vec<i64> {
        let mut last = i64::MIN;
        let pane = |time: &i64| {
            // Neighbours mostly share a pane, and a division is slow.
            if !(0..self.length).contains(&time.wrapping_sub(last)) {
                last = time - time.rem_euclid(self.length);
            }
            last
        };
        times.iter().map(pane).collect()
    }

    /// The most windows a pane can belong to.
    pub(super) fn windows_per_pane(&self) -> i64 {
        self.size.div_euclid(self.slide) + i64::from(self.size % self.slide != 0)
    }

    /// Start of the window that begins `distance` slides before the last one of the pane, if the pane
    /// belongs to it.
    #[inline]
    pub(super) fn window(&self, pane: i64, distance: i64) -> Option<i64> {
        let start = pane - pane.rem_euclid(self.slide) - distance * self.slide;
        (start + self.size > pane).then_some(start)
    }

    /// Starts of the windows of a pane, descending.
    pub(super) fn windows(self, pane: i64) -> impl Iterator<Item = i64> {
        (0..self.windows_per_pane()).map_while(move |distance| self.window(pane, distance))
    }

    /// Start of the earliest window of a pane, or beyond it when the pane is in none.
    pub(super) fn first_window(&self, pane: i64) -> i64 {
        let before = pane - self.size;
        before - before.rem_euclid(self.slide) + self.slide
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panes_are_in_the_windows_of_their_rows() {
        for (size, slide) in [(10, 10), (10, 2), (10, 4), (7, 3), (3, 7), (1, 1)] {
            let window = TimeWindow {
                size_us: size,
                slide_us: slide,
            };
            let panes = Panes::new(window);
            for time in -40..40 {
                let pane = panes.of(&[time])[0];
                let mut got: Vec<i64> = panes.windows(pane).collect();
                got.sort_unstable();
                let mut want = Vec::new();
                window.each_start(time, |start| want.push(start)).unwrap();
                assert_eq!(got, want, "time {time}, size {size}, slide {slide}");
                if let Some(first) = want.first() {
                    assert_eq!(panes.first_window(pane), *first);
                }
            }
        }
        let panes = Panes::new(TimeWindow {
            size_us: 10,
            slide_us: 5,
        });
        assert!(!panes.fits(i64::MAX - 3) && !panes.fits(i64::MIN + 3) && panes.fits(0));
    }
}
