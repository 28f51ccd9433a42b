"""Find out and store where the recipients of items are, and whether they were written to before.

Used by the dispatcher, for items that nobody has looked at, and by batches.py, for messages in the queue. A composed
batch's items have it from their draft. Reads clients and contact_relationships in quinn; writes two columns of
outreach_batch_items. Example:

    recipient_zones.fill_in(quinn)
"""

from collections.abc import Sequence
from typing import Any

import db
import recipient_groups
import zones

MAX_LOOKED_UP = 10_000  # items in one tick, which takes a second

Connection = Any  # psycopg2's connection


def of_items(quinn: Connection, item_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return in which time zones the recipients of items may be now, as zones.zones_of_person() does."""
    sql = """
        SELECT item.id, to_jsonb(client) ->> 'time_zone',
               ARRAY(SELECT handle FROM contact_relationships
                      WHERE client_id = item.client_id AND handle IS NOT NULL
                      ORDER BY is_primary DESC NULLS LAST, handle)
          FROM outreach_batch_items AS item
          LEFT JOIN clients AS client ON client.id = item.client_id
         WHERE item.id = ANY (%(ids)s::uuid[])
    """
    rows = db.query(quinn, sql, {"ids": list(item_ids)}) if item_ids else []
    return {item_id: zones.zones_of_person(time_zone, addresses) for item_id, time_zone, addresses in rows}


def fill_in(quinn: Connection) -> int:
    """Look up the recipients of items of sending batches that nobody has looked at; return how many.

    At most MAX_LOOKED_UP, the oldest ones of each batch.
    """
    unknown = """
        WITH served AS MATERIALIZED (
            SELECT id
              FROM outreach_batches AS batch
             WHERE status = 'sending' AND NOT dry_run
               AND EXISTS (SELECT FROM outreach_batch_items
                            WHERE status = 'pending' AND time_zones IS NULL AND batch_id = batch.id OFFSET 0)
        )
        SELECT item.id
          FROM served
         CROSS JOIN LATERAL (
               SELECT id
                 FROM outreach_batch_items
                WHERE status = 'pending' AND time_zones IS NULL AND batch_id = served.id
                ORDER BY created_at, id
                LIMIT GREATEST(%(maximum)s / (SELECT count(*) FROM served), 1)
               ) AS item
    """
    store = """
        UPDATE outreach_batch_items AS item
           SET time_zones = found.zones::text[], new_contact = found.is_new, updated_at = now()
          FROM unnest(%(ids)s::uuid[], %(zones)s::text[], %(is_new)s::boolean[]) AS found (id, zones, is_new)
         WHERE item.id = found.id AND CASE status WHEN 'pending' THEN true END
    """
    item_ids = [item_id for (item_id,) in db.query(quinn, unknown, {"maximum": MAX_LOOKED_UP})]
    if not item_ids:
        return 0
    places, new = of_items(quinn, item_ids), new_contacts(quinn, item_ids)
    found = {
        "ids": item_ids,
        "zones": [recipient_groups.as_array(places[item_id]) for item_id in item_ids],
        "is_new": [item_id in new for item_id in item_ids],
    }
    db.query(quinn, store, found)
    return len(item_ids)


def new_contacts(quinn: Connection, item_ids: Sequence[str]) -> set[str]:
    """Return those of the items whose client was never written to.

    Messages of unknown outcome count as written, those in flight do not: they may come back.
    """
    sql = """
        SELECT id
          FROM outreach_batch_items AS item
         WHERE id = ANY (%(ids)s::uuid[])
           AND NOT EXISTS (SELECT FROM outreach_batch_items
                            WHERE client_id = item.client_id AND status = 'sent' OFFSET 0)
           AND NOT EXISTS (SELECT FROM outreach_batch_items
                            WHERE client_id = item.client_id AND outcome_unknown_at IS NOT NULL
                              AND id <> item.id OFFSET 0)
           AND NOT EXISTS (SELECT FROM outreach_batch_items
                            WHERE handle_key = item.handle_key AND status = 'sent' OFFSET 0)
           AND NOT EXISTS (SELECT FROM outreach_batch_items
                            WHERE handle_key = item.handle_key AND outcome_unknown_at IS NOT NULL
                              AND id <> item.id OFFSET 0)
    """
    return {item_id for (item_id,) in db.query(quinn, sql, {"ids": list(item_ids)})} if item_ids else set()


def mark_new(quinn: Connection, item_ids: Sequence[str]) -> None:
    """Store of pending items that their client was never written to."""
    sql = """
        UPDATE outreach_batch_items
           SET new_contact = true, updated_at = now()
         WHERE id = ANY (%(ids)s::uuid[]) AND CASE status WHEN 'pending' THEN NOT new_contact END
    """
    if item_ids:
        db.query(quinn, sql, {"ids": list(item_ids)})


def mark_known(quinn: Connection, item_ids: Sequence[str]) -> None:
    """Store of the other pending items of these items' clients that the client was written to."""
    sql = """
        UPDATE outreach_batch_items
           SET new_contact = false, updated_at = now()
         WHERE CASE status WHEN 'pending' THEN new_contact END
           AND id = ANY (ARRAY(
               SELECT waiting.id
                 FROM (SELECT DISTINCT client_id FROM outreach_batch_items WHERE id = ANY (%(ids)s::uuid[])) AS written
                CROSS JOIN LATERAL (
                      SELECT id
                        FROM outreach_batch_items
                       -- The CASE hides the partial indexes of all pending items.
                       WHERE client_id = written.client_id AND CASE status WHEN 'pending' THEN new_contact END
                      OFFSET 0
                      ) AS waiting))
    """
    if item_ids:
        db.query(quinn, sql, {"ids": list(item_ids)})
