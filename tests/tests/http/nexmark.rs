//! Nexmark's queries as views: each equal to the batch answer over the same events.

use millrace_tests::server::{Fed, Server};
use serde_json::Value;

const EVENTS: u64 = 20_000;

/// Of q13 the side input, of q12 processing time are missing; q10's files are a sink.
const QUERIES: &[(&str, &str)] = &[
    (
        "q0",
        "SELECT auction, bidder, price, date_time, extra FROM bid",
    ),
    (
        "q1",
        "SELECT auction, bidder, 0.908 * price AS price, date_time FROM bid",
    ),
    (
        "q2",
        "SELECT auction, price FROM bid WHERE auction % 123 = 0",
    ),
    (
        "q3",
        "SELECT p.name, p.city, p.state, a.id FROM auction a JOIN person p ON a.seller = p.id \
         WHERE a.category = 10 AND (p.state = 'OR' OR p.state = 'ID' OR p.state = 'CA')",
    ),
    (
        "q4",
        "SELECT q.category, avg(q.final) AS mean FROM (SELECT max(b.price) AS final, a.category \
         FROM auction a, bid b WHERE a.id = b.auction AND b.date_time BETWEEN a.date_time AND a.expires \
         GROUP BY a.id, a.category) q GROUP BY q.category",
    ),
    (
        "q5",
        "SELECT a.auction, a.num, a.window_end FROM (SELECT auction, count(*) AS num, window_end \
         FROM HOP(bid, date_time, INTERVAL '2' SECOND, INTERVAL '10' SECOND) GROUP BY auction, window_end) a \
         JOIN (SELECT max(num) AS most, window_end FROM (SELECT auction, count(*) AS num, window_end \
         FROM HOP(bid, date_time, INTERVAL '2' SECOND, INTERVAL '10' SECOND) GROUP BY auction, window_end) c \
         GROUP BY window_end) m ON a.window_end = m.window_end AND a.num = m.most",
    ),
    (
        "q6",
        "SELECT seller, id, avg(final) OVER (PARTITION BY seller ORDER BY expires, id \
         ROWS BETWEEN 9 PRECEDING AND CURRENT ROW) AS mean FROM (SELECT a.id, a.seller, a.expires, \
         max(b.price) AS final FROM auction a JOIN bid b ON a.id = b.auction \
         WHERE b.date_time BETWEEN a.date_time AND a.expires GROUP BY a.id, a.seller, a.expires) w",
    ),
    (
        "q7",
        "SELECT b.auction, b.price, b.bidder, b.date_time, m.window_end \
         FROM TUMBLE(bid, date_time, INTERVAL '10' SECOND) b JOIN (SELECT max(price) AS highest, window_end \
         FROM TUMBLE(bid, date_time, INTERVAL '10' SECOND) GROUP BY window_end) m \
         ON b.price = m.highest AND b.window_end = m.window_end",
    ),
    (
        "q8",
        "SELECT p.id, p.name, p.window_start FROM (SELECT id, name, window_start, window_end \
         FROM TUMBLE(person, date_time, INTERVAL '10' SECOND) GROUP BY id, name, window_start, window_end) p \
         JOIN (SELECT seller, window_start, window_end FROM TUMBLE(auction, date_time, INTERVAL '10' SECOND) \
         GROUP BY seller, window_start, window_end) a ON p.id = a.seller AND p.window_start = a.window_start \
         AND p.window_end = a.window_end",
    ),
    (
        "q9",
        "SELECT id, item_name, bidder, price, at FROM (SELECT a.id, a.item_name, b.bidder, b.price, \
         b.date_time AS at, row_number() OVER (PARTITION BY a.id ORDER BY b.price DESC, b.date_time, b.bidder) AS rn \
         FROM auction a JOIN bid b ON a.id = b.auction WHERE b.date_time BETWEEN a.date_time AND a.expires) w \
         WHERE rn <= 1",
    ),
    (
        "q10",
        "SELECT auction, bidder, price, date_time, to_char(date_time, 'YYYY-MM-DD') AS dt, \
         to_char(date_time, 'HH24:MI') AS hm FROM bid",
    ),
    (
        "q11",
        "SELECT bidder, count(*) AS bids, window_start, window_end \
         FROM SESSION(bid, date_time, INTERVAL '10' SECOND, bidder) GROUP BY bidder, window_start, window_end",
    ),
    (
        "q14",
        "SELECT auction, bidder, 0.908 * price AS price, CASE WHEN date_part('hour', date_time) >= 8 \
         AND date_part('hour', date_time) <= 18 THEN 'day' WHEN date_part('hour', date_time) <= 6 \
         OR date_part('hour', date_time) >= 20 THEN 'night' ELSE 'other' END AS kind, \
         length(extra) - length(replace(extra, 'c', '')) AS cs FROM bid \
         WHERE 0.908 * price > 1000000 AND 0.908 * price < 50000000",
    ),
    (
        "q15",
        "SELECT to_char(date_time, 'YYYY-MM-DD') AS day, count(*) AS total, \
         count(*) FILTER (WHERE price < 10000) AS rank1, \
         count(*) FILTER (WHERE price >= 10000 AND price < 1000000) AS rank2, \
         count(DISTINCT bidder) AS bidders, count(DISTINCT bidder) FILTER (WHERE price < 10000) AS rank1_bidders, \
         count(DISTINCT auction) AS auctions, count(DISTINCT auction) FILTER (WHERE price >= 10000) AS others \
         FROM bid GROUP BY to_char(date_time, 'YYYY-MM-DD')",
    ),
    (
        "q16",
        "SELECT channel, to_char(date_time, 'YYYY-MM-DD') AS day, max(to_char(date_time, 'HH24:MI')) AS minute, \
         count(*) AS total, count(DISTINCT bidder) AS bidders, \
         count(DISTINCT auction) FILTER (WHERE price < 10000) AS rank1_auctions \
         FROM bid GROUP BY channel, to_char(date_time, 'YYYY-MM-DD')",
    ),
    (
        "q17",
        "SELECT auction, to_char(date_time, 'YYYY-MM-DD') AS day, count(*) AS total, \
         count(*) FILTER (WHERE price < 10000) AS rank1, min(price) AS low, max(price) AS high, \
         avg(price) AS mean, sum(price) AS volume FROM bid GROUP BY auction, to_char(date_time, 'YYYY-MM-DD')",
    ),
    (
        "q18",
        "SELECT auction, bidder, price, date_time FROM (SELECT *, row_number() OVER (PARTITION BY bidder, auction \
         ORDER BY date_time DESC, price DESC) AS rn FROM bid) b WHERE rn <= 1",
    ),
    (
        "q19",
        "SELECT auction, bidder, price, rn FROM (SELECT *, row_number() OVER (PARTITION BY auction \
         ORDER BY price DESC, date_time, bidder) AS rn FROM bid) b WHERE rn <= 10",
    ),
    (
        "q20",
        "SELECT b.auction, b.bidder, b.price, a.item_name, a.category FROM bid b \
         JOIN auction a ON b.auction = a.id WHERE a.category = 10",
    ),
    (
        "q21",
        "SELECT auction, bidder, price, channel, CASE WHEN lower(channel) = 'apple' THEN '0' \
         WHEN lower(channel) = 'google' THEN '1' WHEN lower(channel) = 'facebook' THEN '2' \
         WHEN lower(channel) = 'baidu' THEN '3' ELSE regexp_replace(url, '.*channel_id=([^&]*).*', '\\\\1') END AS id \
         FROM bid WHERE url LIKE '%channel_id=%' OR lower(channel) IN ('apple', 'google', 'facebook', 'baidu')",
    ),
    (
        "q22",
        "SELECT auction, bidder, price, channel, split_part(url, '/', 4) AS dir1, \
         split_part(url, '/', 5) AS dir2, split_part(url, '/', 6) AS dir3 FROM bid",
    ),
];

#[test]
fn nexmark_as_views_equals_batch() {
    let server = Server::start(&[]);
    for table in ["person", "auction", "bid"] {
        server.run(&format!(
            "CREATE SOURCE {table} WITH (connector = 'generator', kind = 'nexmark', table = '{table}', \
             seed = 7, max_events = {EVENTS})"
        ));
    }
    for (name, query) in QUERIES {
        server.run(&format!("CREATE MATERIALIZED VIEW {name} AS {query}"));
    }
    let ended = ["person", "auction", "bid"].map(Fed::Ended);
    server.caught_up(&ended, super::LIMIT);
    let mut differ = Vec::new();
    for (name, query) in QUERIES {
        let view = rows(&server.sql(&format!("SELECT * FROM {name}")));
        let batch = rows(&server.sql(query));
        assert!(!batch.is_empty(), "{name} has rows to compare");
        if view != batch {
            let missing = batch.iter().filter(|row| !view.contains(row)).take(3);
            differ.push(format!(
                "{name}: {} rows in the view, {} in the batch answer; missing {:?}",
                view.len(),
                batch.len(),
                missing.collect::<Vec<_>>()
            ));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

fn rows(answer: &Value) -> Vec<String> {
    let rows = answer["results"][0]["rows"].as_array();
    let rows = rows.unwrap_or_else(|| panic!("{answer}"));
    let mut rows: Vec<String> = rows.iter().map(ToString::to_string).collect();
    rows.sort();
    rows
}
