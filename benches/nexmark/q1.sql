SELECT auction, bidder, 0.908 * CAST(price AS DECIMAL(18, 3)) AS price, date_time FROM bid
