"""Read both databases as the report and the forecast need them: batches, pending items, the queue, the devices.

Used by forecast.py, report.py and status.py. Reads the outreach tables, clients, contact_relationships, icloud.devices,
icloud.send_queue and icloud.opt_outs; writes nothing. Example:

    outreach = snapshots.read_outreach(quinn)
    queue = snapshots.read_queue(icloud, outreach)
"""

import collections
import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import batches
import db
import handles
import history
import pacing
import recipient_groups
import runtime
import zones
from recipient_groups import Group

# If there are more pending items, the forecast estimates instead of simulating.
MAX_SIMULATED_ITEMS = 20_000
# The predicted outcome of an item. The server queues an unreadable number unchanged, and it may fail at the device.
SENT, UNREADABLE, FAILED = "sent", "unreadable", "failed"
NO_HANDLE, OPTED_OUT, OVER_WEEKLY = "no primary handle", "opted out", "max_per_client_per_week"  # skipped
ARE_SENT = (SENT, UNREADABLE)
ARE_SKIPPED = (NO_HANDLE, OPTED_OUT, OVER_WEEKLY)
ANYBODY = Group((), False)  # the only group if the settings hold all recipients alike


class PendingItem(NamedTuple):
    """A pending item: what would become of it, the group of its recipient, and all handle keys of the recipient."""

    outcome: str = SENT
    group: Group = ANYBODY
    keys: tuple[str, ...] = ()


class BatchCounts(NamedTuple):
    """A batch and the number of its items by status. `sort_key` is its place in the order of serving.

    `send_from`, `send_until`, `first_n`: of a composed batch, if it was sent, or resumed, now. `approved_at`: None if
    it would have to be approved first.
    """

    id: str
    status: str
    last_served_at: datetime | None
    created_at: datetime
    pending: int
    queued: int
    sent: int
    failed: int
    skipped: int
    is_composed: bool = False
    approved_at: datetime | None = None
    send_from: datetime | None = None
    send_until: datetime | None = None
    first_n: int | None = None

    @property
    def sort_key(self) -> tuple[datetime, datetime, str]:
        return self.last_served_at or datetime.min.replace(tzinfo=UTC), self.created_at, self.id

    def as_sending(self, settings: pacing.Settings, now: datetime) -> pacing.Batch:
        """Return the batch as it would be if it were sent, or resumed, now."""
        batch = pacing.Batch(self.id, self.pending > 0, False, None)
        if not self.is_composed:
            return batch
        days = settings.approval_days
        lapses_at = (self.approved_at or now) + timedelta(days=days) if days else None
        ends_at = min((moment for moment in (self.send_until, lapses_at) if moment), default=None)
        return batch._replace(send_from=self.send_from, ends_at=ends_at, first_left=self.first_n)


class OutreachSnapshot(NamedTuple):
    """The sending batches in the quinn database. `now` is its clock, `read_at` this host's clock at the same moment.

    `items`: the pending items of each batch, in their order. `claims`: the number of claimed items of each batch.
    `queued_items`: of each queued item the batch id, the queue row id, and whether its client is a new contact.
    `is_exact`: True if there are few enough items to simulate; otherwise nothing is known of each item.
    """

    now: datetime
    read_at: datetime
    snapshot: pacing.Snapshot | None
    waiting: list[pacing.Batch]
    counts: dict[str, BatchCounts]
    items: dict[str, list[PendingItem]]
    claims: collections.Counter[str]
    queued_items: list[tuple[str, str, bool]]
    is_exact: bool


class QueueSnapshot(NamedTuple):
    """The queue in the icloud database. `now` and `read_at` are the same as in OutreachSnapshot.

    `ended`: for each row of a queued item that has a result, when it was sent, or may have been sent (None: certainly
    not sent). `opted_out`: the handle keys of pending items' recipients that have opted out.
    """

    now: datetime
    read_at: datetime
    devices: list[pacing.Device]
    ended: dict[str, datetime | None]
    opted_out: frozenset[str] = frozenset()


def read_outreach(quinn: Any, batch_id: str | None = None) -> OutreachSnapshot:
    """Read the sending batches, and `batch_id` with any status, from the quinn database."""
    queued = """
        SELECT batch_id, COALESCE(send_queue_id, ''), COALESCE(new_contact, false)
          FROM outreach_batch_items
         WHERE status = 'queued'
    """
    now, read_at = _read_clock(quinn)
    counts = _read_counts(quinn, batch_id)
    is_exact = sum(batch.pending for batch in counts.values()) <= MAX_SIMULATED_ITEMS
    # A composed batch was checked when it was drafted. Of one that was made by hand, each item may turn out otherwise.
    by_hand = [batch_id] if batch_id and batch_id in counts and not counts[batch_id].is_composed else []
    known = list(counts) if is_exact else by_hand
    snapshot = pacing.read_snapshot(quinn)
    items, claims = _read_items(quinn, known, snapshot.settings if snapshot else None)
    waiting = pacing.batches(quinn)
    if snapshot and snapshot.settings.is_by_recipient:
        groups = _read_groups(quinn, [batch.id for batch in waiting])
        snapshot = snapshot._replace(groups=sum(groups.values(), collections.Counter()))
        waiting = [_with_recipients(snapshot, batch, groups.get(batch.id, {})) for batch in waiting]
    return OutreachSnapshot(
        now=now,
        read_at=read_at,
        snapshot=snapshot,
        waiting=waiting,
        counts=counts,
        items={name: items.get(name, [PendingItem()] * batch.pending) for name, batch in counts.items()},
        claims=claims,
        queued_items=[(batch_id, queue_id, is_new) for batch_id, queue_id, is_new in db.query(quinn, queued)],
        is_exact=is_exact,
    )


def _with_recipients(snapshot: pacing.Snapshot, batch: pacing.Batch, groups: dict[Group, int]) -> pacing.Batch:
    """Return the batch with what holds its recipients."""
    due = pacing.due_groups(snapshot._replace(groups=groups))
    return batch._replace(
        held=pacing.recipients_hold(snapshot, groups),
        is_known_due=any(not group.is_new for group in (groups if due is None else due)),
    )


def _read_groups(quinn: Any, batch_ids: Sequence[str]) -> dict[str, collections.Counter[Group]]:
    """Return how many pending items of each group each batch has."""
    sql = """
        SELECT batch_id, time_zones, new_contact, count(*)
          FROM outreach_batch_items
         WHERE status = 'pending' AND batch_id = ANY (%(ids)s::uuid[])
         GROUP BY batch_id, time_zones, new_contact
    """
    found: dict[str, collections.Counter[Group]] = {}
    for batch_id, time_zones, new_contact, count in db.query(quinn, sql, {"ids": list(batch_ids)}):
        found.setdefault(batch_id, collections.Counter())[recipient_groups.of_item(time_zones, new_contact)] += count
    return found


def _read_clock(conn: Any) -> tuple[datetime, datetime]:
    """Return the database's now() and this host's time. Call it first: now() is the start of the transaction."""
    return db.query(conn, "SELECT now()")[0][0], datetime.now(UTC)


def _read_counts(quinn: Any, batch_id: str | None) -> dict[str, BatchCounts]:
    sql = """
        WITH batch AS (
            SELECT id, status, last_served_at, created_at, digest IS NOT NULL AS is_composed,
                   CASE WHEN pause_reason IS DISTINCT FROM %(lapsed)s THEN approved_at END AS approved_at,
                   send_from, send_until,
                   -- After the first ones, the rest follows.
                   CASE WHEN COALESCE(pause_reason, '') NOT LIKE 'the first %%' THEN first_n END AS first_n
              FROM outreach_batches
             WHERE (status = 'sending' AND NOT dry_run AND (digest IS NULL OR approved_at IS NOT NULL))
                OR id = %(batch_id)s::uuid
        ), item AS (
            SELECT batch_id, status, count(*) AS count FROM outreach_batch_items
             WHERE batch_id IN (SELECT id FROM batch)
             GROUP BY batch_id, status
        )
        SELECT batch.id, batch.status, batch.last_served_at, batch.created_at,
               COALESCE(sum(count) FILTER (WHERE item.status = 'pending'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'queued'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'sent'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'failed'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'skipped'), 0)::bigint,
               is_composed, approved_at, send_from, send_until, first_n
          FROM batch LEFT JOIN item ON item.batch_id = batch.id
         GROUP BY batch.id, batch.status, batch.last_served_at, batch.created_at, is_composed, approved_at, send_from,
                  send_until, first_n
    """
    parameters = {"batch_id": batch_id, "lapsed": batches.LAPSED}
    return {row[0]: BatchCounts(*row) for row in db.query(quinn, sql, parameters)}


def _read_items(
    quinn: Any, batch_ids: Sequence[str], settings: pacing.Settings | None
) -> tuple[dict[str, list[PendingItem]], collections.Counter[str]]:
    """Return the pending items of each batch, and the number of its claimed items."""
    sql = """
        SELECT item.batch_id, item.claimed_at IS NOT NULL, item.client_id::text, item.rendered_body = '',
               contact.handle, COALESCE(contact.handles, '{}'),
               CASE WHEN %(is_by_recipient)s AND time_zones IS NULL
                    THEN (SELECT to_jsonb(client) ->> 'time_zone' FROM clients AS client WHERE id = item.client_id)
               END,
               item.time_zones, item.new_contact
          FROM outreach_batch_items AS item
         CROSS JOIN LATERAL (
               SELECT min(handle) FILTER (WHERE is_primary) AS handle,
                      array_agg(handle ORDER BY is_primary DESC NULLS LAST, handle) AS handles
                 FROM contact_relationships
                WHERE client_id = item.client_id AND handle IS NOT NULL
               ) AS contact
         WHERE item.status = 'pending' AND item.batch_id = ANY (%(ids)s::uuid[])
         ORDER BY item.batch_id, item.created_at, item.id
    """
    is_by_recipient = settings is not None and settings.is_by_recipient
    parameters = {"ids": list(batch_ids), "is_by_recipient": is_by_recipient}
    rows = db.query(quinn, sql, parameters) if batch_ids else []
    weekly = settings.max_per_client_per_week if settings else None
    full = history.written_to(quinn, [row[2] for row in rows], [], 7, times=weekly)[0] if weekly and rows else set()

    def item(row: db.Row) -> PendingItem:
        _, _, client_id, is_empty, handle, addresses, time_zone, time_zones, new_contact = row
        group = recipient_groups.of_item(time_zones, new_contact) if is_by_recipient else ANYBODY
        if group.time_zones is None:
            group = group._replace(time_zones=zones.zones_of_person(time_zone, addresses))
        outcome = OVER_WEEKLY if client_id in full else predict_outcome(handle, is_empty)
        return PendingItem(outcome, group, tuple(handles.key(address) for address in addresses))

    items = {
        batch_id: [item(row) for row in group]
        for batch_id, group in itertools.groupby(rows, lambda row: cast(str, row[0]))
    }
    return items, collections.Counter(row[0] for row in rows if row[1])


def predict_outcome(handle: str | None, is_empty: bool) -> str:
    """Return the outcome that the dispatcher and the server would give an item with this primary handle."""
    if handle is None:
        return NO_HANDLE
    if is_empty or not handles.is_handle(handle):
        return FAILED
    return SENT if handles.to_send(handle) else UNREADABLE


def foreseen(items: Iterable[PendingItem], queue: "QueueSnapshot | None") -> list[PendingItem]:
    """Return the items, with the outcome of those whose recipient has opted out."""
    opted_out = queue.opted_out if queue else frozenset()
    if not opted_out:
        return list(items)
    return [item if opted_out.isdisjoint(item.keys) else item._replace(outcome=OPTED_OUT) for item in items]


def read_queue(icloud: Any, outreach: OutreachSnapshot | None) -> QueueSnapshot:
    """Read the devices, the results of queued items that the dispatcher has not read yet, and who has opted out."""
    sql = """
        SELECT id, CASE outcome WHEN 'unknown' THEN updated_at ELSE sent_at END
          FROM icloud.send_queue
         WHERE id = ANY (%(ids)s::uuid[]) AND status <> 'queued'
    """
    now, read_at = _read_clock(icloud)
    queued_items = outreach.queued_items if outreach else []
    ids = [queue_id for _, queue_id, _ in queued_items if runtime.is_uuid(queue_id)]  # a TEXT column
    rows = db.query(icloud, sql, {"ids": ids}) if 0 < len(ids) <= MAX_SIMULATED_ITEMS else []
    keys = {key for items in (outreach.items.values() if outreach else ()) for item in items for key in item.keys}
    return QueueSnapshot(
        now, read_at, pacing.devices(icloud), dict(rows), frozenset(batches.opted_out_keys(icloud, keys))
    )
