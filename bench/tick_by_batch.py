"""Implement the dispatch job's rules with queries for each batch, on the product's tables and indexes.

dispatch_rows.py compares it with the dispatcher's tick, whose number of statements does not depend on the number of
batches. Example:

    sent = tick_by_batch(quinn, icloud, lambda: str(uuid.uuid4()))
"""

from collections.abc import Callable, Sequence
from typing import Any

import product


def tick_by_batch(quinn: Any, icloud: Any, enqueue: Callable[[], str]) -> int:
    """Send the next item of each batch that the settings allow; return how many."""
    sending = """
        SELECT id FROM outreach_batches WHERE status = 'sending' AND NOT dry_run
         ORDER BY last_served_at NULLS FIRST, created_at, id
    """
    read_settings = """
        SELECT paused, max_per_minute, max_per_hour, max_per_day, min_gap_seconds
          FROM outreach_settings WHERE id = 1
    """
    sent = 0
    for (batch_id,) in product.query(quinn, sending):
        [(paused, *limits, gap)] = product.query(quinn, read_settings)
        if not paused and not _limit_reached(quinn, limits) and not _gap_holds(quinn, batch_id, gap):
            sent += _send_oldest(quinn, icloud, batch_id, enqueue)
    return sent


def _limit_reached(quinn: Any, limits: Sequence[int | None]) -> bool:
    usage = """
        SELECT (SELECT count(*) FROM outreach_batch_items
                 WHERE status = 'sent' AND sent_at > now() - %(window)s::interval)
             + (SELECT count(*) FROM outreach_batch_items WHERE status = 'queued')
    """
    used = [product.query(quinn, usage, {"window": window})[0][0] for window in ("1 minute", "1 hour", "1 day")]
    return any(limit is not None and usage >= limit for limit, usage in zip(limits, used, strict=True))


def _gap_holds(quinn: Any, batch_id: str, seconds: int | None) -> bool:
    newest = """
        SELECT max(sent_at) > now() - make_interval(secs => %(seconds)s)
          FROM outreach_batch_items WHERE batch_id = %(batch_id)s AND status = 'sent'
    """
    in_flight = "SELECT FROM outreach_batch_items WHERE batch_id = %(batch_id)s AND status = 'queued' LIMIT 1"
    params = {"batch_id": batch_id, "seconds": seconds}
    if not seconds:
        return False
    return bool(product.query(quinn, in_flight, params) or product.query(quinn, newest, params)[0][0])


def _send_oldest(quinn: Any, icloud: Any, batch_id: str, enqueue: Callable[[], str]) -> int:
    oldest = """
        SELECT id, client_id FROM outreach_batch_items WHERE batch_id = %(batch_id)s AND status = 'pending'
         ORDER BY created_at, id LIMIT 1
    """
    counts = "SELECT status, count(*) FROM outreach_batch_items WHERE batch_id = %(batch_id)s GROUP BY status"
    complete = "UPDATE outreach_batches SET status = 'sent', updated_at = now() WHERE id = %(batch_id)s"
    primary = "SELECT handle FROM contact_relationships WHERE client_id = %(client_id)s AND is_primary"
    skip = "UPDATE outreach_batch_items SET status = 'skipped', updated_at = now() WHERE id = %(id)s"
    queue = """
        UPDATE outreach_batch_items
           SET status = 'queued', send_queue_id = %(queue_id)s, queued_at = now(), updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
    """
    serve = "UPDATE outreach_batches SET last_served_at = now() WHERE id = %(batch_id)s"
    items = product.query(quinn, oldest, {"batch_id": batch_id})
    if not items:
        if not dict(product.query(quinn, counts, {"batch_id": batch_id})).keys() & {"pending", "queued"}:
            product.query(quinn, complete, {"batch_id": batch_id})
        return 0
    item_id, client_id = items[0]
    if not product.query(quinn, primary, {"client_id": client_id}):
        product.query(quinn, skip, {"id": item_id})
        return 0
    product.query(icloud, "SELECT id FROM icloud.devices LIMIT 1")
    product.query(quinn, queue, {"id": item_id, "queue_id": enqueue()})
    product.query(quinn, serve, {"batch_id": batch_id})
    return 1
