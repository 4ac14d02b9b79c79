PRAGMA journal_mode = WAL;
PRAGMA cache_size = -24000;
CREATE TABLE customer(id INTEGER PRIMARY KEY, name TEXT, mail TEXT UNIQUE, balance INTEGER, note TEXT);
CREATE TABLE entry(id INTEGER PRIMARY KEY, customer INTEGER, at INTEGER, amount INTEGER, reference BLOB);
CREATE INDEX entry_customer ON entry(customer, at);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
INSERT INTO customer SELECT i, 'Customer number ' || i, 'customer.' || (i * 7919 % 40009) || '@example.org', random() % 100000,
  CASE i % 4 WHEN 0 THEN 'pays monthly, by invoice' WHEN 1 THEN 'pays yearly' WHEN 2 THEN ''
  ELSE 'calls on weekdays between nine and five, reference ' || hex(randomblob(8)) END FROM n;
