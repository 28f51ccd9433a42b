-- The send queue and the outreach dispatcher: both databases, in one file.
--
-- Two databases, which may be one and the same:
--
--   icloud   devices (the Macs that send) and send_queue (the messages handed to them).
--            Only send_queue_server.py hands rows out; the dispatcher reads results and takes
--            uncollected rows back.
--   quinn    the platform's clients, and outreach: batches, their items, the sending settings.
--            Only dispatcher.py moves items.
--
-- Apply it with `python db.py migrate`, which gives each database its part and says what changed, or
-- give one database both parts with `psql -f schema.sql`. Every statement may run again, also over
-- tables that the platform made itself: what is missing is added, what is there is left alone.
-- On databases in use, take `migrate`: it leaves out each ADD COLUMN and CREATE INDEX that has nothing
-- to do (here, each would lock its table all the same), and builds an index CONCURRENTLY. So each
-- ALTER TABLE outside a DO block adds one column, and a changed index gets a new name.
--
-- Vocabulary. A *batch* holds one rendered message, an *item*, for each client. The dispatcher
-- *claims* an item, *enqueues* its message and so makes a *row* in the queue; a *device* *collects*
-- the row by polling, sends it, and reports a *result*. An item is *in flight* from its claim until its
-- result is known here. To *withdraw* a row is to take it back before any device has collected it.
--
--   a queue row:   queued --> sent                    both ends are final;
--                  queued --> failed                  withdrawn_at tells a withdrawal from a failure
--
--   an item:       pending --> queued --> sent
--                     |  ^        | \---> failed       (a result, or the row's device was deleted)
--                     |  \--------/                    (withdrawn)
--                     |---> skipped                    (nobody to send it to)
--                     \---> failed                     (refused by the server; --retry: failed --> pending)
--                  pending --> sent or failed         (claimed; its answer was lost, and its row has ended)
--
--   a batch:       draft --> sending <--> paused       set by its owner, as is `cancelled`;
--                  sending --> sent                    set by the dispatcher, when every item has ended
--
-- Why a claim. Limits count what is in flight. An enqueue whose answer was lost has made a row that no
-- item points to; the claim, committed before the request, is what still counts it. The queue's
-- unique batch_item_id is what makes repeating the request harmless.
--
-- Indexes are partial, over what is alive: a poll, a tick and a sync cost what is in hand, not what
-- was sent last year.
--
-- The planner's estimates may be a day old, or from before the first row, so hot statements leave it no bad plan:
-- an EXISTS with OFFSET 0 stays a look-up and never becomes a join over all rows, and an UPDATE of known ids repeats
-- the old state as `CASE status WHEN 'pending' THEN true END`, for which no partial index can be walked in place of
-- the primary key. tests/test_plans.py counts what each statement reads.

-- part: icloud ---------------------------------------------------------------------------------------

-- Tables that were here before must have what is read from them. This comes first: if one does not, nothing is changed.
DO $$
DECLARE
    missing TEXT := (
        SELECT string_agg(format('table icloud.%s has no column %s', tab, col), '; ')
          FROM (VALUES ('devices', '{id,token}'::text[]),
                       ('send_queue', '{id,device_id,to_handle,body,status,sent_at,failure_reason,created_at,updated_at}')
               ) AS needed (tab, cols), unnest(needed.cols) AS col
         WHERE to_regclass('icloud.' || tab) IS NOT NULL
           AND NOT EXISTS (SELECT FROM pg_attribute
                            WHERE attrelid = to_regclass('icloud.' || tab) AND attname = col AND attnum > 0));
BEGIN
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION '%', missing USING HINT = 'Add it to that table, then run this again.';
    END IF;
END $$;

CREATE SCHEMA IF NOT EXISTS icloud;

-- `token` is either the plain token or `sha256:` and the hex digest of it (what add-device stores).
CREATE TABLE IF NOT EXISTS icloud.devices (
    id           UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name         TEXT NOT NULL,
    token        TEXT NOT NULL,
    last_seen_at TIMESTAMPTZ,
    created_at   TIMESTAMPTZ NOT NULL DEFAULT now()
);
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS last_seen_at TIMESTAMPTZ;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ NOT NULL DEFAULT now();

-- `send_queue_id` is the platform's column; nothing here reads it: a row's own id is its queue id. `drafted_at` is when
-- the item was made; a row that was put in by hand has none.
CREATE TABLE IF NOT EXISTS icloud.send_queue (
    id             UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    device_id      UUID NOT NULL REFERENCES icloud.devices (id) ON DELETE CASCADE,
    status         TEXT NOT NULL DEFAULT 'queued',
    to_handle      TEXT NOT NULL,
    body           TEXT NOT NULL,
    sent_at        TIMESTAMPTZ,
    failure_reason TEXT,
    send_queue_id  TEXT,
    created_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    batch_item_id  UUID,
    drafted_at     TIMESTAMPTZ,
    collected_at   TIMESTAMPTZ,
    valid_until    TIMESTAMPTZ,
    withdrawn_at   TIMESTAMPTZ,
    CONSTRAINT send_queue_status_is_known CHECK (status IN ('queued', 'sent', 'failed')),
    CONSTRAINT send_queue_sent_has_a_time CHECK ((status = 'sent') = (sent_at IS NOT NULL)),
    CONSTRAINT send_queue_withdrawn_was_never_collected
        CHECK (withdrawn_at IS NULL OR (status = 'failed' AND collected_at IS NULL))
);
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS batch_item_id UUID;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS drafted_at TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS collected_at TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS valid_until TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS withdrawn_at TIMESTAMPTZ;

-- A token names one device.
CREATE UNIQUE INDEX IF NOT EXISTS devices_token ON icloud.devices (token);
-- The idempotency key: an item has at most one row that is waiting or was sent.
CREATE UNIQUE INDEX IF NOT EXISTS send_queue_batch_item
    ON icloud.send_queue (batch_item_id) WHERE status <> 'failed';
-- The failures of an item, for a sync that finds it claimed.
CREATE INDEX IF NOT EXISTS send_queue_failed_of_item
    ON icloud.send_queue (batch_item_id) WHERE status = 'failed';
-- A device's poll, already in its order.
CREATE INDEX IF NOT EXISTS send_queue_waiting
    ON icloud.send_queue (device_id, created_at, id) WHERE status = 'queued';
-- What could still be withdrawn. By id, so that a poll that collects its page finds each row here at once: by
-- another column, the planner reads every device's uncollected rows for it.
CREATE INDEX IF NOT EXISTS send_queue_uncollected
    ON icloud.send_queue (id) WHERE status = 'queued' AND collected_at IS NULL;
-- The results of the last hour, for GET status.
CREATE INDEX IF NOT EXISTS send_queue_ended
    ON icloud.send_queue (updated_at) WHERE status <> 'queued';

-- part: quinn ----------------------------------------------------------------------------------------

-- Tables that were here before must have what is read from them. This comes first: if one does not, nothing is changed.
DO $$
DECLARE
    missing TEXT := (
        SELECT string_agg(format('table %s has no column %s', tab, col), '; ')
          FROM (VALUES ('clients', '{id}'::text[]),
                       ('contact_relationships', '{client_id,handle,is_primary}'),
                       ('outreach_batches', '{id,status,created_at,updated_at}'),
                       ('outreach_batch_items', '{id,batch_id,client_id,rendered_body,status,send_queue_id,'
                           'sent_at,failure_reason,created_at,updated_at}'),
                       ('outreach_settings', '{id,paused,quiet_hours_start,quiet_hours_end,'
                           'max_per_minute,max_per_hour,max_per_day,min_gap_seconds}')
               ) AS needed (tab, cols), unnest(needed.cols) AS col
         WHERE to_regclass(tab) IS NOT NULL
           AND NOT EXISTS (SELECT FROM pg_attribute
                            WHERE attrelid = to_regclass(tab) AND attname = col AND attnum > 0));
BEGIN
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION '%', missing USING HINT = 'Add it to that table, then run this again.';
    END IF;
END $$;

-- Stand-ins for the platform's own tables, with just the columns that are read.
CREATE TABLE IF NOT EXISTS clients (
    id   UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS contact_relationships (
    client_id  UUID NOT NULL,
    handle     TEXT NOT NULL,
    is_primary BOOLEAN NOT NULL DEFAULT false
);

-- `last_served_at` is the batch's place in the turns: the batch that waited longest goes first.
CREATE TABLE IF NOT EXISTS outreach_batches (
    id             UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    status         TEXT NOT NULL DEFAULT 'draft',
    dry_run        BOOLEAN NOT NULL DEFAULT false,
    template       TEXT NOT NULL,
    vars           JSONB NOT NULL DEFAULT '{}',
    query_json     JSONB NOT NULL DEFAULT '{}',
    created_by     TEXT,
    created_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    last_served_at TIMESTAMPTZ,
    CONSTRAINT outreach_batches_status_is_known
        CHECK (status IN ('draft', 'sending', 'paused', 'sent', 'cancelled'))
);
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS dry_run BOOLEAN NOT NULL DEFAULT false;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS last_served_at TIMESTAMPTZ;

-- No foreign key to clients: that table is the platform's, and so are its deletions. An item whose
-- client is gone has no handle and is skipped. `claimed_at` has a meaning only while `pending`.
CREATE TABLE IF NOT EXISTS outreach_batch_items (
    id             UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    batch_id       UUID NOT NULL REFERENCES outreach_batches (id) ON DELETE CASCADE,
    client_id      UUID NOT NULL,
    status         TEXT NOT NULL DEFAULT 'pending',
    rendered_body  TEXT NOT NULL,
    queued_at      TIMESTAMPTZ,
    sent_at        TIMESTAMPTZ,
    failure_reason TEXT,
    send_queue_id  TEXT,
    device_id      UUID,
    created_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    claimed_at     TIMESTAMPTZ,
    CONSTRAINT outreach_batch_items_status_is_known
        CHECK (status IN ('pending', 'queued', 'sent', 'failed', 'skipped')),
    CONSTRAINT outreach_batch_items_sent_has_a_time CHECK (status <> 'sent' OR sent_at IS NOT NULL)
);
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS queued_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS device_id UUID;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS claimed_at TIMESTAMPTZ;

-- One row. A NULL limit means none. Quiet hours are HH:MM, both or neither, in `quiet_hours_tz`
-- (an IANA name; NULL: the dispatcher host's local time). The same start and end mean none. They carry
-- no CHECK: a value that cannot be read disables them with a warning in the log. The dispatcher writes the
-- last three: when a tick began, and when each job last did its work.
CREATE TABLE IF NOT EXISTS outreach_settings (
    id                 INTEGER PRIMARY KEY DEFAULT 1,
    paused             BOOLEAN NOT NULL DEFAULT false,
    quiet_hours_start  TEXT,
    quiet_hours_end    TEXT,
    quiet_hours_tz     TEXT,
    max_per_minute     INTEGER,
    max_per_hour       INTEGER,
    max_per_day        INTEGER,
    min_gap_seconds    INTEGER,
    device_id          UUID,
    last_dispatched_at TIMESTAMPTZ,
    last_synced_at     TIMESTAMPTZ,
    last_tick_at       TIMESTAMPTZ,
    CONSTRAINT outreach_settings_is_one_row CHECK (id = 1),
    CONSTRAINT outreach_settings_limits_are_not_negative
        CHECK (LEAST(max_per_minute, max_per_hour, max_per_day, min_gap_seconds) >= 0)
);
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS quiet_hours_tz TEXT;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS device_id UUID;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS last_dispatched_at TIMESTAMPTZ;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS last_synced_at TIMESTAMPTZ;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS last_tick_at TIMESTAMPTZ;

-- Where the platform keys its clients by another type than UUID, the (still empty) tables made above follow it.
DO $$
DECLARE
    key_type TEXT := (SELECT format_type(atttypid, atttypmod) FROM pg_attribute
                       WHERE attrelid = 'clients'::regclass AND attname = 'id');
    made     TEXT;
BEGIN
    FOREACH made IN ARRAY ARRAY['outreach_batch_items', 'contact_relationships'] LOOP
        IF (SELECT format_type(atttypid, atttypmod) FROM pg_attribute
             WHERE attrelid = made::regclass AND attname = 'client_id') = 'uuid' AND key_type <> 'uuid' THEN
            EXECUTE format('ALTER TABLE %I ALTER COLUMN client_id TYPE %s USING client_id::text::%s',
                           made, key_type, key_type);
        END IF;
    END LOOP;
END $$;

-- A client's handle, and the turns of the batches.
CREATE INDEX IF NOT EXISTS contact_relationships_primary
    ON contact_relationships (client_id) WHERE is_primary;
CREATE INDEX IF NOT EXISTS outreach_batches_sending
    ON outreach_batches (last_served_at NULLS FIRST, created_at, id) WHERE status = 'sending';
-- A batch's next item; an EXISTS over it also tells that a batch has items left.
CREATE INDEX IF NOT EXISTS outreach_batch_items_pending
    ON outreach_batch_items (batch_id, created_at, id) WHERE status = 'pending';
-- What is in flight: the sync job's work list, and a share of every limit.
CREATE INDEX IF NOT EXISTS outreach_batch_items_queued
    ON outreach_batch_items (batch_id) WHERE status = 'queued';
CREATE INDEX IF NOT EXISTS outreach_batch_items_claimed
    ON outreach_batch_items (batch_id) WHERE status = 'pending' AND claimed_at IS NOT NULL;
-- Usage of the limits, newest first; a batch's newest send, for the gap; a client's, for its device.
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent
    ON outreach_batch_items (sent_at) WHERE status = 'sent';
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent_of_batch
    ON outreach_batch_items (batch_id, sent_at) WHERE status = 'sent';
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent_to_client
    ON outreach_batch_items (client_id, sent_at) WHERE status = 'sent' AND device_id IS NOT NULL;
-- The last failures, for status.py.
CREATE INDEX IF NOT EXISTS outreach_batch_items_failed
    ON outreach_batch_items (updated_at) WHERE status = 'failed';
-- All of a batch, for its counts and for a cascading delete.
CREATE INDEX IF NOT EXISTS outreach_batch_items_of_batch ON outreach_batch_items (batch_id);

-- Careful values for a first day: at most two a minute, none at night.
-- Not ON CONFLICT: a platform's own table may have a column that this row would leave NULL against its will.
INSERT INTO outreach_settings
    (id, paused, quiet_hours_start, quiet_hours_end, max_per_minute, max_per_hour, max_per_day, min_gap_seconds)
SELECT 1, false, '21:00', '08:00', 2, 30, 150, 30
 WHERE NOT EXISTS (SELECT FROM outreach_settings WHERE id = 1);
