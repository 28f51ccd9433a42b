"""Choose the next item of each batch: the oldest one that may go now and has somebody to go to.

Used by the dispatcher. Reads outreach_batch_items, contact_relationships and what last_checks.py reads in quinn, and
icloud.opt_outs. Skips the items that nobody is to get, in outreach_batch_items. Example:

    found, new_contacts, deferred, skipped = choosing.next_items_within_limits(quinn, icloud, batch_ids, snapshot)
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import batches
import db
import handles
import last_checks
import pacing
import recipient_groups
import recipient_zones
from recipient_groups import Group

NO_HANDLE, OPTED_OUT = "no primary handle found", "opted out"  # why an item is skipped
# How many of a batch's items are looked at, one time after another, while each of them is to be skipped. So a tick
# skips 11,111 at most, and a statement always ends within its time-out.
LOOKS = (1, 10, 100, 1_000, 10_000)

Connection = Any  # psycopg2's connection
logger = logging.getLogger("outreach-dispatcher")


class Head(NamedTuple):
    """A batch's next pending item that may go, or one of its next ones, with all handles of its client.

    `handle`: the primary one. `handle_key`: of the one that the owner approved; None for an item made by hand.
    """

    batch_id: str
    id: str
    client_id: str
    handle_key: str | None
    handle: str | None
    handles: list[str]


def next_items_within_limits(
    quinn: Connection, icloud: Connection, batch_ids: Sequence[str], snapshot: pacing.Snapshot
) -> tuple[dict[str, str], set[str] | None, set[str], int]:
    """Return the next item of each batch, and no more new contacts than may be written to now.

    Also those of the items that are for new contacts (None: no limit asks for it), the batches that have no item
    because their new contacts wait for a place, and how many items were skipped.
    """
    due, places = pacing.due_groups(snapshot), pacing.remaining_new_contacts(snapshot)
    weekly = snapshot.settings.max_per_client_per_week
    keys: set[str] = set()
    found, skipped = next_items(quinn, icloud, batch_ids, due, weekly, keys)
    if places is None:
        return found, None, set(), skipped
    new_contacts = recipient_zones.new_contacts(quinn, list(found.values()))
    # In the order of the batches: an item may have been found late, after others of its batch were skipped.
    over = {batch_id: found[batch_id] for batch_id in batch_ids if found.get(batch_id) in new_contacts}
    over = dict(itertools.islice(over.items(), places, None))
    if over:
        # These wait for a place. Their batches go on with clients who were written to before.
        recipient_zones.mark_new(quinn, list(over.values()))
        known_groups = [group for group in (snapshot.groups if due is None else due) if not group.is_new]
        others, more_skipped = next_items(quinn, icloud, list(over), known_groups, weekly, keys)
        found = {batch_id: item_id for batch_id, item_id in found.items() if batch_id not in over}
        still_new = recipient_zones.new_contacts(quinn, list(others.values()))
        recipient_zones.mark_new(quinn, list(still_new))
        found |= {batch_id: item_id for batch_id, item_id in others.items() if item_id not in still_new}
        skipped += more_skipped
    return found, new_contacts, over.keys() - found.keys(), skipped


def next_items(
    quinn: Connection,
    icloud: Connection,
    batch_ids: Sequence[str],
    due: Sequence[Group] | None,
    weekly: int | None,
    keys: set[str],
) -> tuple[dict[str, str], int]:
    """Return each batch's oldest pending item that may go and has somebody to go to, and how many were skipped.

    `due`: the groups of items that may go now; None: all. `weekly`: max_per_client_per_week. `keys`: handles that get
    a message of a composed batch in this tick, to which it adds those that it finds: one handle gets one message.

    Opt-outs are in the other database. So it looks at the heads of the batches alone, and at more of a batch only when
    all of those were skipped: the work follows the items that are looked at, not those that wait.
    """
    found: dict[str, str] = {}
    skipped = 0
    rules = last_checks.read_rules(quinn, batch_ids)
    for look in LOOKS:
        heads = read_heads(quinn, batch_ids, look, due)
        opted_out = batches.opted_out(icloud, (handle for head in heads for handle in head.handles))
        people = [
            last_checks.Person(head.id, head.batch_id, head.client_id, head.handle_key, head.handle) for head in heads
        ]
        late, broken = last_checks.check(quinn, rules, people, with_claimed=True, weekly=weekly)
        for batch_id, failure in broken.items():
            batches.pause_broken(quinn, batch_id, failure)
        reasons: dict[str, list[str]] = {}
        batch_ids = []
        for batch_id, group in itertools.groupby(heads, lambda head: head.batch_id):
            candidates = [] if batch_id in broken else list(group)
            for head in candidates:
                reason = skip_reason(head.handle, head.handles, opted_out) or late.get(head.id)
                if reason is None:
                    if head.handle_key is None or head.handle_key not in keys:
                        found[batch_id] = head.id
                        keys |= {head.handle_key} if head.handle_key else set()
                    break
                reasons.setdefault(reason, []).append(head.id)
            else:
                batch_ids += [batch_id] if len(candidates) == look else []
        skipped += sum(skip(quinn, item_ids, reason) for reason, item_ids in reasons.items())
        if not batch_ids:
            break
    return found, skipped


def skip_reason(primary: str | None, addresses: Sequence[str], opted_out: set[str]) -> str | None:
    """Return why an item is skipped, None if it is not. An opt-out of any handle counts for the person."""
    if primary is None:
        return NO_HANDLE
    return OPTED_OUT if any(handles.key(address) in opted_out for address in addresses) else None


def read_heads(quinn: Connection, batch_ids: Sequence[str], look: int, due: Sequence[Group] | None) -> list[Head]:
    """Return the first `look` pending items of each batch that may go, in the order of the batches and of the items.

    `due`: the groups of items that may go; None: all. The LATERAL is run once for each batch, and for each group,
    whatever the planner believes.
    """
    sql = """
        WITH due AS MATERIALIZED (
            SELECT zones::text[] AS time_zones, is_new
              FROM unnest(%(zones)s::text[], %(is_new)s::boolean[]) AS due (zones, is_new)
        )
        SELECT served.batch_id, head.id, head.client_id::text, head.handle_key,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = head.client_id AND is_primary),
               ARRAY(SELECT handle FROM contact_relationships WHERE client_id = head.client_id AND handle IS NOT NULL)
          FROM unnest(%(batch_ids)s::uuid[]) WITH ORDINALITY AS served (batch_id, place)
         CROSS JOIN LATERAL (
               (SELECT id, client_id, handle_key, created_at
                  FROM outreach_batch_items
                 WHERE NOT %(in_groups)s AND batch_id = served.batch_id AND status = 'pending'
                 ORDER BY created_at, id
                 LIMIT %(look)s)
                UNION ALL
               (SELECT item.id, item.client_id, item.handle_key, item.created_at
                  FROM due
                 CROSS JOIN LATERAL (
                       SELECT id, client_id, handle_key, created_at
                         FROM outreach_batch_items
                        WHERE status = 'pending' AND time_zones = due.time_zones AND new_contact = due.is_new
                          AND batch_id = served.batch_id
                        ORDER BY created_at, id
                        LIMIT %(look)s
                       ) AS item
                 ORDER BY item.created_at, item.id
                 LIMIT %(look)s)
               ) AS head
         ORDER BY served.place, head.created_at, head.id
    """
    parameters = {"batch_ids": list(batch_ids), "look": look, **recipient_groups.parameters(due)}
    return [Head(*row) for row in db.query(quinn, sql, parameters)]


def skip(quinn: Connection, item_ids: Sequence[str], reason: str) -> int:
    """pending -> skipped, with the reason; return how many."""
    sql = """
        UPDATE outreach_batch_items
           SET status = 'skipped', failure_reason = %(reason)s, updated_at = now()
         WHERE id = ANY (%(ids)s::uuid[]) AND CASE status WHEN 'pending' THEN true END
        RETURNING id
    """
    skipped = db.query(quinn, sql, {"ids": item_ids, "reason": reason}) if item_ids else []
    for (item_id,) in skipped:
        logger.info("item skipped item=%s reason=%r", item_id, reason)
    return len(skipped)
