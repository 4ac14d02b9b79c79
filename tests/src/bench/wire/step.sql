BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50)
INSERT INTO entry(customer, at, amount, reference)
  SELECT 1 + abs(random()) % 40000, strftime('%s', 'now'), random() % 10000, randomblob(16) FROM n;
UPDATE customer SET balance = balance + 1 WHERE id IN (SELECT customer FROM entry ORDER BY id DESC LIMIT 50);
COMMIT;
SELECT sum(amount) FROM entry WHERE customer = 1 + abs(random()) % 40000;
