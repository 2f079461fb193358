SELECT a.auction, a.num, a.window_end
FROM (
  SELECT auction, count(*) AS num, window_start, window_end
  FROM HOP(bid, date_time, INTERVAL '2' SECOND, INTERVAL '10' SECOND)
  GROUP BY auction, window_start, window_end
) AS a
JOIN (
  SELECT max(num) AS most, window_start, window_end
  FROM (
    SELECT auction, count(*) AS num, window_start, window_end
    FROM HOP(bid, date_time, INTERVAL '2' SECOND, INTERVAL '10' SECOND)
    GROUP BY auction, window_start, window_end
  ) AS c
  GROUP BY window_start, window_end
) AS m
ON a.window_start = m.window_start AND a.window_end = m.window_end AND a.num = m.most
EMIT ON WINDOW CLOSE
