SELECT b.auction, b.price, b.bidder, b.date_time, m.window_end
FROM TUMBLE(bid, date_time, INTERVAL '10' SECOND) AS b
JOIN (
  SELECT max(price) AS highest, window_start, window_end
  FROM TUMBLE(bid, date_time, INTERVAL '10' SECOND)
  GROUP BY window_start, window_end
) AS m
ON b.price = m.highest AND b.window_start = m.window_start AND b.window_end = m.window_end
EMIT ON WINDOW CLOSE
