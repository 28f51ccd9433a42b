-- The send queue and the outreach dispatcher: the schema of both databases.
--
-- There are two databases. They can be the same one:
--
--   icloud   devices (the Macs that send), send_queue (the messages for them) and opt_outs.
--            Only send_queue_server.py gives rows to devices. The dispatcher reads results, and withdraws rows
--            that no device has collected.
--   quinn    the platform's clients, and outreach: batches, their items, the settings of sending, the owner's sessions.
--            Only dispatcher.py changes the status of items.
--
-- Apply this file with `python db.py migrate`, which applies each part to its database and prints what it made. If one
-- database holds both parts, `psql -f schema.sql` works too. Every statement can run again, also on tables that the
-- platform has made: it adds only what is missing.
--
-- If the databases are in use, use `migrate`. It omits an ADD COLUMN or CREATE INDEX whose object exists, because even
-- then the statement would lock its table. It builds indexes CONCURRENTLY. For this, each ALTER TABLE outside a DO
-- block adds one column, and a changed index gets a new name.
--
-- Vocabulary:
--
--   batch      one rendered message for each of its clients
--   composed   A batch with a `digest`. It is sent only if it also has `approved_at`. A batch that was inserted by
--              hand has neither; only its status decides.
--   item       one of the messages of a batch
--   claim      The dispatcher reserves an item before it enqueues it.
--   enqueue    The dispatcher asks the server to make a row for an item.
--   row        a message in the queue
--   collect    A device receives the row in the response to a poll, or one by one.
--   result     A device reports that it has sent the message, or failed.
--   outcome    of a failed row: `not_started` (the device gave it back), `unknown` (it may have been sent), or NULL
--              (certainly not sent)
--   in flight  an item from its claim until the dispatcher has read its result
--   withdraw   The dispatcher ends a row before a device has collected it.
--
--   a queue row:   queued --> sent                    both ends are final;
--                  queued --> failed                  withdrawn_at distinguishes a withdrawal from a failure
--                  unknown --> sent or failed         (the device found out: the only change of a result)
--
--   an item:       pending --> queued --> sent
--                     |  ^        | \---> failed       (a result, or the row is gone; the outcome may be unknown)
--                     |  \--------/                    (withdrawn, or given back less than three times in a row)
--                     |---> skipped                    (no primary handle, or opted out)
--                     \---> failed                     (refused by the server; --retry: failed --> pending)
--                  pending --> sent or failed         (claimed; the response was lost, and its row has ended)
--                  failed --> sent                    (its outcome was unknown, and the device found out)
--
--   a batch:       draft --> sending <--> paused       set by its owner, as is `cancelled`
--                  sending --> paused                  set by the dispatcher, with pause_reason, if too many items fail
--                  sending --> sent                    set by the dispatcher when every item has ended
--
-- Why items are claimed: limits count the items in flight. If the response to an enqueue is lost, the queue has a row,
-- but the item has no send_queue_id. The item still counts, because its claim was committed before the request. The
-- dispatcher then repeats the request; the unique batch_item_id prevents a second row.
--
-- Indexes are partial: they contain only rows that can still change. So the cost of a poll, a tick or a sync depends on
-- the work at hand, not on the length of the history.
--
-- The planner's statistics may be a day old, or older than the first row. Therefore frequent statements are written so
-- that only one plan is possible:
--
--   - OFFSET 0 in an EXISTS keeps it a look-up for each row. The planner cannot turn it into a join over all rows.
--   - An UPDATE of known ids repeats the old state as `CASE status WHEN 'pending' THEN true END`. The planner cannot
--     match this with a partial index, so it uses the primary key.
--
-- tests/test_plans.py counts the rows that each statement reads.

-- part: icloud ---------------------------------------------------------------------------------------

-- If the platform's own tables lack a column that the product reads, fail now, before any change.
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

-- `token` is the plain token, or `sha256:` and its hex digest, which add-device stores. `instance` is the Mac that
-- collects with the token. `problem` is the problem that the Mac has reported, since `problem_at`. `opt_outs` is the
-- number of opt-outs that it has reported: counting the rows at every peek would cost more with each opt-out.
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

-- `send_queue_id` is the platform's column. The product does not read it: the queue id of a row is its `id`.
-- `drafted_at` is the time at which the item was made; NULL if the row was inserted by hand. `handle_key` is
-- handles.key(to_handle); if it is missing, the server adds it before a device gets the row. `collect_id` is the device's
-- id of the collection; NULL after a poll. `valid_until` is -infinity after an opt-out, because now() is the start of a
-- transaction, which may be before the opt-out. `delivered_at` and `late_error` are what Messages showed after the result.
-- At `erased_at` the text and the handle of an ended row were erased (personal_data.py); both are empty since then.
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
    erased_at      TIMESTAMPTZ,
    CONSTRAINT send_queue_status_is_known CHECK (status IN ('queued', 'sent', 'failed')),
    CONSTRAINT send_queue_sent_has_a_time CHECK ((status = 'sent') = (sent_at IS NOT NULL)),
    CONSTRAINT send_queue_attempt_is_a_number_from_1 CHECK (attempt >= 1),
    CONSTRAINT send_queue_withdrawn_was_never_collected
        CHECK (withdrawn_at IS NULL OR (status = 'failed' AND collected_at IS NULL)),
    CONSTRAINT send_queue_collect_id_is_of_a_collected_row CHECK (collect_id IS NULL OR collected_at IS NOT NULL),
    CONSTRAINT send_queue_outcome_is_known_and_of_a_failure
        CHECK (outcome IS NULL OR (outcome IN ('not_started', 'unknown') AND status = 'failed' AND withdrawn_at IS NULL)),
    CONSTRAINT send_queue_watched_is_unknown CHECK (watched_until IS NULL OR COALESCE(outcome = 'unknown', false)),
    CONSTRAINT send_queue_delivered_was_sent CHECK (delivered_at IS NULL OR status = 'sent'),
    CONSTRAINT send_queue_erased_has_ended CHECK (erased_at IS NULL OR status <> 'queued')
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
ALTER TABLE icloud.send_queue ADD COLUMN IF NOT EXISTS erased_at TIMESTAMPTZ;

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

-- A token identifies one device.
CREATE UNIQUE INDEX IF NOT EXISTS devices_token ON icloud.devices (token);
-- The idempotency key: an item has at most one row that is waiting or was sent.
CREATE UNIQUE INDEX IF NOT EXISTS send_queue_batch_item
    ON icloud.send_queue (batch_item_id) WHERE status <> 'failed';
-- The failed rows of an item, for a sync that finds the item claimed.
CREATE INDEX IF NOT EXISTS send_queue_failed_of_item
    ON icloud.send_queue (batch_item_id) WHERE status = 'failed';
-- A device's poll, in the order of the response.
CREATE INDEX IF NOT EXISTS send_queue_waiting
    ON icloud.send_queue (device_id, created_at, id) WHERE status = 'queued';
-- Rows that can be withdrawn. The column is id, because a poll collects its rows by id. With another column, the
-- planner would read the uncollected rows of every device for each poll.
CREATE INDEX IF NOT EXISTS send_queue_uncollected
    ON icloud.send_queue (id) WHERE status = 'queued' AND collected_at IS NULL;
-- What an opt-out must stop.
CREATE INDEX IF NOT EXISTS send_queue_waiting_for_handle
    ON icloud.send_queue (handle_key) WHERE status = 'queued';
-- The results of the last hour, for GET status.
CREATE INDEX IF NOT EXISTS send_queue_ended
    ON icloud.send_queue (updated_at) WHERE status <> 'queued';
-- The ended rows whose text is still there, oldest first, for keep_bodies_days.
CREATE INDEX IF NOT EXISTS send_queue_to_erase
    ON icloud.send_queue (updated_at) WHERE status <> 'queued' AND erased_at IS NULL;
-- Whether a handle has opted out: once at a time.
CREATE UNIQUE INDEX IF NOT EXISTS opt_outs_active ON icloud.opt_outs (handle_key) WHERE ended_at IS NULL;
-- A reply is recorded once, however often it is reported.
CREATE UNIQUE INDEX IF NOT EXISTS opt_outs_reply ON icloud.opt_outs (handle_key, received_at) WHERE source = 'reply';
-- The latest ones, for a batch from which too many opt out. Not partial: the planner might read it whole in place of
-- opt_outs_active, to look up one handle.
CREATE INDEX IF NOT EXISTS opt_outs_by_time ON icloud.opt_outs (created_at);

-- part: quinn ----------------------------------------------------------------------------------------

-- If the platform's own tables lack a column that the product reads, fail now, before any change.
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

-- Stand-ins for the platform's own tables. The product needs `id` only, and uses every column that a platform has.
-- `attributes`: what an import found beside the name and the handle. `consent_source` and `consent_at`: where the person
-- agreed to be written to, and when. `time_zone`: an IANA name.
CREATE TABLE IF NOT EXISTS clients (
    id             UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name           TEXT NOT NULL,
    attributes     JSONB NOT NULL DEFAULT '{}',
    time_zone      TEXT,
    consent_source TEXT,
    consent_at     TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS contact_relationships (
    client_id  UUID NOT NULL,
    handle     TEXT NOT NULL,
    is_primary BOOLEAN NOT NULL DEFAULT false
);
-- An earlier stand-in for `clients` had these two columns only. A platform's table is left as it is.
DO $$
BEGIN
    IF (SELECT array_agg(format('%s %s %s', attname, format_type(atttypid, atttypmod), attnotnull) ORDER BY attnum)
          FROM pg_attribute WHERE attrelid = 'clients'::regclass AND attnum > 0 AND NOT attisdropped)
       = ARRAY['id uuid t', 'name text t'] THEN
        ALTER TABLE clients ADD COLUMN attributes JSONB NOT NULL DEFAULT '{}', ADD COLUMN time_zone TEXT,
                            ADD COLUMN consent_source TEXT, ADD COLUMN consent_at TIMESTAMPTZ;
    END IF;
END $$;

-- `last_served_at` decides the round-robin order: the dispatcher serves the batch with the oldest value first. `digest`
-- identifies the previewed content; `approved_at` is when its owner approved it. `pause_reason` says why the dispatcher
-- paused the batch. What happened before `resumed_at` no longer counts for the rules that pause a batch. Nothing is sent
-- before `send_from` or after `send_until`. If `first_n` messages were sent, the batch pauses. Who was written to in the
-- last `not_sent_within_days` days, or (`recheck`) no longer matches `query_json`, is skipped. `preview` is what the
-- owner was shown of the draft: who is left out and why, example texts, unusual values. At `erased_at` it was erased, with
-- `vars` and the values in `query_json`, because the batch had ended long ago.
CREATE TABLE IF NOT EXISTS outreach_batches (
    id                   UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name                 TEXT,
    status               TEXT NOT NULL DEFAULT 'draft',
    dry_run              BOOLEAN NOT NULL DEFAULT false,
    template             TEXT NOT NULL,
    vars                 JSONB NOT NULL DEFAULT '{}',
    query_json           JSONB NOT NULL DEFAULT '{}',
    created_by           TEXT,
    created_at           TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at           TIMESTAMPTZ NOT NULL DEFAULT now(),
    last_served_at       TIMESTAMPTZ,
    digest               TEXT,
    approved_at          TIMESTAMPTZ,
    pause_reason         TEXT,
    resumed_at           TIMESTAMPTZ,
    send_from            TIMESTAMPTZ,
    send_until           TIMESTAMPTZ,
    first_n              INTEGER,
    not_sent_within_days INTEGER,
    recheck              BOOLEAN NOT NULL DEFAULT true,
    preview              JSONB,
    erased_at            TIMESTAMPTZ,
    CONSTRAINT outreach_batches_status_is_known
        CHECK (status IN ('draft', 'sending', 'paused', 'sent', 'cancelled')),
    CONSTRAINT outreach_batches_numbers_are_positive CHECK (LEAST(first_n, not_sent_within_days) > 0),
    CONSTRAINT outreach_batches_send_from_is_before_send_until CHECK (send_from < send_until)
);
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS dry_run BOOLEAN NOT NULL DEFAULT false;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS last_served_at TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS digest TEXT;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS approved_at TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS pause_reason TEXT;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS resumed_at TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS name TEXT;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS send_from TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS send_until TIMESTAMPTZ;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS first_n INTEGER;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS not_sent_within_days INTEGER;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS recheck BOOLEAN NOT NULL DEFAULT true;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS preview JSONB;
ALTER TABLE outreach_batches ADD COLUMN IF NOT EXISTS erased_at TIMESTAMPTZ;

-- No foreign key to clients, because the platform may delete its clients. An item of a deleted client has no handle, so
-- it is skipped. `claimed_at` has a meaning only while the item is `pending`. Each retry adds 1 to `attempt`.
-- `outcome_unknown_at` is when an attempt ended that may have been sent; it counts against the limits as sent. While the
-- item is `failed`, the last attempt has the unknown outcome. `handle_key` is the recipient that the owner approved.
-- At `erased_at` the text and the handle of an ended item were erased; it is never sent again.
-- `time_zones` are those in which the recipient may be, sorted; empty: the sender's counts; NULL: nobody has looked yet.
-- (With another collation than "C", comparing them would be the main cost of a tick.)
-- `new_contact` says of a pending item whether the client was never written to before, and of any other item whether it
-- was the first message to its client.
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
    erased_at          TIMESTAMPTZ,
    time_zones         TEXT[] COLLATE "C",
    new_contact        BOOLEAN,
    CONSTRAINT outreach_batch_items_status_is_known
        CHECK (status IN ('pending', 'queued', 'sent', 'failed', 'skipped')),
    CONSTRAINT outreach_batch_items_sent_has_a_time CHECK (status <> 'sent' OR sent_at IS NOT NULL),
    CONSTRAINT outreach_batch_items_attempt_is_a_number_from_1 CHECK (attempt >= 1),
    CONSTRAINT outreach_batch_items_erased_has_ended
        CHECK (erased_at IS NULL OR status IN ('sent', 'failed', 'skipped')),
    CONSTRAINT outreach_batch_items_recipient_is_known_whole CHECK (time_zones IS NULL OR new_contact IS NOT NULL)
);
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS queued_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS device_id UUID;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS claimed_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS outcome_unknown_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS handle_key TEXT;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS erased_at TIMESTAMPTZ;
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS time_zones TEXT[] COLLATE "C";
ALTER TABLE outreach_batch_items ADD COLUMN IF NOT EXISTS new_contact BOOLEAN;

-- One row. A limit of NULL means no limit. Quiet hours are HH:MM, both or neither, in `quiet_hours_tz` (an IANA name;
-- NULL: the local time of the dispatcher's host). If start and end are the same, there are no quiet hours. They have no
-- CHECK: an invalid value disables them, and the dispatcher logs a warning. `quiet_hours_of` says whose night counts:
-- the sender's, the recipient's, or both. `quiet_days` are weekdays and dates on which nothing goes, such as
-- `sat,sun,2026-12-25`. `max_new_contacts_per_hour` and `_per_day` limit the messages to clients who were never written
-- to; `max_per_client_per_week` those to one client. `stop_after_failures` failed results of
-- devices in a row pause a composed batch; NULL or 0 disables this. An approval lapses after `approval_days`; NULL:
-- never. Texts and handles are erased `keep_bodies_days` after their end; NULL: never. It is at least 8, because an
-- unknown outcome may be found out for 8 days. The dispatcher writes the last three columns: when each job last
-- succeeded, and when the last tick began.
CREATE TABLE IF NOT EXISTS outreach_settings (
    id                        INTEGER PRIMARY KEY DEFAULT 1,
    paused                    BOOLEAN NOT NULL DEFAULT false,
    quiet_hours_start         TEXT,
    quiet_hours_end           TEXT,
    quiet_hours_tz            TEXT,
    quiet_hours_of            TEXT NOT NULL DEFAULT 'sender',
    quiet_days                TEXT,
    max_per_minute            INTEGER,
    max_per_hour              INTEGER,
    max_per_day               INTEGER,
    max_new_contacts_per_hour INTEGER,
    max_new_contacts_per_day  INTEGER,
    max_per_client_per_week   INTEGER,
    min_gap_seconds           INTEGER,
    device_id                 UUID,
    stop_after_failures       INTEGER DEFAULT 5,
    approval_days             INTEGER DEFAULT 7,
    keep_bodies_days          INTEGER,
    last_dispatched_at        TIMESTAMPTZ,
    last_synced_at            TIMESTAMPTZ,
    last_tick_at              TIMESTAMPTZ,
    CONSTRAINT outreach_settings_is_one_row CHECK (id = 1),
    CONSTRAINT outreach_settings_limits_are_not_negative
        CHECK (LEAST(max_per_minute, max_per_hour, max_per_day, min_gap_seconds, max_new_contacts_per_hour,
                     max_new_contacts_per_day) >= 0),
    CONSTRAINT outreach_settings_max_per_client_per_week_is_positive CHECK (max_per_client_per_week > 0),
    CONSTRAINT outreach_settings_quiet_hours_of_is_known CHECK (quiet_hours_of IN ('sender', 'recipient', 'both')),
    CONSTRAINT outreach_settings_keep_bodies_days_is_8_or_more CHECK (keep_bodies_days >= 8),
    CONSTRAINT outreach_settings_approval_days_is_positive CHECK (approval_days > 0),
    CONSTRAINT outreach_settings_stop_after_failures_is_not_negative CHECK (stop_after_failures >= 0)
);
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS quiet_hours_tz TEXT;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS device_id UUID;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS stop_after_failures INTEGER DEFAULT 5;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS approval_days INTEGER DEFAULT 7;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS keep_bodies_days INTEGER;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS quiet_hours_of TEXT NOT NULL DEFAULT 'sender';
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS quiet_days TEXT;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS max_new_contacts_per_hour INTEGER;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS max_new_contacts_per_day INTEGER;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS max_per_client_per_week INTEGER;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS last_dispatched_at TIMESTAMPTZ;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS last_synced_at TIMESTAMPTZ;
ALTER TABLE outreach_settings ADD COLUMN IF NOT EXISTS last_tick_at TIMESTAMPTZ;

-- What the owner is composing on the page: the fields of the form as they were typed, by their names. `version` counts the
-- saves, so that a second browser tab does not overwrite what the first one wrote. `batch_id` is the draft that was made
-- of it last. A row is deleted 30 days after its last save.
CREATE TABLE IF NOT EXISTS outreach_compositions (
    id         UUID PRIMARY KEY,
    form       JSONB NOT NULL,
    version    INTEGER NOT NULL DEFAULT 1,
    batch_id   UUID NOT NULL DEFAULT gen_random_uuid(),
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- A CSV file that the owner has uploaded. Its content is kept from the upload until it is imported, for at most a day.
-- `options`: which column is what, and the encoding. `people`: how many of its lines are not bad.
CREATE TABLE IF NOT EXISTS outreach_imports (
    id           UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    file         TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    content      BYTEA,
    options      JSONB NOT NULL DEFAULT '{}',
    people       INTEGER,
    created_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    applied_at   TIMESTAMPTZ,
    CONSTRAINT outreach_imports_content_is_kept_until_applied CHECK ((content IS NULL) = (applied_at IS NOT NULL))
);
-- The clients of an imported file, for an audience that asks for them. No foreign key to clients: see the items.
CREATE TABLE IF NOT EXISTS outreach_import_people (
    import_id UUID NOT NULL REFERENCES outreach_imports (id) ON DELETE CASCADE,
    client_id UUID NOT NULL,
    PRIMARY KEY (import_id, client_id)
);

-- The browsers in which the owner is logged in. `token_hash` is no password: sessions.py says of what it is a hash.
CREATE TABLE IF NOT EXISTS outreach_sessions (
    token_hash   TEXT PRIMARY KEY,
    created_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    last_used_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- If the platform's clients.id is not a UUID, give `client_id` the same type in the tables made above. They are empty.
DO $$
DECLARE
    key_type TEXT := (SELECT format_type(atttypid, atttypmod) FROM pg_attribute
                       WHERE attrelid = 'clients'::regclass AND attname = 'id');
    made     TEXT;
BEGIN
    FOREACH made IN ARRAY ARRAY['outreach_batch_items', 'contact_relationships', 'outreach_import_people'] LOOP
        IF (SELECT format_type(atttypid, atttypmod) FROM pg_attribute
             WHERE attrelid = made::regclass AND attname = 'client_id') = 'uuid' AND key_type <> 'uuid' THEN
            EXECUTE format('ALTER TABLE %I ALTER COLUMN client_id TYPE %s USING client_id::text::%s',
                           made, key_type, key_type);
        END IF;
    END LOOP;
END $$;

-- A client's primary handle; all handles of a client, because one of them may have opted out; the round-robin order.
CREATE INDEX IF NOT EXISTS contact_relationships_primary
    ON contact_relationships (client_id) WHERE is_primary;
CREATE INDEX IF NOT EXISTS contact_relationships_of_client ON contact_relationships (client_id);
CREATE INDEX IF NOT EXISTS outreach_batches_sending
    ON outreach_batches (last_served_at NULLS FIRST, created_at, id) WHERE status = 'sending';
-- The batches that have not ended, by status, for /metrics: counting all of them would cost more with each batch.
CREATE INDEX IF NOT EXISTS outreach_batches_open
    ON outreach_batches (status) WHERE status IN ('draft', 'sending', 'paused');
-- A batch's next item, and the EXISTS that checks whether a batch has pending items.
CREATE INDEX IF NOT EXISTS outreach_batch_items_pending
    ON outreach_batch_items (batch_id, created_at, id) WHERE status = 'pending';
-- A batch's next item for recipients in some time zones, known or new ones, and the sets of zones that there are.
CREATE INDEX IF NOT EXISTS outreach_batch_items_pending_of_recipients
    ON outreach_batch_items (time_zones, new_contact, batch_id, created_at, id) WHERE status = 'pending';
-- The first messages to clients, newest first, for the limits on new contacts.
CREATE INDEX IF NOT EXISTS outreach_batch_items_first_contacts
    ON outreach_batch_items (sent_at) WHERE status = 'sent' AND new_contact;
-- The items in flight: the sync job reads their results, and they count against every limit.
CREATE INDEX IF NOT EXISTS outreach_batch_items_queued
    ON outreach_batch_items (batch_id) WHERE status = 'queued';
CREATE INDEX IF NOT EXISTS outreach_batch_items_claimed
    ON outreach_batch_items (batch_id) WHERE status = 'pending' AND claimed_at IS NOT NULL;
-- The usage of the limits, newest send first. A batch's newest send, for the gap. When a client was written to, and by
-- which device.
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent
    ON outreach_batch_items (sent_at) WHERE status = 'sent';
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent_of_batch
    ON outreach_batch_items (batch_id, sent_at) WHERE status = 'sent';
CREATE INDEX IF NOT EXISTS outreach_batch_items_written_to_client
    ON outreach_batch_items (client_id, sent_at) WHERE status = 'sent';
DROP INDEX IF EXISTS outreach_batch_items_sent_to_client;  -- the same for the rows with a device_id only
-- Items that may have been sent: for the limits, and for a sync that asks whether the device found out.
CREATE INDEX IF NOT EXISTS outreach_batch_items_unknown
    ON outreach_batch_items (outcome_unknown_at) WHERE outcome_unknown_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS outreach_batch_items_unknown_of_batch
    ON outreach_batch_items (batch_id, outcome_unknown_at) WHERE outcome_unknown_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS outreach_batch_items_unknown_to_client
    ON outreach_batch_items (client_id, outcome_unknown_at) WHERE outcome_unknown_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS outreach_batch_items_unknown_to_handle
    ON outreach_batch_items (handle_key, outcome_unknown_at) WHERE outcome_unknown_at IS NOT NULL;
-- The latest failures, for status.py; a batch's latest failures, for the rule that pauses it.
CREATE INDEX IF NOT EXISTS outreach_batch_items_failed
    ON outreach_batch_items (updated_at) WHERE status = 'failed';
CREATE INDEX IF NOT EXISTS outreach_batch_items_failed_of_batch
    ON outreach_batch_items (batch_id, queued_at) WHERE status = 'failed' AND device_id IS NOT NULL;
-- A composed batch has each handle once.
CREATE UNIQUE INDEX IF NOT EXISTS outreach_batch_items_handle_of_batch
    ON outreach_batch_items (batch_id, handle_key) WHERE handle_key IS NOT NULL;
-- What was sent to a client, for the audience that asks for it.
CREATE INDEX IF NOT EXISTS outreach_batch_items_of_client ON outreach_batch_items (client_id);
-- The batches that sent to a handle that has opted out.
CREATE INDEX IF NOT EXISTS outreach_batch_items_sent_to_handle
    ON outreach_batch_items (handle_key) WHERE status = 'sent' AND handle_key IS NOT NULL;
-- The ended items and batches whose texts are still there, oldest first, for keep_bodies_days.
CREATE INDEX IF NOT EXISTS outreach_batch_items_to_erase
    ON outreach_batch_items (updated_at) WHERE status IN ('sent', 'failed', 'skipped') AND erased_at IS NULL;
CREATE INDEX IF NOT EXISTS outreach_batches_to_erase
    ON outreach_batches (updated_at) WHERE status IN ('sent', 'cancelled') AND erased_at IS NULL;
-- Whether a client was in a file, and what to delete with a client.
CREATE INDEX IF NOT EXISTS outreach_import_people_of_client ON outreach_import_people (client_id);
-- Whether the same file was imported before.
CREATE INDEX IF NOT EXISTS outreach_imports_content ON outreach_imports (content_hash);
-- The batches with the same text. A text may be longer than an entry of an index.
CREATE INDEX IF NOT EXISTS outreach_batches_template ON outreach_batches (md5(template));
-- All items of a batch, for its counts and for a cascading delete.
CREATE INDEX IF NOT EXISTS outreach_batch_items_of_batch ON outreach_batch_items (batch_id);

-- Low limits for the first day: at most two sends a minute, and none at night. NOT EXISTS instead of ON CONFLICT: the
-- platform's own table may have a NOT NULL column without a default, which would fail before the conflict is checked.
INSERT INTO outreach_settings
    (id, paused, quiet_hours_start, quiet_hours_end, max_per_minute, max_per_hour, max_per_day, min_gap_seconds)
SELECT 1, false, '21:00', '08:00', 2, 30, 150, 30
 WHERE NOT EXISTS (SELECT FROM outreach_settings WHERE id = 1);
