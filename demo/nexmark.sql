-- The auction of the Nexmark benchmark, generated: people sell items and bid for them.
CREATE SOURCE person  WITH (connector = 'generator', kind = 'nexmark', table = 'person',  seed = '1', rate = '@RATE@');
CREATE SOURCE auction WITH (connector = 'generator', kind = 'nexmark', table = 'auction', seed = '1', rate = '@RATE@');
CREATE SOURCE bid     WITH (connector = 'generator', kind = 'nexmark', table = 'bid',     seed = '1', rate = '@RATE@');

-- Bids per auction in each window of four seconds, begun every two; a window leaves once, when it has
-- closed, into the Iceberg table of that name.
CREATE MATERIALIZED VIEW lake.nexmark.hot_items AS
  SELECT auction, window_start, window_end, count(*) AS bids, max(price) AS best_price
  FROM HOP(bid, date_time, INTERVAL '2' SECOND, INTERVAL '4' SECOND)
  GROUP BY auction, window_start, window_end
  EMIT ON WINDOW CLOSE;

-- Kept up to date with every bid, and read while it changes.
CREATE MATERIALIZED VIEW bids_per_auction AS
  SELECT auction, count(*) AS bids, max(price) AS best_price FROM bid GROUP BY auction;
CREATE MATERIALIZED VIEW ranking AS
  SELECT b.auction, a.item_name AS item, b.bids, b.best_price
  FROM bids_per_auction b JOIN auction a ON a.id = b.auction;
CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS bids FROM bid;

-- Who sells where: people and their auctions.
CREATE MATERIALIZED VIEW sellers AS
  SELECT p.state, count(*) AS auctions
  FROM auction a JOIN person p ON a.seller = p.id GROUP BY p.state;
