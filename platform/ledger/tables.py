"""The ledger's tables, and the part of I1 that the schema itself holds, so that no bug in Python breaks it silently.

- A group moves only along the arrows of ledger.py, and is refused exactly when it has a reason (trigger `legal_move`).
- A slot has at most one living group (unique index `living_slot`).
- The counts by state move with the groups, in the same transaction (triggers `count_admission`, `count_move`).
"""

LEDGER_SCHEMA = 5
"""Kept as the file's user_version; another one is refused."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (
    id INTEGER PRIMARY KEY,               -- admission counter = problem index
    slot INTEGER NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    detail TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 1,
    holder TEXT NOT NULL DEFAULT '',      -- '' while leased: returned, to be issued again
    leased_at REAL NOT NULL DEFAULT 0,
    needs INTEGER NOT NULL,               -- lease.min_version
    arrival INTEGER,                      -- order of arrival
    queued_at REAL,
    queued_version INTEGER,
    min_version INTEGER,
    max_version INTEGER,
    versions TEXT,                        -- {version: tokens}
    samples INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0,
    lineage INTEGER NOT NULL DEFAULT 0,
    batch INTEGER,
    position INTEGER,
    shard TEXT
);
CREATE UNIQUE INDEX living_slot ON groups(slot) WHERE state <> 'refused';
CREATE INDEX leased ON groups(holder, slot) WHERE state = 'leased';
CREATE INDEX queued ON groups(arrival) WHERE state = 'queued';
CREATE INDEX batched ON groups(batch) WHERE batch IS NOT NULL;
CREATE INDEX sharded ON groups(shard) WHERE shard IS NOT NULL;
CREATE TABLE payloads (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE batches (
    step INTEGER PRIMARY KEY, ids TEXT NOT NULL, tokens INTEGER NOT NULL, stale_tokens INTEGER NOT NULL,
    age_sum INTEGER NOT NULL, age_max INTEGER NOT NULL, flight_sum INTEGER NOT NULL, queue_sum INTEGER NOT NULL,
    trained INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE versions (
    version INTEGER, lineage INTEGER, checksum TEXT NOT NULL, dead INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (version, lineage)
) WITHOUT ROWID;
CREATE INDEX lineages ON versions(lineage);
CREATE TABLE steps (step INTEGER PRIMARY KEY, metrics TEXT NOT NULL);
CREATE TABLE evals (version INTEGER PRIMARY KEY, metrics TEXT NOT NULL);
CREATE TABLE charges (
    role TEXT, place INTEGER, life INTEGER, name TEXT, amount REAL NOT NULL, PRIMARY KEY (role, place, life, name)
) WITHOUT ROWID;
CREATE TABLE shards (
    name TEXT PRIMARY KEY,
    sealed INTEGER NOT NULL DEFAULT 0     -- 1: its file stands; 2: it cannot be written and was set aside
) WITHOUT ROWID;
CREATE INDEX unsealed ON shards(name) WHERE sealed = 0;
CREATE TABLE aside (what TEXT PRIMARY KEY, why TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tally (
    state TEXT, reason TEXT, n INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (state, reason)
) WITHOUT ROWID;
CREATE TRIGGER count_admission AFTER INSERT ON groups BEGIN
    INSERT INTO tally VALUES (NEW.state, NEW.reason, 1, NEW.tokens)
        ON CONFLICT DO UPDATE SET n = n + 1, tokens = tokens + NEW.tokens;
END;
CREATE TRIGGER count_move AFTER UPDATE OF state, reason, tokens ON groups BEGIN
    UPDATE tally SET n = n - 1, tokens = tokens - OLD.tokens WHERE state = OLD.state AND reason = OLD.reason;
    INSERT INTO tally VALUES (NEW.state, NEW.reason, 1, NEW.tokens)
        ON CONFLICT DO UPDATE SET n = n + 1, tokens = tokens + NEW.tokens;
END;
CREATE TRIGGER legal_start BEFORE INSERT ON groups WHEN NEW.state <> 'leased' BEGIN
    SELECT RAISE(ABORT, 'a group is admitted as leased');
END;
CREATE TRIGGER legal_move BEFORE UPDATE OF state ON groups WHEN OLD.state || ' to ' || NEW.state NOT IN (
    'leased to queued', 'leased to refused', 'queued to leased', 'queued to training', 'queued to refused',
    'training to trained', 'trained to training', 'training to queued', 'training to refused'
) OR OLD.state = 'queued' AND NEW.state = 'leased' AND NEW.attempt <= OLD.attempt
OR (NEW.state = 'refused') <> (NEW.reason <> '') BEGIN
    SELECT RAISE(ABORT, 'illegal move of a group');
END;
"""
