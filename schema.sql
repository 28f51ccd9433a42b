-- The send queue and the outreach dispatcher: both databases, in one file.
--
-- Two databases, which may be one and the same:
--
--   icloud   devices (the Macs that send), send_queue (the messages handed to them) and opt_outs.
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
-- the row by polling or one by one, sends it, and reports a *result*. An item is *in flight* from its claim until its
-- result is known here. To *withdraw* a row is to take it back before any device has collected it. The *outcome* of a
-- failed row is `not_started` (the device gave it back), `unknown` (it may have been sent), or NULL (certainly not sent).
--
--   a queue row:   queued --> sent                    both ends are final;
--                  queued --> failed                  withdrawn_at tells a withdrawal from a failure
--                  unknown --> sent or failed         (the device found out: the only change of a result)
--
--   an item:       pending --> queued --> sent
--                     |  ^        | \---> failed       (a result, or the row is gone; the outcome may be unknown)
--                     |  \--------/                    (withdrawn, or given back less than three times in a row)
--                     |---> skipped                    (nobody to send it to, or opted out)
--                     \---> failed                     (refused by the server; --retry: failed --> pending)
--                  pending --> sent or failed         (claimed; its answer was lost, and its row has ended)
--                  failed --> sent                    (its outcome was unknown, and the device found out)
--
--   a batch:       draft --> sending <--> paused       set by its owner, as is `cancelled`;
--                  sending --> paused                  set by the dispatcher, with pause_reason, when too much fails
--                  sending --> sent                    set by the dispatcher, when every item has ended
--
-- A batch is *composed* if it has a `digest`. Such a batch is sent only if it has `approved_at`, too. A batch that was
-- inserted by hand has neither, and follows its status alone.
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

-- `token` is either the plain token or `sha256:` and the hex digest of it (what add-device stores). `instance` is the Mac
-- that collects with it; `problem` is what the Mac says is wrong with it, since `problem_at`. `opt_outs` counts those that
-- it has reported: a count of the rows would cost more with each of them, at every peek.
CREATE TABLE IF NOT EXISTS icloud.devices (
    id           UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name         TEXT NOT NULL,
    token        TEXT NOT NULL,
    last_seen_at TIMESTAMPTZ,
    problem      TEXT,
    problem_at   TIMESTAMPTZ,
    version      TEXT,
    instance     TEXT,
    opt_outs     INTEGER NOT NULL DEFAULT 0,
    created_at   TIMESTAMPTZ NOT NULL DEFAULT now()
);
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS last_seen_at TIMESTAMPTZ;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS problem TEXT;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS problem_at TIMESTAMPTZ;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS version TEXT;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS instance TEXT;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS opt_outs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE icloud.devices ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ NOT NULL DEFAULT now();

-- `send_queue_id` is the platform's column; nothing here reads it: a row's own id is its queue id. `drafted_at` is when
-- the item was made; a row that was put in by hand has none. `handle_key` is handles.key(to_handle); the server adds it
-- where it is missing, before it hands the row out. `collect_id` is the device's id of the hand-over; a poll has none.
-- `valid_until` is -infinity after an opt-out: now() is when a transaction began, which may be before the opt-out.
-- `delivered_at` and `late_error` are what Messages learned after the result.
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
    attempt        INTEGER NOT NULL DEFAULT 1,
    drafted_at     TIMESTAMPTZ,
    handle_key     TEXT,
    collected_at   TIMESTAMPTZ,
    collect_id     UUID,
    valid_until    TIMESTAMPTZ,
    withdrawn_at   TIMESTAMPTZ,
    outcome        TEXT,
    watched_until  TIMESTAMPTZ,
    delivered_at   TIMESTAMPTZ,
    late_error     TEXT,
    CONSTRAINT send_queue_status_is_known CHECK (status IN ('queued', 'sent', 'failed')),
    CONSTRAINT send_queue_sent_has_a_time CHECK ((status = 'sent') = (sent_at IS NOT NULL)),
    CONSTRAINT send_queue_attempt_is_a_number_from_1 CHECK (attempt >= 1),
    CONSTRAINT send_queue_withdrawn_was_never_collected
        CHECK (withdrawn_at IS NULL OR (status = 'failed' AND collected_at IS NULL)),
    CONSTRAINT send_queue_collect_id_is_of_a_collected_row CHECK (collect_id IS NULL OR collected_at IS NOT NULL),
    CONSTRAINT send_queue_outcome_is_known_and_of_a_failure
        CHECK (outcome IS NULL OR (outcome IN ('not_started', 'unknown') AND status = 'failed' AND withdrawn_at IS NULL)),
    CONSTRAINT send_queue_watched_is_unknown CHECK (watched_until IS NULL OR COALESCE(outcome = 'unknown', false)),
    CONSTRAINT send_queue_delivered_was_sent CHECK (delivered_at IS NULL OR status = 'sent')
);
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS batch_item_id UUID;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS drafted_at TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS handle_key TEXT;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS collected_at TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS collect_id UUID;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS valid_until TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS withdrawn_at TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS outcome TEXT;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS watched_until TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS delivered_at TIMESTAMPTZ;
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS late_error TEXT;

-- Who must not be written to, by handles.key; also the record of it: no row is deleted, an opt-in ends it. `word` is what
-- the person wrote, `received_at` when. A STOP that comes while another opt-out is active is a row that has ended already.
CREATE TABLE IF NOT EXISTS icloud.opt_outs (
    id          UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    handle_key  TEXT NOT NULL,
    word        TEXT,
    source      TEXT NOT NULL,
    device_id   UUID REFERENCES icloud.devices (id) ON DELETE SET NULL,
    received_at TIMESTAMPTZ,
    created_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    ended_at    TIMESTAMPTZ,
    ended_by    TEXT,
    CONSTRAINT opt_outs_source_is_known CHECK (source IN ('reply', 'owner', 'import')),
    CONSTRAINT opt_outs_reply_has_a_word_and_a_time
        CHECK (source <> 'reply' OR (word IS NOT NULL AND received_at IS NOT NULL)),
    CONSTRAINT opt_outs_end_says_by_whom CHECK ((ended_at IS NULL) = (ended_by IS NULL))
);

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
-- What an opt-out must stop.
CREATE INDEX IF NOT EXISTS send_queue_waiting_for_handle
    ON icloud.send_queue (handle_key) WHERE status = 'queued';
-- The results of the last hour, for GET status.
CREATE INDEX IF NOT EXISTS send_queue_ended
    ON icloud.send_queue (updated_at) WHERE status <> 'queued';
-- Whether a handle has opted out: once at a time.
CREATE UNIQUE INDEX IF NOT EXISTS opt_outs_active ON icloud.opt_outs (handle_key) WHERE ended_at IS NULL;
-- A reply is recorded once, however often it is reported.
CREATE UNIQUE INDEX IF NOT EXISTS opt_outs_reply ON icloud.opt_outs (handle_key, received_at) WHERE source = 'reply';
-- The latest ones, for a batch from which too many opt out.
CREATE INDEX IF NOT EXISTS opt_outs_latest ON icloud.opt_outs (created_at) WHERE ended_at IS NULL;

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

-- `last_served_at` is the batch's place in the turns: the batch that waited longest goes first. `digest` is of what was
-- previewed, and `approved_at` when its owner approved that. `pause_reason` says why the dispatcher paused the batch;
-- what came before `resumed_at` is no reason any more.
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
    digest         TEXT,
    approved_at    TIMESTAMPTZ,
    pause_reason   TEXT,
    resumed_at     TIMESTAMPTZ,
    CONSTRAINT outreach_batches_status_is_known
        CHECK (status IN ('draft', 'sending', 'paused', 'sent', 'cancelled'))
);
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS dry_run BOOLEAN NOT NULL DEFAULT false;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS last_served_at TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS digest TEXT;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS approved_at TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS pause_reason TEXT;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS resumed_at TIMESTAMPTZ;

-- No foreign key to clients: that table is the platform's, and so are its deletions. An item whose
-- client is gone has no handle and is skipped. `claimed_at` has a meaning only while `pending`. `attempt` is one more for
-- each retry. `outcome_unknown_at` is when an attempt ended that may have been sent: it counts against the limits as sent.
-- While the item is `failed`, it is that attempt whose outcome is unknown. `handle_key` is whom the owner approved.
CREATE TABLE IF NOT EXISTS outreach_batch_items (
    id                 UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    batch_id           UUID NOT NULL REFERENCES outreach_batches (id) ON DELETE CASCADE,
    client_id          UUID NOT NULL,
    status             TEXT NOT NULL DEFAULT 'pending',
    rendered_body      TEXT NOT NULL,
    queued_at          TIMESTAMPTZ,
    sent_at            TIMESTAMPTZ,
    failure_reason     TEXT,
    send_queue_id      TEXT,
    device_id          UUID,
    created_at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    claimed_at         TIMESTAMPTZ,
    attempt            INTEGER NOT NULL DEFAULT 1,
    outcome_unknown_at TIMESTAMPTZ,
    handle_key         TEXT,
    CONSTRAINT outreach_batch_items_status_is_known
        CHECK (status IN ('pending', 'queued', 'sent', 'failed', 'skipped')),
    CONSTRAINT outreach_batch_items_sent_has_a_time CHECK (status <> 'sent' OR sent_at IS NOT NULL),
    CONSTRAINT outreach_batch_items_attempt_is_a_number_from_1 CHECK (attempt >= 1)
);
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS queued_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS device_id UUID;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS claimed_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS outcome_unknown_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS handle_key TEXT;

-- One row. A NULL limit means none. Quiet hours are HH:MM, both or neither, in `quiet_hours_tz`
-- (an IANA name; NULL: the dispatcher host's local time). The same start and end mean none. They carry
-- no CHECK: a value that cannot be read disables them with a warning in the log. `stop_after_failures` failed results of
-- devices in a row pause a composed batch; NULL or 0: none do. The dispatcher writes the last three: when a tick began,
-- and when each job last did its work.
CREATE TABLE IF NOT EXISTS outreach_settings (
    id                  INTEGER PRIMARY KEY DEFAULT 1,
    paused              BOOLEAN NOT NULL DEFAULT false,
    quiet_hours_start   TEXT,
    quiet_hours_end     TEXT,
    quiet_hours_tz      TEXT,
    max_per_minute      INTEGER,
    max_per_hour        INTEGER,
    max_per_day         INTEGER,
    min_gap_seconds     INTEGER,
    device_id           UUID,
    stop_after_failures INTEGER DEFAULT 5,
    last_dispatched_at  TIMESTAMPTZ,
    last_synced_at      TIMESTAMPTZ,
    last_tick_at        TIMESTAMPTZ,
    CONSTRAINT outreach_settings_is_one_row CHECK (id = 1),
    CONSTRAINT outreach_settings_limits_are_not_negative
        CHECK (LEAST(max_per_minute, max_per_hour, max_per_day, min_gap_seconds) >= 0),
    CONSTRAINT outreach_settings_stop_after_failures_is_not_negative CHECK (stop_after_failures >= 0)
);
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS quiet_hours_tz TEXT;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS device_id UUID;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS stop_after_failures INTEGER DEFAULT 5;
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

-- A client's handle, and all of them, of which none may have opted out; and the turns of the batches.
CREATE INDEX IF NOT EXISTS contact_relationships_primary
    ON contact_relationships (client_id) WHERE is_primary;
CREATE INDEX IF NOT EXISTS contact_relationships_of_client ON contact_relationships (client_id);
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
-- What may have been sent, for the limits, and for a sync that asks whether the device found out.
CREATE INDEX IF NOT EXISTS outreach_batch_items_unknown
    ON outreach_batch_items (outcome_unknown_at) WHERE outcome_unknown_at IS NOT NULL;
-- The last failures, for status.py; a batch's newest ones, for the rule that stops it.
CREATE INDEX IF NOT EXISTS outreach_batch_items_failed
    ON outreach_batch_items (updated_at) WHERE status = 'failed';
CREATE INDEX IF NOT EXISTS outreach_batch_items_failed_of_batch
    ON outreach_batch_items (batch_id, queued_at) WHERE status = 'failed' AND device_id IS NOT NULL;
-- The batches that wrote to somebody who has opted out.
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent_to_handle
    ON outreach_batch_items (handle_key) WHERE status = 'sent' AND handle_key IS NOT NULL;
-- All of a batch, for its counts and for a cascading delete.
CREATE INDEX IF NOT EXISTS outreach_batch_items_of_batch ON outreach_batch_items (batch_id);

-- Careful values for a first day: at most two a minute, none at night.
-- Not ON CONFLICT: a platform's own table may have a column that this row would leave NULL against its will.
INSERT INTO outreach_settings
    (id, paused, quiet_hours_start, quiet_hours_end, max_per_minute, max_per_hour, max_per_day, min_gap_seconds)
SELECT 1, false, '21:00', '08:00', 2, 30, 150, 30
 WHERE NOT EXISTS (SELECT FROM outreach_settings WHERE id = 1);
