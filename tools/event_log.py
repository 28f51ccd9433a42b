"""Record every change of both databases with triggers, and check the recorded changes against the rules.

Used by test_faults.py, test_failover.py and chaos.py. Each check yields a sentence for each violation. Times are
seconds since 1970. Each item has a different body, which connects it with its sends. A device is a simulated Mac, with
its log, or the real sender, with the records of mac_folder.py. Example:

    event_log.install(quinn, icloud); ...
    assert violations(EventLog(event_log.read(quinn, icloud), logs)) == []
"""

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import mac_folder
import simulated_mac

import db

RECORDER = """
    CREATE SCHEMA IF NOT EXISTS event_log;
    CREATE TABLE event_log.changes (
        n BIGSERIAL PRIMARY KEY, at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
        session INTEGER NOT NULL DEFAULT pg_backend_pid(), tab TEXT NOT NULL, id TEXT NOT NULL, old JSONB, new JSONB
    );
    CREATE FUNCTION event_log.record() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD IS DISTINCT FROM NEW THEN
            INSERT INTO event_log.changes (tab, id, old, new)
            VALUES (TG_TABLE_NAME, COALESCE(NEW.id, OLD.id), to_jsonb(OLD), to_jsonb(NEW));
        END IF;
        RETURN NULL;
    END $$;
"""
TABLES = {
    "icloud": ["icloud.devices", "icloud.send_queue", "icloud.opt_outs"],
    "quinn": ["outreach_batches", "outreach_batch_items", "outreach_settings"],
}
ITEM_TRANSITIONS = {
    ("pending", "queued"), ("pending", "sent"), ("pending", "failed"), ("pending", "skipped"),
    ("queued", "sent"), ("queued", "failed"), ("queued", "pending"),
}  # fmt: skip
ENDED = ("sent", "failed", "skipped")
WINDOWS = {"max_per_minute": 60, "max_per_hour": 3600, "max_per_day": 86_400}
NO_LIMIT = 10**9


class Change(NamedTuple):
    """A change of a row of `table`, by `session`. `old`: None for an INSERT. `new`: None for a DELETE."""

    at: float
    session: int
    table: str
    id: str
    old: dict[str, Any] | None
    new: dict[str, Any] | None


def install(quinn: Any, icloud: Any) -> None:
    """Record every change of these databases from now on."""
    for part, conn in {"quinn": quinn, "icloud": icloud}.items():
        db.query(conn, RECORDER)
        for table in TABLES[part]:
            trigger = "CREATE TRIGGER record AFTER INSERT OR UPDATE OR DELETE ON"
            db.query(conn, f"{trigger} {table} FOR EACH ROW EXECUTE FUNCTION event_log.record()")


def read(quinn: Any, icloud: Any) -> list[Change]:
    """Return every change of both databases, oldest first.

    Read icloud first: a row is enqueued after its item's claim, so the log of quinn must be at least as new.
    """
    sql = "SELECT EXTRACT(epoch FROM at)::float8, session, tab, id, old, new FROM event_log.changes ORDER BY n"
    found = [Change(*row) for conn in (icloud, quinn) for row in db.query(conn, sql)]
    return sorted(found, key=lambda change: change.at)


def moment(text: str | None) -> float:
    """Convert a timestamp of a row's JSON to seconds since 1970."""
    if text == "-infinity":  # an opt-out ends a row's time with it
        return float("-inf")
    return datetime.fromisoformat(text or "").timestamp()


class EventLog:
    """The changes, indexed for the checks. `rows`, `items` and `batches` have the versions of each by its id.

    `logs`: of the simulated Macs. `macs`: the records of the real senders, by the id of the device.
    """

    def __init__(
        self, changes: Sequence[Change], logs: Iterable[Path] = (), macs: dict[str, mac_folder.Records] | None = None
    ) -> None:
        self.changes = changes
        self.macs = macs or {}
        self.sends = [send for log in logs for send in simulated_mac.sends(log)]
        self.rows = self._versions("send_queue")
        self.rows_of: dict[str, list[str]] = defaultdict(list)  # the rows of each item
        for row_id, versions in self.rows.items():
            self.rows_of[(versions[0].new or {})["batch_item_id"]].append(row_id)
        self.items = self._versions("outreach_batch_items")
        self.batches = self._versions("outreach_batches")
        self.settings = [change for change in changes if change.table == "outreach_settings" and change.new]
        self.syncs = [
            change.at
            for change in self.settings
            if change.old and change.new and change.old["last_synced_at"] != change.new["last_synced_at"]
        ]
        self.deleted_devices = {change.id for change in changes if change.table == "devices" and not change.new}

    def _versions(self, table: str) -> dict[str, list[Change]]:
        versions = defaultdict(list)
        for change in self.changes:
            if change.table == table:
                versions[change.id].append(change)
        return dict(versions)

    def obeyed_since(self, at: float) -> float:
        """Return the time before which a change of the settings is certain to apply at `at`.

        A job reads the settings when it starts, and each tick begins with a sync. So every job that runs at `at` has
        read the changes before the second-last sync.
        """
        ended = bisect.bisect_left(self.syncs, at)
        return self.syncs[ended - 2] if ended >= 2 else 0.0

    def in_force(self, since: float, until: float) -> Iterator[dict[str, Any]]:
        """Yield the settings in force at `since`, and each later version until `until`."""
        times = [change.at for change in self.settings]
        first = max(bisect.bisect_right(times, since) - 1, 0)
        for change in self.settings[first : bisect.bisect_right(times, until)]:
            assert change.new
            yield change.new


Check = Callable[[EventLog], Iterator[str]]


def rows_end_once(events: EventLog) -> Iterator[str]:
    """Check that a result never changes, and that a collected row is never withdrawn."""
    for row_id, versions in events.rows.items():
        for change in versions:
            old, new = change.old, change.new
            if not old or not new:
                continue
            result = [(row["status"], row["sent_at"], row["failure_reason"]) for row in (old, new)]
            is_resolved = old["outcome"] == "unknown" and (new["status"], new["outcome"]) != ("failed", "not_started")
            if old["status"] != "queued" and result[0] != result[1] and not is_resolved:
                yield f"the result of row {row_id} changed: {result}"
            if new["withdrawn_at"] and old["collected_at"]:
                yield f"row {row_id} was withdrawn after it was collected"


def items_end_once(events: EventLog) -> Iterator[str]:
    """Check that items follow the state diagram, and that failed and skipped items have a reason."""
    for item_id, versions in events.items.items():
        for change in versions:
            old, new = change.old, change.new
            move = (old["status"], new["status"]) if old and new else None
            is_resolved = move == ("failed", "sent") and bool(old and old["outcome_unknown_at"])
            if move and move[0] != move[1] and move not in ITEM_TRANSITIONS and not is_resolved:
                yield f"item {item_id} went from {move[0]} to {move[1]}"
            if new and new["status"] in ("failed", "skipped") and not new["failure_reason"]:
                yield f"item {item_id} is {new['status']} without a reason"


def one_live_row(events: EventLog) -> Iterator[str]:
    """Check that an item has at most one row queued or sent, and at most one collected row that did not fail."""
    live: dict[str, set[str]] = defaultdict(set)
    collected: dict[str, set[str]] = defaultdict(set)
    for change in events.changes:
        if change.table != "send_queue":
            continue
        item_id = (change.new or change.old or {})["batch_item_id"]
        live[item_id].discard(change.id)
        if change.new and change.new["status"] != "failed":
            live[item_id].add(change.id)
        if change.new and change.new["collected_at"]:
            collected[item_id].add(change.id)
        if change.new and change.new["status"] == "failed":
            collected[item_id].discard(change.id)  # the client did not receive it: a retry is no second message
        if len(live[item_id]) > 1:
            yield f"item {item_id} has {len(live[item_id])} live rows"
    for item_id, rows in collected.items():
        gone = [row_id for row_id in rows if _device(events, row_id) in events.deleted_devices]
        if len(rows) - len(gone) > 1:
            yield f"{len(rows)} rows of item {item_id} reached a device"


def _device(events: EventLog, row_id: str) -> str:
    return str((events.rows[row_id][0].new or {})["device_id"])


def nothing_sent_twice(events: EventLog) -> Iterator[str]:
    """Check that no device sent an id twice, and that no message was sent with two ids. Ignore deleted devices."""
    for queue_id, times in Counter(send.queue_id for send in events.sends).items():
        if times > 1:
            yield f"a device sent row {queue_id} {times} times"
    for body in sent_twice(events):
        yield f"message {body!r} was sent twice"


def sent_twice(events: EventLog) -> list[str]:
    """Return the messages that were sent more than once. Ignore deleted devices, because their rows are deleted too."""
    kept = [
        send.body
        for send in events.sends
        if send.outcome == "sent"
        if send.queue_id in events.rows and _device(events, send.queue_id) not in events.deleted_devices
    ]
    return [body for body, times in Counter(kept).items() if times > 1]


def records_match(events: EventLog) -> Iterator[str]:
    """Check that the devices' logs, the queue's rows and the items have the same result for each message."""
    logged = {send.queue_id: send.outcome for send in events.sends}
    for row_id, versions in events.rows.items():
        last = versions[-1].new
        if last and last["status"] == "sent" and logged.get(row_id) != "sent":
            yield f"row {row_id} is sent, but its device did not send it"
        if last and last["status"] == "failed" and not last["withdrawn_at"] and logged.get(row_id) != "failed":
            yield f"row {row_id} is failed, but its device did not try it"
        if not last and versions[-1].old:  # its device was deleted, so its result is unknown
            continue
        if last and last["status"] == "queued" and row_id in logged:
            yield f"row {row_id} was tried, but its result is not recorded"
    for item_id, versions in events.items.items():
        item = versions[-1].new
        outcomes = {logged[row_id] for row_id in events.rows_of.get(item_id, ()) if row_id in logged}
        if item and _is_contradicted(item, outcomes) and not _lost_its_device(events, item_id):
            yield f"item {item_id} is {item['status']}, and its messages are {sorted(outcomes)}"


def _is_contradicted(item: dict[str, Any], outcomes: set[str]) -> bool:
    if item["status"] == "sent":
        return "sent" not in outcomes
    return "sent" in outcomes or (item["status"] == "pending" and bool(outcomes))


def _lost_its_device(events: EventLog, item_id: str) -> bool:
    return any(_device(events, row_id) in events.deleted_devices for row_id in events.rows_of.get(item_id, ()))


# --- the real sender ----------------------------------------------------------------------------------


def nothing_left_twice(events: EventLog) -> Iterator[str]:
    """Check that no message left the Macs twice, by the book of what stands in for Messages."""
    for body in left_twice(events):
        yield f"message {body!r} left twice"


def left_twice(events: EventLog) -> list[str]:
    """Return the messages that left more than once. Ignore deleted devices, because their rows are deleted too."""
    left = Counter(send.text for _, records in _kept_macs(events) for send in records.left)
    return [body for body, times in left.items() if times > 1]


def _kept_macs(events: EventLog) -> list[tuple[str, mac_folder.Records]]:
    return [(device, records) for device, records in events.macs.items() if device not in events.deleted_devices]


def last_rows(events: EventLog, device: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a device as they are now."""
    for versions in events.rows.values():
        row = versions[-1].new
        if row and row["device_id"] == device:
            yield row


def no_false_sent(events: EventLog) -> Iterator[str]:
    """Check that each `sent` row has a row with is_sent = 1 in chat.db, and that the message left."""
    for device, records in _kept_macs(events):
        confirmed = {row.text for row in records.rows if row.state == "sent"}
        left = {send.text for send in records.left}
        for row in last_rows(events, device):
            if row["status"] == "sent" and row["body"] not in confirmed & left:
                yield f"row {row['id']} is sent, and its message did not leave"


def no_false_failed(events: EventLog) -> Iterator[str]:
    """Check that no message left of which the queue or the item says for certain that it was not sent.

    A row that was given back (`not_started`) says it, too: its item has another row, or ended for another reason.
    """
    left_of = {device: {send.text for send in records.left} for device, records in _kept_macs(events)}
    for device, left in left_of.items():
        for row in last_rows(events, device):
            is_certain = row["status"] == "failed" and row["outcome"] is None and not row["withdrawn_at"]
            if is_certain and row["body"] in left:
                yield f"row {row['id']} is failed, and its message left"
            if row["status"] == "queued" and row["body"] in left:
                yield f"row {row['id']} is queued, and its message left"
    everything = set().union(*left_of.values()) if left_of else set()
    for item_id, versions in events.items.items():
        item = versions[-1].new
        is_open = not item or item["status"] == "sent" or item["outcome_unknown_at"]
        if not is_open and item and item["rendered_body"] in everything and not _lost_its_device(events, item_id):
            yield f"item {item_id} is {item['status']}, and its message left"


def unknown_is_undecidable(events: EventLog) -> Iterator[str]:
    """Check that Messages does not show what became of a message whose outcome is unknown."""
    for device, records in _kept_macs(events):
        shown: dict[str, list[str]] = defaultdict(list)
        for shown_row in records.rows:
            shown[shown_row.text].append(shown_row.state)
        for row in last_rows(events, device):
            if row["outcome"] == "unknown" and shown[row["body"]] in (["sent"], ["failing"]):
                yield f"row {row['id']} is unknown, and Messages shows it as {shown[row['body']]}"


def one_after_a_stop(events: EventLog) -> Iterator[str]:
    """Check that after an opt-out was recorded, each Mac sends at most the message that it is sending."""
    for device, count in after_stops(events):
        if count > 1:
            yield f"{count} messages went to a person who had opted out, from device {device}"


def after_stops(events: EventLog) -> Iterator[tuple[str, int]]:
    """Yield, for each opt-out and each Mac, how many messages osascript was asked to send to that person after it."""
    for change in events.changes:
        if change.table == "opt_outs" and not change.old and change.new:
            key = change.new["handle_key"]
            for device, records in events.macs.items():
                yield device, sum(send.address == key and send.at > change.at for send in records.asked)


def jobs_take_turns(events: EventLog) -> Iterator[str]:
    """Check that no two jobs overlap: between two changes of one session, no other session changes items."""
    last, over = 0, set()
    for change in events.changes:
        if change.table != "outreach_batch_items" or not change.old or not change.new or change.session == last:
            continue
        if change.session in over:
            yield f"two jobs ran at once: sessions {last} and {change.session}"
        over.add(last)
        last = change.session


def limits_hold(events: EventLog) -> Iterator[str]:
    """Check that sent + in flight is within each limit after a claim, and that each new row has an item in flight."""
    in_flight: set[str] = set()
    sent: list[float] = []
    for change in events.changes:
        new, old = change.new or {}, change.old or {}
        if change.table == "outreach_batch_items":
            claims = bool(new.get("claimed_at")) and not old.get("claimed_at") and old.get("status") == "pending"
            (in_flight.add if _is_in_flight(new) else in_flight.discard)(change.id)
            if new.get("status") == "sent" and old.get("status") != "sent":
                bisect.insort(sent, moment(new["sent_at"]))
            if claims:
                yield from _exceeded(events, change.at, in_flight, sent)
        elif change.table == "send_queue" and not old and new["batch_item_id"] not in in_flight:
            yield f"row {change.id} came of item {new['batch_item_id']}, which was not in flight"


def _is_in_flight(item: dict[str, Any]) -> bool:
    return item.get("status") == "queued" or (item.get("status") == "pending" and bool(item.get("claimed_at")))


def _exceeded(events: EventLog, at: float, in_flight: set[str], sent: Sequence[float]) -> Iterator[str]:
    settings = list(events.in_force(events.obeyed_since(at), at))
    for limit, window in WINDOWS.items():
        maximum = max(NO_LIMIT if values[limit] is None else values[limit] for values in settings)
        used = len(sent) - bisect.bisect_right(sent, at - window) + len(in_flight)
        if used > maximum:
            yield f"{limit} is {maximum}, and {used} were sent or in flight"


def holds_are_obeyed(events: EventLog) -> Iterator[str]:
    """Check that no row is collected after its valid_until, or during a hold that each job has read."""
    for row_id, versions in events.rows.items():
        for change in versions:
            new, old = change.new, change.old
            if not new or not old or not new["collected_at"] or old["collected_at"]:
                continue
            at = moment(new["collected_at"])
            if new["valid_until"] and at >= moment(new["valid_until"]):
                yield f"row {row_id} was collected after its valid_until"
            since = max(events.obeyed_since(at), 0.0)
            if moment(new["created_at"]) < since and (hold := _hold(events, new, since, at)):
                yield f"row {row_id} was collected although {hold}"


def _hold(events: EventLog, row: dict[str, Any], since: float, until: float) -> str | None:
    """Return the hold that was active for the row during the whole time from `since` to `until`."""
    settings = list(events.in_force(since, until))
    if all(values["paused"] for values in settings):
        return "sending was paused"
    if all(is_quiet(values, since) and is_quiet(values, until) for values in settings):
        return "it was in quiet hours"
    item = events.items.get(row["batch_item_id"])
    batch = events.batches.get((item[0].new or {})["batch_id"]) if item else None
    if batch and all(status != "sending" for status in _statuses(batch, since, until)):
        return "its batch was not being sent"
    return None


def _statuses(versions: Sequence[Change], since: float, until: float) -> Iterator[str]:
    """Yield the status at `since`, and each later one until `until`."""
    first = max(bisect.bisect_right([change.at for change in versions], since) - 1, 0)
    for change in versions[first:]:
        if change.at <= until and change.new:
            yield change.new["status"]


def is_quiet(settings: dict[str, Any], at: float) -> bool:
    """Return whether `at` is in the quiet hours of `settings`. The time zone here is always UTC."""
    start, end = settings["quiet_hours_start"], settings["quiet_hours_end"]
    if not start or not end:
        return False
    now = datetime.fromtimestamp(at, UTC).strftime("%H:%M")
    return bool(start <= now < end if start < end else now >= start or now < end)


CHECKS: tuple[Check, ...] = (
    rows_end_once,
    items_end_once,
    one_live_row,
    nothing_sent_twice,
    records_match,
    jobs_take_turns,
    limits_hold,
    holds_are_obeyed,
)

# Of a run with real senders. The last three need the end of the run: until then, a result may be on its way.
RULES: tuple[Check, ...] = (rows_end_once, items_end_once, one_live_row, jobs_take_turns, limits_hold, holds_are_obeyed)
MAC_CHECKS: tuple[Check, ...] = (*RULES, nothing_left_twice, one_after_a_stop)
FINAL_MAC_CHECKS: tuple[Check, ...] = (*MAC_CHECKS, no_false_sent, no_false_failed, unknown_is_undecidable)


def violations(events: EventLog, checks: Sequence[Check] = CHECKS) -> list[str]:
    """Return the violations that the checks find, each as `name of the check: sentence`."""
    return [f"{check.__name__}: {sentence}" for check in checks for sentence in check(events)]
