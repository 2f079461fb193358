//! Our operators on top of timely: import (from a tap), map (stateless), stage (complete ticks).

pub mod import;
pub mod map;
pub mod stage;
