"""What happened, from the outside: triggers note each change of the tests' databases, and the checks judge the whole.

Used by test_faults.py and campaign.py. A check returns its complaints, a sentence each. Times are seconds since 1970.
An item's `body` names it: the devices' logs have the body, so a message can be followed from its item to its send.
"""

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import device

import db

RECORDER = """
    CREATE SCHEMA IF NOT EXISTS history;
    CREATE TABLE history.changes (
        n BIGSERIAL PRIMARY KEY, at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
        session INTEGER NOT NULL DEFAULT pg_backend_pid(), tab TEXT NOT NULL, id TEXT NOT NULL, old JSONB, new JSONB
    );
    CREATE FUNCTION history.note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD IS DISTINCT FROM NEW THEN
            INSERT INTO history.changes (tab, id, old, new)
            VALUES (TG_TABLE_NAME, COALESCE(NEW.id, OLD.id), to_jsonb(OLD), to_jsonb(NEW));
        END IF;
        RETURN NULL;
    END $$;
"""
TABLES = {
    "icloud": ["icloud.devices", "icloud.send_queue"],
    "quinn": ["outreach_batches", "outreach_batch_items", "outreach_settings"],
}
ITEM_ARROWS = {
    ("pending", "queued"), ("pending", "sent"), ("pending", "failed"), ("pending", "skipped"),
    ("queued", "sent"), ("queued", "failed"), ("queued", "pending"),
}  # fmt: skip
ENDED = ("sent", "failed", "skipped")
WINDOWS = {"max_per_minute": 60, "max_per_hour": 3600, "max_per_day": 86_400}
NO_LIMIT = 10**9


class Change(NamedTuple):
    """A row of `table` as it was before (None: not yet there) and after (None: deleted); by which session."""

    at: float
    session: int
    table: str
    id: str
    old: dict[str, Any] | None
    new: dict[str, Any] | None


def install(quinn: Any, icloud: Any) -> None:
    """Note every change of these databases from now on."""
    for part, conn in {"quinn": quinn, "icloud": icloud}.items():
        db.query(conn, RECORDER)
        for table in TABLES[part]:
            trigger = "CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON"
            db.query(conn, f"{trigger} {table} FOR EACH ROW EXECUTE FUNCTION history.note()")


def read(quinn: Any, icloud: Any) -> list[Change]:
    """Everything that happened in both databases, in the order of time."""
    sql = "SELECT EXTRACT(epoch FROM at)::float8, session, tab, id, old, new FROM history.changes ORDER BY n"
    found = [Change(*row) for conn in (quinn, icloud) for row in db.query(conn, sql)]
    return sorted(found, key=lambda change: change.at)


def moment(text: str | None) -> float:
    """A timestamp of a row's JSON."""
    return datetime.fromisoformat(text or "").timestamp()


class Past:
    """The history, sorted out for the checks. `lives`: each row's or item's changes, by its id."""

    def __init__(self, changes: Sequence[Change], logs: Iterable[Path]) -> None:
        self.changes = changes
        self.sends = [send for log in logs for send in device.sends(log)]
        self.rows = self._lives("send_queue")
        self.rows_of: dict[str, list[str]] = defaultdict(list)  # the rows of each item
        for row_id, life in self.rows.items():
            self.rows_of[(life[0].new or {})["batch_item_id"]].append(row_id)
        self.items = self._lives("outreach_batch_items")
        self.batches = self._lives("outreach_batches")
        self.settings = [change for change in changes if change.table == "outreach_settings" and change.new]
        self.syncs = [
            change.at
            for change in self.settings
            if change.old and change.new and change.old["last_synced_at"] != change.new["last_synced_at"]
        ]
        self.deleted_devices = {change.id for change in changes if change.table == "devices" and not change.new}

    def _lives(self, table: str) -> dict[str, list[Change]]:
        lives = defaultdict(list)
        for change in self.changes:
            if change.table == table:
                lives[change.id].append(change)
        return dict(lives)

    def obeyed_since(self, at: float) -> float:
        """The settings that may have been at work at `at` are those in force since this time.

        Jobs run one after another, and a sync ends each cycle's first half: of what was changed before the last sync
        but one, every job that runs now has heard.
        """
        ended = bisect.bisect_left(self.syncs, at)
        return self.syncs[ended - 2] if ended >= 2 else 0.0

    def in_force(self, since: float, until: float) -> Iterator[dict[str, Any]]:
        """The settings at `since`, and those that followed until then."""
        times = [change.at for change in self.settings]
        first = max(bisect.bisect_right(times, since) - 1, 0)
        for change in self.settings[first : bisect.bisect_right(times, until)]:
            assert change.new
            yield change.new


Check = Callable[[Past], Iterator[str]]


def rows_end_once(past: Past) -> Iterator[str]:
    """A result never changes, and a row that was collected is never withdrawn."""
    for row_id, life in past.rows.items():
        for change in life:
            old, new = change.old, change.new
            if not old or not new:
                continue
            result = [(row["status"], row["sent_at"], row["failure_reason"]) for row in (old, new)]
            if old["status"] != "queued" and result[0] != result[1]:
                yield f"the result of row {row_id} changed: {result}"
            if new["withdrawn_at"] and old["collected_at"]:
                yield f"row {row_id} was withdrawn after it was collected"


def items_end_once(past: Past) -> Iterator[str]:
    """An item moves along the arrows of its diagram, and what has ended has a reason or a time."""
    for item_id, life in past.items.items():
        for change in life:
            old, new = change.old, change.new
            if old and new and old["status"] != new["status"] and (old["status"], new["status"]) not in ITEM_ARROWS:
                yield f"item {item_id} went from {old['status']} to {new['status']}"
            if new and new["status"] in ("failed", "skipped") and not new["failure_reason"]:
                yield f"item {item_id} is {new['status']} without a reason"


def one_live_row(past: Past) -> Iterator[str]:
    """No item has two rows queued or sent at a time, nor two that reached a device and did not fail there."""
    live: dict[str, set[str]] = defaultdict(set)
    collected: dict[str, set[str]] = defaultdict(set)
    for change in past.changes:
        if change.table != "send_queue":
            continue
        item_id = (change.new or change.old or {})["batch_item_id"]
        live[item_id].discard(change.id)
        if change.new and change.new["status"] != "failed":
            live[item_id].add(change.id)
        if change.new and change.new["collected_at"]:
            collected[item_id].add(change.id)
        if change.new and change.new["status"] == "failed":
            collected[item_id].discard(change.id)  # nobody got it, and another try is no second message
        if len(live[item_id]) > 1:
            yield f"item {item_id} has {len(live[item_id])} live rows"
    for item_id, rows in collected.items():
        gone = [row_id for row_id in rows if _device(past, row_id) in past.deleted_devices]
        if len(rows) - len(gone) > 1:
            yield f"{len(rows)} rows of item {item_id} reached a device"


def _device(past: Past, row_id: str) -> str:
    return str((past.rows[row_id][0].new or {})["device_id"])


def nothing_sent_twice(past: Past) -> Iterator[str]:
    """No device sent an id twice, and no message was sent by two ids, those of deleted devices aside."""
    for queue_id, times in Counter(send.queue_id for send in past.sends).items():
        if times > 1:
            yield f"a device sent row {queue_id} {times} times"
    for body in doubled(past):
        yield f"message {body!r} was sent twice"


def doubled(past: Past, deleted: bool = False) -> list[str]:
    """The messages that were sent more than once; `deleted`: because the rows went with their device."""
    kept = [
        send.body
        for send in past.sends
        if send.outcome == "sent"
        if deleted or (send.queue_id in past.rows and _device(past, send.queue_id) not in past.deleted_devices)
    ]
    return [body for body, times in Counter(kept).items() if times > 1]


def books_agree(past: Past) -> Iterator[str]:
    """What the devices say they sent, the queue's rows and the items are the same messages."""
    logged = {send.queue_id: send.outcome for send in past.sends}
    for row_id, life in past.rows.items():
        last = life[-1].new
        if last and last["status"] == "sent" and logged.get(row_id) != "sent":
            yield f"row {row_id} is sent, and its device did not send it"
        if last and last["status"] == "failed" and not last["withdrawn_at"] and logged.get(row_id) != "failed":
            yield f"row {row_id} is failed, and its device did not try it"
        if not last and life[-1].old:  # its device was deleted: the item ends as far as is known
            continue
        if last and last["status"] == "queued" and row_id in logged:
            yield f"row {row_id} was tried, and its result is not recorded"
    for item_id, life in past.items.items():
        item = life[-1].new
        outcomes = {logged[row_id] for row_id in past.rows_of.get(item_id, ()) if row_id in logged}
        if item and _is_lie(item, outcomes) and not _lost_its_device(past, item_id):
            yield f"item {item_id} is {item['status']}, and its messages are {sorted(outcomes)}"


def _is_lie(item: dict[str, Any], outcomes: set[str]) -> bool:
    if item["status"] == "sent":
        return "sent" not in outcomes
    return "sent" in outcomes or (item["status"] == "pending" and bool(outcomes))


def _lost_its_device(past: Past, item_id: str) -> bool:
    return any(_device(past, row_id) in past.deleted_devices for row_id in past.rows_of.get(item_id, ()))


def jobs_take_turns(past: Past) -> Iterator[str]:
    """A job has a session, and the lock, of its own: between its changes of items there are none of another's."""
    last, over = 0, set()
    for change in past.changes:
        if change.table != "outreach_batch_items" or not change.old or not change.new or change.session == last:
            continue
        if change.session in over:
            yield f"two jobs were at work at once: sessions {last} and {change.session}"
        over.add(last)
        last = change.session


def limits_hold(past: Past) -> Iterator[str]:
    """When an item was claimed, sent + in flight was within each limit; and each row was of an item in flight."""
    flying: set[str] = set()
    sent: list[float] = []
    for change in past.changes:
        new, old = change.new or {}, change.old or {}
        if change.table == "outreach_batch_items":
            claims = bool(new.get("claimed_at")) and not old.get("claimed_at") and old.get("status") == "pending"
            (flying.add if _is_flying(new) else flying.discard)(change.id)
            if new.get("status") == "sent" and old.get("status") != "sent":
                bisect.insort(sent, moment(new["sent_at"]))
            if claims:
                yield from _over(past, change.at, flying, sent)
        elif change.table == "send_queue" and not old and new["batch_item_id"] not in flying:
            yield f"row {change.id} came of item {new['batch_item_id']}, which was not in flight"


def _is_flying(item: dict[str, Any]) -> bool:
    return item.get("status") == "queued" or (item.get("status") == "pending" and bool(item.get("claimed_at")))


def _over(past: Past, at: float, flying: set[str], sent: Sequence[float]) -> Iterator[str]:
    settings = list(past.in_force(past.obeyed_since(at), at))
    for limit, window in WINDOWS.items():
        most = max(NO_LIMIT if values[limit] is None else values[limit] for values in settings)
        used = len(sent) - bisect.bisect_right(sent, at - window) + len(flying)
        if used > most:
            yield f"{limit} is {most}, and {used} were sent or in flight"


def gates_hold(past: Past) -> Iterator[str]:
    """No row is collected after its time, nor while sending is held, once each job has heard of it."""
    for row_id, life in past.rows.items():
        for change in life:
            new, old = change.new, change.old
            if not new or not old or not new["collected_at"] or old["collected_at"]:
                continue
            at = moment(new["collected_at"])
            if new["valid_until"] and at >= moment(new["valid_until"]):
                yield f"row {row_id} was collected after its valid_until"
            since = max(past.obeyed_since(at), 0.0)
            if moment(new["created_at"]) < since and (why := _held(past, new, since, at)):
                yield f"row {row_id} was collected although {why}"


def _held(past: Past, row: dict[str, Any], since: float, until: float) -> str | None:
    """Why the row should not have been collected: the reason held all of that time."""
    settings = list(past.in_force(since, until))
    if all(values["paused"] for values in settings):
        return "sending was paused"
    if all(is_quiet(values, since) and is_quiet(values, until) for values in settings):
        return "it was in quiet hours"
    item = past.items.get(row["batch_item_id"])
    batch = past.batches.get((item[0].new or {})["batch_id"]) if item else None
    if batch and all(status != "sending" for status in _statuses(batch, since, until)):
        return "its batch was not being sent"
    return None


def _statuses(life: Sequence[Change], since: float, until: float) -> Iterator[str]:
    """The status at `since`, and those that followed until then."""
    first = max(bisect.bisect_right([change.at for change in life], since) - 1, 0)
    for change in life[first:]:
        if change.at <= until and change.new:
            yield change.new["status"]


def is_quiet(settings: dict[str, Any], at: float) -> bool:
    """Whether `at` is in the quiet hours of `settings`, which these tests keep in UTC."""
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
    books_agree,
    jobs_take_turns,
    limits_hold,
    gates_hold,
)


def complaints(past: Past, checks: Sequence[Check] = CHECKS) -> list[str]:
    """What the checks have found, each with its check's name."""
    return [f"{check.__name__}: {words}" for check in checks for words in check(past)]
