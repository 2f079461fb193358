//! The Nexmark model: people, their auctions, and bids on them, as Apache Beam defines it.
//!
//! Of fifty events in a row the first is a new person, the next three are new auctions, the rest are
//! bids. Ids count up; references go to recent ids, and mostly to a hot one: half of the bids to the
//! hot auction, three quarters of them from the hot bidder, three quarters of the auctions from the
//! hot seller. Like in Beam some references run a little ahead of what exists.
//!
//! Text is drawn from lowercase letters; prices are spread evenly over six orders of magnitude.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use millrace_dataflow::error::{Error, Result};

use super::columns::{append_number, longs, pick, strings};
use super::random::{Column, append_letters, below};

/// Events of one round, and the first of each kind in it.
const ROUND: u64 = 50;
const AUCTIONS: u64 = 3;

const FIRST_ID: u64 = 1000;
const FIRST_CATEGORY: u64 = 10;
const CATEGORIES: u64 = 5;
/// Auctions and people that are referred to, and how far references run ahead of the newest.
const IN_FLIGHT_AUCTIONS: u64 = 100;
const ACTIVE_PEOPLE: u64 = 1000;
const LEAD: u64 = 10;
/// Every so many ids one is hot.
const HOT_EVERY: u64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    Person,
    Auction,
    Bid,
}

impl Table {
    /// Its events in a round.
    fn places(self) -> Range<u64> {
        match self {
            Self::Person => 0..1,
            Self::Auction => 1..4,
            Self::Bid => 4..ROUND,
        }
    }

    pub(super) fn schema(self) -> Schema {
        let columns: &[(&str, char)] = match self {
            Self::Person => &[
                ("id", 'i'),
                ("name", 's'),
                ("email_address", 's'),
                ("credit_card", 's'),
                ("city", 's'),
                ("state", 's'),
                ("date_time", 't'),
                ("extra", 's'),
            ],
            Self::Auction => &[
                ("id", 'i'),
                ("item_name", 's'),
                ("description", 's'),
                ("initial_bid", 'i'),
                ("reserve", 'i'),
                ("date_time", 't'),
                ("expires", 't'),
                ("seller", 'i'),
                ("category", 'i'),
                ("extra", 's'),
            ],
            Self::Bid => &[
                ("auction", 'i'),
                ("bidder", 'i'),
                ("price", 'i'),
                ("channel", 's'),
                ("url", 's'),
                ("date_time", 't'),
                ("extra", 's'),
            ],
        };
        let field = |(name, kind): &(&str, char)| {
            let data_type = match kind {
                'i' => DataType::Int64,
                't' => DataType::Timestamp(TimeUnit::Microsecond, None),
                _ => DataType::Utf8,
            };
            Field::new(*name, data_type, true)
        };
        Schema::new(columns.iter().map(field).collect::<Vec<_>>())
    }
}

/// All events of one table.
#[derive(Debug, Clone)]
pub(super) struct Nexmark {
    table: Table,
    seed: u64,
    base_us: i64,
    events_per_second: u64,
    jitter_us: u64,
}

impl Nexmark {
    pub(super) fn new(
        table: Table,
        seed: u64,
        base_us: i64,
        events_per_second: u64,
        jitter_us: u64,
    ) -> Self {
        Self {
            table,
            seed,
            base_us,
            events_per_second,
            jitter_us,
        }
    }

    /// The event number behind the next `rows` rows of the table from event `from` on.
    pub(super) fn end_of(&self, from: u64, rows: u64) -> u64 {
        let places = self.table.places();
        let count = places.end - places.start;
        let within = (from % ROUND).clamp(places.start, places.end) - places.start;
        let last = from / ROUND * count + within + rows - 1;
        last / count * ROUND + places.start + last % count + 1
    }

    /// The rows of the table among `events`; the columns of `output` only.
    pub(super) fn batch(&self, events: Range<u64>, output: &SchemaRef) -> Result<RecordBatch> {
        let numbers = self.numbers(&events);
        let columns = output
            .fields()
            .iter()
            .map(|field| match self.table {
                Table::Person => self.person(field.name(), &numbers),
                Table::Auction => self.auction(field.name(), &numbers),
                Table::Bid => self.bid(field.name(), &numbers),
            })
            .collect();
        let options = RecordBatchOptions::new().with_row_count(Some(numbers.len()));
        RecordBatch::try_new_with_options(Arc::clone(output), columns, &options)
            .map_err(|e| Error::internal(format!("generated columns do not fit: {e}")))
    }

    /// Numbers of the events of this table.
    fn numbers(&self, events: &Range<u64>) -> Vec<u64> {
        let places = self.table.places();
        let mut numbers = Vec::with_capacity((events.end - events.start) as usize);
        let mut round = events.start / ROUND * ROUND;
        while round < events.end {
            let first = (round + places.start).max(events.start);
            let end = (round + places.end).min(events.end);
            numbers.extend(first..end.max(first));
            round += ROUND;
        }
        numbers
    }

    fn person(&self, column: &str, events: &[u64]) -> ArrayRef {
        match column {
            "id" => longs(events, |n| (n / ROUND + FIRST_ID) as i64),
            "name" => {
                let random = self.random("person.name");
                strings(events, 16, |n, out| {
                    let r = random.at(n);
                    out.extend_from_slice(pick(r, FIRST_NAMES));
                    out.push(b' ');
                    out.extend_from_slice(pick(r << 32, LAST_NAMES));
                })
            }
            "email_address" => {
                let random = self.random("person.email");
                let domain = self.random("person.email_domain");
                strings(events, 16, |n, out| {
                    append_letters(out, random, n, 3 + below(random.at(n), 4) as usize);
                    out.push(b'@');
                    append_letters(out, domain, n, 3 + below(domain.at(n), 2) as usize);
                    out.extend_from_slice(b".com");
                })
            }
            "credit_card" => {
                let random = self.random("person.credit_card");
                strings(events, 20, |n, out| {
                    for i in 0..4 {
                        if i > 0 {
                            out.push(b' ');
                        }
                        let number = below(random.more(n, i), 10_000);
                        out.extend([1000, 100, 10, 1].map(|d| b'0' + (number / d % 10) as u8));
                    }
                })
            }
            "city" => self.choice("person.city", events, CITIES),
            "state" => self.choice("person.state", events, STATES),
            "date_time" => self.times(events),
            // 200 bytes in all, on average.
            _ => self.extra(events, 135),
        }
    }

    fn auction(&self, column: &str, events: &[u64]) -> ArrayRef {
        match column {
            "id" => longs(events, |n| (newest_auction(n) + FIRST_ID) as i64),
            "item_name" => self.text("auction.item_name", events, 20),
            "description" => self.text("auction.description", events, 100),
            "initial_bid" => {
                let random = self.random("auction.initial_bid");
                longs(events, |n| price(random.at(n)))
            }
            "reserve" => {
                let initial = self.random("auction.initial_bid");
                let random = self.random("auction.reserve");
                longs(events, |n| price(initial.at(n)) + price(random.at(n)))
            }
            "seller" => {
                let random = self.random("auction.seller");
                longs(events, |n| {
                    let r = random.at(n);
                    let newest = newest_person(n);
                    // Three of four come from the hot seller.
                    let seller = if r & 3 != 0 {
                        newest / HOT_EVERY * HOT_EVERY
                    } else {
                        some_person(newest, r)
                    };
                    (seller + FIRST_ID) as i64
                })
            }
            "category" => {
                let random = self.random("auction.category");
                longs(events, |n| {
                    (FIRST_CATEGORY + below(random.at(n), CATEGORIES)) as i64
                })
            }
            "date_time" => self.times(events),
            "expires" => {
                let random = self.random("auction.expires");
                let jitter = self.random("date_time");
                // An auction lasts about as long as it is among those in flight.
                let ahead = IN_FLIGHT_AUCTIONS * ROUND / AUCTIONS;
                timestamps(events, |n| {
                    let now = self.turn_us(n);
                    let horizon_ms = (self.turn_us(n + ahead) - now) as u64 / 1000;
                    let length_ms = 1 + below(random.at(n), (horizon_ms * 2).clamp(1, 1 << 31));
                    now - self.early_us(jitter, n) + length_ms as i64 * 1000
                })
            }
            // 500 bytes in all, on average.
            _ => self.extra(events, 390),
        }
    }

    fn bid(&self, column: &str, events: &[u64]) -> ArrayRef {
        match column {
            "auction" => {
                let random = self.random("bid.auction");
                longs(events, |n| {
                    let r = random.at(n);
                    let newest = newest_auction(n);
                    // Every other bid goes to the hot auction.
                    let auction = if r & 1 != 0 {
                        newest / HOT_EVERY * HOT_EVERY
                    } else {
                        let oldest = newest.saturating_sub(IN_FLIGHT_AUCTIONS);
                        oldest + below(r, newest - oldest + 1 + LEAD)
                    };
                    (auction + FIRST_ID) as i64
                })
            }
            "bidder" => {
                let random = self.random("bid.bidder");
                longs(events, |n| {
                    let r = random.at(n);
                    let newest = newest_person(n);
                    // Three of four come from the hot bidder, who is never the hot seller.
                    let bidder = if r & 3 != 0 {
                        newest / HOT_EVERY * HOT_EVERY + 1
                    } else {
                        some_person(newest, r)
                    };
                    (bidder + FIRST_ID) as i64
                })
            }
            "price" => {
                let random = self.random("bid.price");
                longs(events, |n| price(random.at(n)))
            }
            "channel" => {
                let random = self.random("bid.channel");
                strings(events, 12, |n, out| match channel(random.at(n)) {
                    Ok(hot) => out.extend_from_slice(HOT_CHANNELS[hot]),
                    Err(number) => {
                        out.extend_from_slice(b"channel-");
                        append_number(out, u64::from(number.reverse_bits() & 0x7fff_ffff));
                    }
                })
            }
            "url" => {
                let random = self.random("bid.channel");
                // A channel always leads to the same page: its number is the event number here.
                let path = self.random("bid.url");
                strings(events, 80, |n, out| {
                    let chosen = channel(random.at(n));
                    let page = match chosen {
                        Ok(hot) => hot as u64,
                        Err(number) => u64::from(number) + 100,
                    };
                    out.extend_from_slice(b"https://www.nexmark.com/");
                    for i in 0..3 {
                        append_letters(out, path, page * 4 + i, 5);
                        out.push(b'/');
                    }
                    out.extend_from_slice(b"item.htm?query=1");
                    if let Err(number) = chosen
                        && number % 10 != 0
                    {
                        out.extend_from_slice(b"&channel_id=");
                        append_number(out, u64::from(number.reverse_bits() & 0x7fff_ffff));
                    }
                })
            }
            "date_time" => self.times(events),
            // 100 bytes in all, on average.
            _ => self.extra(events, 68),
        }
    }

    fn random(&self, column: &str) -> Column {
        Column::named(self.seed, column)
    }

    /// Event time at which event `n` has its turn.
    #[inline]
    fn turn_us(&self, n: u64) -> i64 {
        let rate = self.events_per_second;
        let offset = n / rate * 1_000_000 + n % rate * 1_000_000 / rate;
        self.base_us + offset as i64
    }

    #[inline]
    fn early_us(&self, jitter: Column, n: u64) -> i64 {
        if self.jitter_us == 0 {
            return 0;
        }
        // Wider than `below` allows.
        ((u128::from(jitter.at(n)) * u128::from(self.jitter_us + 1)) >> 64) as i64
    }

    fn times(&self, events: &[u64]) -> ArrayRef {
        let jitter = self.random("date_time");
        if self.jitter_us == 0 && 1_000_000 % self.events_per_second == 0 {
            let step = 1_000_000 / self.events_per_second;
            return timestamps(events, |n| self.base_us + (n * step) as i64);
        }
        timestamps(events, |n| self.turn_us(n) - self.early_us(jitter, n))
    }

    /// Letters of up to `max` characters.
    fn text(&self, column: &str, events: &[u64], max: u64) -> ArrayRef {
        let random = self.random(column);
        strings(events, max as usize, |n, out| {
            append_letters(out, random, n, 3 + below(random.at(n), max - 3) as usize);
        })
    }

    /// Padding of about `average` letters, a fifth more or less.
    fn extra(&self, events: &[u64], average: u64) -> ArrayRef {
        let random = self.random("extra");
        let spread = average / 5;
        strings(events, (average + spread) as usize, |n, out| {
            let length = average - spread + below(random.at(n), 2 * spread);
            append_letters(out, random, n, length as usize);
        })
    }

    fn choice(&self, column: &str, events: &[u64], words: &[&str]) -> ArrayRef {
        let random = self.random(column);
        strings(events, 16, |n, out| {
            out.extend_from_slice(pick(random.at(n), words))
        })
    }
}

/// Number of the newest person at event `n`, from 0.
#[inline]
fn newest_person(n: u64) -> u64 {
    n / ROUND
}

/// Number of the newest auction at event `n`, from 0.
#[inline]
fn newest_auction(n: u64) -> u64 {
    let place = n % ROUND;
    n / ROUND * AUCTIONS + place.clamp(1, AUCTIONS) - 1
}

/// One of the active people, or one who is about to come.
#[inline]
fn some_person(newest: u64, random: u64) -> u64 {
    let people = newest + 1;
    let active = people.min(ACTIVE_PEOPLE);
    people - active + below(random, active + LEAD)
}

/// The hot channel, or the number of another one.
#[inline]
fn channel(random: u64) -> Result<usize, u32> {
    if random & 1 != 0 {
        Ok(below(random, HOT_CHANNELS.len() as u64) as usize)
    } else {
        Err(below(random, 10_000) as u32)
    }
}

/// 100 * 10^(6u) for an even u in 0..1.
///
/// By a table of 1024 steps and a short series within a step: exact to nine digits, and the same on
/// every machine, which a libm does not promise.
#[inline]
fn price(random: u64) -> i64 {
    const STEPS: usize = 1024;
    /// 10^(6/1024), and ln of it.
    const STEP: f64 = 1.013_583_133_334_065_8;
    const LN_STEP: f64 = 6.0 * std::f64::consts::LN_10 / STEPS as f64;
    static TABLE: LazyLock<[f64; STEPS]> = LazyLock::new(|| {
        let mut value = 100.0;
        std::array::from_fn(|_| {
            let this = value;
            value *= STEP;
            this
        })
    });
    let whole = (random >> 54) as usize;
    let within = ((random >> 22) & 0xffff_ffff) as f64 / 4_294_967_296.0;
    let x = within * LN_STEP;
    let factor = 1.0 + x * (1.0 + x * (0.5 + x / 6.0));
    (TABLE[whole] * factor + 0.5) as i64
}

fn timestamps(events: &[u64], value: impl Fn(u64) -> i64) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_iter_values(
        events.iter().map(|n| value(*n)),
    ))
}

const HOT_CHANNELS: [&[u8]; 4] = [b"Google", b"Facebook", b"Baidu", b"Apple"];
const FIRST_NAMES: &[&str] = &[
    "Peter", "Paul", "Luke", "John", "Saul", "Vicky", "Kate", "Julie", "Sarah", "Deiter", "Walter",
];
const LAST_NAMES: &[&str] = &[
    "Shultz", "Abrams", "Spencer", "White", "Bartels", "Walton", "Smith", "Jones", "Noris",
];
const STATES: &[&str] = &["AZ", "CA", "ID", "OR", "WA", "WY"];
const CITIES: &[&str] = &[
    "Phoenix",
    "Los Angeles",
    "San Francisco",
    "Boise",
    "Portland",
    "Bend",
    "Redmond",
    "Seattle",
    "Kent",
    "Cheyenne",
];
