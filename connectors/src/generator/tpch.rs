//! The tables of TPC-H, and its refresh stream: new orders come, old ones go.
//!
//! # Contract
//!
//! * `orders` and `lineitem` count orders that come or go: event `n` of both is the same order, which
//!   always comes and goes with all of its lines. The other tables count their rows.
//! * First the rows of the initial population. Then pairs of refreshes: a thousandth of the orders as
//!   new ones (RF1), after which as many of the oldest leave (RF2), with diff -1.
//! * A row that leaves is the row that came: its values depend on the seed, its place in the table
//!   and its column only.
//!
//! Counts, words, ranges and the relations between columns are those of the specification. Numbers are
//! drawn by another generator than that of dbgen, so answers differ from the published ones.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use millrace_dataflow::error::{Error, Result};

use super::columns::{append_padded, longs, pick, strings};
use super::random::{Column, append_letters, below};

mod text;

/// 1992-01-01 and 1998-08-02, the first and the last day of an order; 1995-06-17 is "today".
const FIRST_DAY: i32 = 8035;
const LAST_DAY: i32 = 10_440;
const TODAY: i32 = 9298;
/// Lines have numbers of their own: eight for each order, of which up to seven are used.
const LINES: u64 = 8;
/// Suppliers of a part.
const OFFERS: u64 = 4;
/// Of so many suppliers, one has complaints of customers in its comment, and one recommendations.
const TOLD_OF: u64 = 2000;
/// Money.
const PRECISION: u8 = 15;
const SCALE: i8 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    Region,
    Nation,
    Supplier,
    Customer,
    Part,
    PartSupp,
    Orders,
    LineItem,
}

impl Table {
    /// In the order of the specification's appendix.
    pub(super) const NAMES: &[&str] = &[
        "region", "nation", "supplier", "customer", "part", "partsupp", "orders", "lineitem",
    ];

    pub(super) fn named(name: &str) -> Self {
        match name {
            "region" => Self::Region,
            "nation" => Self::Nation,
            "supplier" => Self::Supplier,
            "customer" => Self::Customer,
            "part" => Self::Part,
            "partsupp" => Self::PartSupp,
            "orders" => Self::Orders,
            _ => Self::LineItem,
        }
    }

    /// Changed by the refresh stream.
    fn is_refreshed(self) -> bool {
        matches!(self, Self::Orders | Self::LineItem)
    }

    /// Columns: i(nteger), m(oney), d(ate), s(tring).
    fn columns(self) -> &'static [(&'static str, char)] {
        match self {
            Self::Region => &[("r_regionkey", 'i'), ("r_name", 's'), ("r_comment", 's')],
            Self::Nation => &[
                ("n_nationkey", 'i'),
                ("n_name", 's'),
                ("n_regionkey", 'i'),
                ("n_comment", 's'),
            ],
            Self::Supplier => &[
                ("s_suppkey", 'i'),
                ("s_name", 's'),
                ("s_address", 's'),
                ("s_nationkey", 'i'),
                ("s_phone", 's'),
                ("s_acctbal", 'm'),
                ("s_comment", 's'),
            ],
            Self::Customer => &[
                ("c_custkey", 'i'),
                ("c_name", 's'),
                ("c_address", 's'),
                ("c_nationkey", 'i'),
                ("c_phone", 's'),
                ("c_acctbal", 'm'),
                ("c_mktsegment", 's'),
                ("c_comment", 's'),
            ],
            Self::Part => &[
                ("p_partkey", 'i'),
                ("p_name", 's'),
                ("p_mfgr", 's'),
                ("p_brand", 's'),
                ("p_type", 's'),
                ("p_size", 'i'),
                ("p_container", 's'),
                ("p_retailprice", 'm'),
                ("p_comment", 's'),
            ],
            Self::PartSupp => &[
                ("ps_partkey", 'i'),
                ("ps_suppkey", 'i'),
                ("ps_availqty", 'i'),
                ("ps_supplycost", 'm'),
                ("ps_comment", 's'),
            ],
            Self::Orders => &[
                ("o_orderkey", 'i'),
                ("o_custkey", 'i'),
                ("o_orderstatus", 's'),
                ("o_totalprice", 'm'),
                ("o_orderdate", 'd'),
                ("o_orderpriority", 's'),
                ("o_clerk", 's'),
                ("o_shippriority", 'i'),
                ("o_comment", 's'),
            ],
            Self::LineItem => &[
                ("l_orderkey", 'i'),
                ("l_partkey", 'i'),
                ("l_suppkey", 'i'),
                ("l_linenumber", 'i'),
                ("l_quantity", 'm'),
                ("l_extendedprice", 'm'),
                ("l_discount", 'm'),
                ("l_tax", 'm'),
                ("l_returnflag", 's'),
                ("l_linestatus", 's'),
                ("l_shipdate", 'd'),
                ("l_commitdate", 'd'),
                ("l_receiptdate", 'd'),
                ("l_shipinstruct", 's'),
                ("l_shipmode", 's'),
                ("l_comment", 's'),
            ],
        }
    }

    pub(super) fn schema(self) -> Schema {
        let field = |(name, kind): &(&str, char)| {
            let data_type = match kind {
                'i' => DataType::Int64,
                'm' => DataType::Decimal128(PRECISION, SCALE),
                'd' => DataType::Date32,
                _ => DataType::Utf8,
            };
            Field::new(*name, data_type, true)
        };
        Schema::new(self.columns().iter().map(field).collect::<Vec<_>>())
    }
}

/// All rows of one table, and those that come and go.
#[derive(Debug, Clone)]
pub(super) struct Tpch {
    table: Table,
    seed: u64,
    /// In hundredths.
    scale: u64,
    refreshes: u64,
    orders: Orders,
}

impl Tpch {
    pub(super) fn new(table: Table, seed: u64, scale_hundredths: u64, refreshes: u64) -> Self {
        Self {
            table,
            seed,
            scale: scale_hundredths,
            refreshes,
            orders: Orders::new(seed, scale_hundredths),
        }
    }

    /// Events before the first refresh: rows, or orders with their lines.
    pub(super) fn initial(&self) -> u64 {
        match self.table {
            Table::Region => text::REGIONS.len() as u64,
            Table::Nation => text::NATIONS.len() as u64,
            Table::Supplier => suppliers(self.scale),
            Table::Customer => customers(self.scale),
            Table::Part => parts(self.scale),
            Table::PartSupp => parts(self.scale) * OFFERS,
            Table::Orders | Table::LineItem => orders(self.scale),
        }
    }

    /// All events.
    pub(super) fn events(&self) -> u64 {
        let refreshes = if self.append_only() {
            0
        } else {
            self.refreshes
        };
        self.initial() + refreshes * 2 * refreshed(self.scale)
    }

    pub(super) fn append_only(&self) -> bool {
        self.refreshes == 0 || !self.table.is_refreshed()
    }

    /// An event after about `rows` rows from event `from` on.
    pub(super) fn end_of(&self, from: u64, rows: u64) -> u64 {
        let events = match self.table {
            Table::LineItem => (rows / 4).max(1),
            _ => rows,
        };
        from + events
    }

    /// Which order comes (+1) or goes (-1) at an event.
    fn order_at(&self, event: u64) -> (u64, i64) {
        let initial = orders(self.scale);
        let Some(refresh) = event.checked_sub(initial) else {
            return (event, 1);
        };
        let size = refreshed(self.scale);
        let (pair, place) = (refresh / (2 * size), refresh % (2 * size));
        match place.checked_sub(size) {
            None => (initial + pair * size + place, 1),
            Some(place) => (pair * size + place, -1),
        }
    }

    /// The rows of some events with their diffs; the columns of `output` only.
    pub(super) fn batch(
        &self,
        events: Range<u64>,
        output: &SchemaRef,
    ) -> Result<(RecordBatch, Option<Vec<i64>>)> {
        let (mut numbers, mut diffs) = (Vec::new(), Vec::new());
        for event in events {
            let (number, diff) = match self.table.is_refreshed() {
                true => self.order_at(event),
                false => (event, 1),
            };
            let before = numbers.len();
            match self.table {
                Table::LineItem => numbers.extend(self.orders.lines_of(number)),
                _ => numbers.push(number),
            }
            diffs.resize(diffs.len() + numbers.len() - before, diff);
        }
        let columns = output
            .fields()
            .iter()
            .map(|field| self.column(field.name(), &numbers))
            .collect();
        let options = RecordBatchOptions::new().with_row_count(Some(numbers.len()));
        let batch = RecordBatch::try_new_with_options(Arc::clone(output), columns, &options)
            .map_err(|e| Error::internal(format!("generated columns do not fit: {e}")))?;
        Ok((batch, (!self.append_only()).then_some(diffs)))
    }

    fn column(&self, name: &str, rows: &[u64]) -> ArrayRef {
        match self.table {
            Table::Region => self.region(name, rows),
            Table::Nation => self.nation(name, rows),
            Table::Supplier => self.supplier(name, rows),
            Table::Customer => self.customer(name, rows),
            Table::Part => self.part(name, rows),
            Table::PartSupp => self.partsupp(name, rows),
            Table::Orders => self.order(name, rows),
            Table::LineItem => self.line(name, rows),
        }
    }

    fn region(&self, column: &str, rows: &[u64]) -> ArrayRef {
        match column {
            "r_regionkey" => longs(rows, |n| n as i64),
            "r_name" => strings(rows, 12, |n, out| {
                out.extend_from_slice(text::REGIONS[n as usize].as_bytes());
            }),
            _ => self.comment("r_comment", rows, 31, 115),
        }
    }

    fn nation(&self, column: &str, rows: &[u64]) -> ArrayRef {
        match column {
            "n_nationkey" => longs(rows, |n| n as i64),
            "n_name" => strings(rows, 12, |n, out| {
                out.extend_from_slice(text::NATIONS[n as usize].0.as_bytes());
            }),
            "n_regionkey" => longs(rows, |n| text::NATIONS[n as usize].1),
            _ => self.comment("n_comment", rows, 31, 114),
        }
    }

    fn supplier(&self, column: &str, rows: &[u64]) -> ArrayRef {
        match column {
            "s_suppkey" => longs(rows, |n| n as i64 + 1),
            "s_name" => numbered("Supplier#", rows, |n| n + 1),
            "s_address" => self.address("s_address", rows),
            "s_nationkey" => self.nation_of("s_nationkey", rows),
            "s_phone" => self.phone("s_phone", "s_nationkey", rows),
            "s_acctbal" => self.balance("s_acctbal", rows),
            _ => self.supplier_comment(rows),
        }
    }

    fn supplier_comment(&self, rows: &[u64]) -> ArrayRef {
        let random = self.random("s_comment");
        let told = self.random("s_comment.told");
        let among = suppliers(self.scale).min(TOLD_OF);
        strings(rows, 64, |n, out| {
            let block = told.at(n / TOLD_OF);
            let complained = below(block, among);
            // Half way round, so never the same.
            let recommended = (complained + among / 2) % among;
            let said = match n % TOLD_OF {
                place if place == complained => "Complaints",
                place if place == recommended => "Recommends",
                _ => return text::append_comment(out, random.at(n), 25, 100),
            };
            text::append_comment(out, random.at(n), 8, 30);
            out.extend_from_slice(b"Customer ");
            text::append_comment(out, random.more(n, 0), 0, 20);
            out.extend_from_slice(said.as_bytes());
            text::append_comment(out, random.more(n, 1), 0, 20);
        })
    }

    fn customer(&self, column: &str, rows: &[u64]) -> ArrayRef {
        match column {
            "c_custkey" => longs(rows, |n| n as i64 + 1),
            "c_name" => numbered("Customer#", rows, |n| n + 1),
            "c_address" => self.address("c_address", rows),
            "c_nationkey" => self.nation_of("c_nationkey", rows),
            "c_phone" => self.phone("c_phone", "c_nationkey", rows),
            "c_acctbal" => self.balance("c_acctbal", rows),
            "c_mktsegment" => self.choice("c_mktsegment", rows, text::SEGMENTS),
            _ => self.comment("c_comment", rows, 29, 116),
        }
    }

    fn part(&self, column: &str, rows: &[u64]) -> ArrayRef {
        let maker = self.random("p_mfgr");
        match column {
            "p_partkey" => longs(rows, |n| n as i64 + 1),
            "p_name" => {
                let random = self.random("p_name");
                strings(rows, 34, |n, out| append_colors(out, random, n))
            }
            "p_mfgr" => numbered_plainly("Manufacturer#", rows, |n| 1 + below(maker.at(n), 5)),
            "p_brand" => {
                let brand = self.random("p_brand");
                numbered_plainly("Brand#", rows, |n| {
                    10 * (1 + below(maker.at(n), 5)) + 1 + below(brand.at(n), 5)
                })
            }
            "p_type" => self.phrase("p_type", rows, &text::TYPES),
            "p_size" => self.between("p_size", rows, 1, 50),
            "p_container" => self.phrase("p_container", rows, &text::CONTAINERS),
            "p_retailprice" => money(rows, |n| retail_price(n + 1)),
            _ => self.comment("p_comment", rows, 5, 22),
        }
    }

    fn partsupp(&self, column: &str, rows: &[u64]) -> ArrayRef {
        match column {
            "ps_partkey" => longs(rows, |n| (n / OFFERS) as i64 + 1),
            "ps_suppkey" => longs(rows, |n| {
                offered_by(n / OFFERS + 1, n % OFFERS, self.scale) as i64
            }),
            "ps_availqty" => self.between("ps_availqty", rows, 1, 9999),
            "ps_supplycost" => {
                let random = self.random("ps_supplycost");
                money(rows, |n| 100 + below(random.at(n), 99_901) as i64)
            }
            _ => self.comment("ps_comment", rows, 49, 198),
        }
    }

    fn order(&self, column: &str, rows: &[u64]) -> ArrayRef {
        let orders = &self.orders;
        match column {
            "o_orderkey" => longs(rows, |n| orders.key(n)),
            "o_custkey" => {
                let random = self.random("o_custkey");
                // Every third customer never orders.
                let buying = customers(self.scale) / 3 * 2;
                longs(rows, |n| {
                    let chosen = below(random.at(n), buying);
                    (chosen / 2 * 3 + chosen % 2 + 1) as i64
                })
            }
            "o_orderstatus" => strings(rows, 1, |n, out| out.push(orders.status(n))),
            "o_totalprice" => money(rows, |n| orders.total(n)),
            "o_orderdate" => dates(rows, |n| orders.date(n)),
            "o_orderpriority" => self.choice("o_orderpriority", rows, text::PRIORITIES),
            "o_clerk" => {
                let random = self.random("o_clerk");
                numbered("Clerk#", rows, |n| 1 + below(random.at(n), self.scale * 10))
            }
            "o_shippriority" => longs(rows, |_| 0),
            _ => self.comment("o_comment", rows, 19, 78),
        }
    }

    fn line(&self, column: &str, rows: &[u64]) -> ArrayRef {
        let orders = &self.orders;
        match column {
            "l_orderkey" => longs(rows, |n| orders.key(n / LINES)),
            "l_partkey" => longs(rows, |n| orders.part(n) as i64),
            "l_suppkey" => {
                let random = self.random("l_suppkey");
                longs(rows, |n| {
                    offered_by(orders.part(n), below(random.at(n), OFFERS), self.scale) as i64
                })
            }
            "l_linenumber" => longs(rows, |n| (n % LINES) as i64 + 1),
            "l_quantity" => money(rows, |n| orders.quantity(n) * 100),
            "l_extendedprice" => money(rows, |n| orders.price(n)),
            "l_discount" => money(rows, |n| orders.discount(n)),
            "l_tax" => money(rows, |n| orders.tax(n)),
            "l_returnflag" => {
                let random = self.random("l_returnflag");
                strings(rows, 1, |n, out| {
                    out.push(match orders.received(n) <= TODAY {
                        true => b"RA"[below(random.at(n), 2) as usize],
                        false => b'N',
                    });
                })
            }
            "l_linestatus" => strings(rows, 1, |n, out| {
                out.push(if orders.is_open(n) { b'O' } else { b'F' });
            }),
            "l_shipdate" => dates(rows, |n| orders.shipped(n)),
            "l_commitdate" => {
                let random = self.random("l_commitdate");
                dates(rows, |n| {
                    orders.date(n / LINES) + 30 + below(random.at(n), 61) as i32
                })
            }
            "l_receiptdate" => dates(rows, |n| orders.received(n)),
            "l_shipinstruct" => self.choice("l_shipinstruct", rows, text::INSTRUCTIONS),
            "l_shipmode" => self.choice("l_shipmode", rows, text::MODES),
            _ => self.comment("l_comment", rows, 10, 43),
        }
    }

    fn random(&self, column: &str) -> Column {
        random(self.seed, column)
    }

    fn between(&self, column: &str, rows: &[u64], least: u64, most: u64) -> ArrayRef {
        let random = self.random(column);
        longs(rows, |n| {
            (least + below(random.at(n), most - least + 1)) as i64
        })
    }

    fn choice(&self, column: &str, rows: &[u64], words: &[&str]) -> ArrayRef {
        self.phrase(column, rows, &[words])
    }

    /// One word of each list.
    fn phrase(&self, column: &str, rows: &[u64], lists: &[&[&str]]) -> ArrayRef {
        let random = self.random(column);
        strings(rows, 12 * lists.len(), |n, out| {
            for (i, words) in lists.iter().enumerate() {
                if i > 0 {
                    out.push(b' ');
                }
                out.extend_from_slice(pick(random.more(n, i as u64), words));
            }
        })
    }

    fn comment(&self, column: &str, rows: &[u64], least: u64, most: u64) -> ArrayRef {
        let random = self.random(column);
        strings(rows, ((least + most) / 2) as usize, |n, out| {
            text::append_comment(out, random.at(n), least, most);
        })
    }

    fn address(&self, column: &str, rows: &[u64]) -> ArrayRef {
        let random = self.random(column);
        strings(rows, 25, |n, out| {
            append_letters(out, random, n, 10 + below(random.at(n), 31) as usize);
        })
    }

    fn nation_of(&self, column: &str, rows: &[u64]) -> ArrayRef {
        self.between(column, rows, 0, text::NATIONS.len() as u64 - 1)
    }

    /// The country code is that of the nation.
    fn phone(&self, column: &str, nation: &str, rows: &[u64]) -> ArrayRef {
        let (random, nation) = (self.random(column), self.random(nation));
        strings(rows, 15, |n, out| {
            let nation = below(nation.at(n), text::NATIONS.len() as u64);
            append_padded(out, 10 + nation, 2);
            for (i, (least, most)) in [(100, 999), (100, 999), (1000, 9999)].iter().enumerate() {
                out.push(b'-');
                let digits = least + below(random.more(n, i as u64), most - least + 1);
                append_padded(out, digits, 3);
            }
        })
    }

    fn balance(&self, column: &str, rows: &[u64]) -> ArrayRef {
        let random = self.random(column);
        money(rows, |n| below(random.at(n), 1_099_999) as i64 - 99_999)
    }
}

/// What orders and their lines have in common.
#[derive(Debug, Clone)]
struct Orders {
    scale: u64,
    lines: Column,
    date: Column,
    part: Column,
    quantity: Column,
    discount: Column,
    tax: Column,
    shipped: Column,
    received: Column,
}

impl Orders {
    fn new(seed: u64, scale: u64) -> Self {
        Self {
            scale,
            lines: random(seed, "o_lines"),
            date: random(seed, "o_orderdate"),
            part: random(seed, "l_partkey"),
            quantity: random(seed, "l_quantity"),
            discount: random(seed, "l_discount"),
            tax: random(seed, "l_tax"),
            shipped: random(seed, "l_shipdate"),
            received: random(seed, "l_receiptdate"),
        }
    }

    /// The numbers of an order's lines.
    fn lines_of(&self, order: u64) -> Range<u64> {
        let first = order * LINES;
        first..first + 1 + below(self.lines.at(order), LINES - 1)
    }

    /// Of 32 keys in a row the first eight are used at first. New orders get the next eight, and so on
    /// around: by then the orders that had them are long gone.
    fn key(&self, order: u64) -> i64 {
        let initial = orders(self.scale);
        let (place, round) = (order % initial + 1, order / initial % 4);
        ((place / 8 * 4 + round) * 8 + place % 8) as i64
    }

    fn date(&self, order: u64) -> i32 {
        FIRST_DAY + below(self.date.at(order), (LAST_DAY - FIRST_DAY + 1) as u64) as i32
    }

    fn part(&self, line: u64) -> u64 {
        1 + below(self.part.at(line), parts(self.scale))
    }

    fn quantity(&self, line: u64) -> i64 {
        1 + below(self.quantity.at(line), 50) as i64
    }

    fn price(&self, line: u64) -> i64 {
        self.quantity(line) * retail_price(self.part(line))
    }

    /// In hundredths, as the tax.
    fn discount(&self, line: u64) -> i64 {
        below(self.discount.at(line), 11) as i64
    }

    fn tax(&self, line: u64) -> i64 {
        below(self.tax.at(line), 9) as i64
    }

    fn shipped(&self, line: u64) -> i32 {
        self.date(line / LINES) + 1 + below(self.shipped.at(line), 121) as i32
    }

    fn received(&self, line: u64) -> i32 {
        self.shipped(line) + 1 + below(self.received.at(line), 30) as i32
    }

    fn is_open(&self, line: u64) -> bool {
        self.shipped(line) > TODAY
    }

    fn status(&self, order: u64) -> u8 {
        let mut lines = self.lines_of(order);
        let first = self.is_open(lines.start);
        match lines.all(|line| self.is_open(line) == first) {
            true if first => b'O',
            true => b'F',
            false => b'P',
        }
    }

    /// What its lines cost after discount and with tax, rounded to cents.
    fn total(&self, order: u64) -> i64 {
        let exact = |line| self.price(line) * (100 - self.discount(line)) * (100 + self.tax(line));
        let sum: i64 = self.lines_of(order).map(exact).sum();
        (sum + 5_000) / 10_000
    }
}

/// Rows at a scale, which is given in hundredths.
fn suppliers(scale: u64) -> u64 {
    scale * 100
}

fn customers(scale: u64) -> u64 {
    scale * 1500
}

fn parts(scale: u64) -> u64 {
    scale * 2000
}

fn orders(scale: u64) -> u64 {
    scale * 15_000
}

/// Orders that one refresh brings or takes.
fn refreshed(scale: u64) -> u64 {
    scale * 15
}

/// One of the four suppliers of a part, spread so that each supplier has eighty parts.
fn offered_by(part: u64, offer: u64, scale: u64) -> u64 {
    let suppliers = suppliers(scale);
    (part + offer * (suppliers / 4 + (part - 1) / suppliers)) % suppliers + 1
}

/// In cents.
fn retail_price(part: u64) -> i64 {
    (90_000 + part / 10 % 20_001 + 100 * (part % 1000)) as i64
}

fn random(seed: u64, column: &str) -> Column {
    Column::named(seed, &format!("tpch.{column}"))
}

/// Five different colors.
fn append_colors(out: &mut Vec<u8>, random: Column, n: u64) {
    let mut chosen = [usize::MAX; 5];
    for i in 0..chosen.len() {
        let mut color = below(random.more(n, i as u64), text::COLORS.len() as u64) as usize;
        while chosen[..i].contains(&color) {
            color = (color + 1) % text::COLORS.len();
        }
        chosen[i] = color;
        if i > 0 {
            out.push(b' ');
        }
        out.extend_from_slice(text::COLORS[color].as_bytes());
    }
}

/// `Customer#000000007`
fn numbered(prefix: &str, rows: &[u64], number: impl Fn(u64) -> u64) -> ArrayRef {
    strings(rows, prefix.len() + 9, |n, out| {
        out.extend_from_slice(prefix.as_bytes());
        append_padded(out, number(n), 9);
    })
}

/// `Brand#23`
fn numbered_plainly(prefix: &str, rows: &[u64], number: impl Fn(u64) -> u64) -> ArrayRef {
    strings(rows, prefix.len() + 2, |n, out| {
        out.extend_from_slice(prefix.as_bytes());
        append_padded(out, number(n), 1);
    })
}

fn money(rows: &[u64], cents: impl Fn(u64) -> i64) -> ArrayRef {
    let values = rows.iter().map(|n| i128::from(cents(*n)));
    let array = Decimal128Array::from_iter_values(values);
    let array = array.with_precision_and_scale(PRECISION, SCALE);
    Arc::new(array.expect("the type is one that exists"))
}

fn dates(rows: &[u64], day: impl Fn(u64) -> i32) -> ArrayRef {
    Arc::new(Date32Array::from_iter_values(rows.iter().map(|n| day(*n))))
}

#[cfg(test)]
mod tests;
