"""Pause all sending at once, and let it go on.

Used by the owner's page. Touches outreach_settings in quinn, and withdraws rows of icloud.send_queue, through
batches.py. Example:

    pausing.pause_all(quinn, icloud)
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg2

import batches
import db
import pacing

Connection = Any  # psycopg2's connection
logger = logging.getLogger("outreach-server")


class Paused(NamedTuple):
    """What a pause did. `withdrawn`: messages taken back; None if the queue's database could not be reached.

    `beyond_recall`: messages that a device has collected, and of which it has not reported a result.
    """

    withdrawn: int | None
    beyond_recall: int


def pause_all(quinn: Connection, connect_icloud: Callable[[], Connection]) -> Paused:
    """Set `paused`, then withdraw what no device has collected, also while the dispatcher does not run.

    In this order: a message that the dispatcher enqueues in between is withdrawn by the dispatcher, which looks at
    `paused` after each. `paused` is set also if the queue's database is unavailable; the dispatcher withdraws later.
    """
    pause = "UPDATE outreach_settings SET paused = true WHERE id = 1 RETURNING id"
    collected = "SELECT count(*) FROM icloud.send_queue WHERE status = 'queued' AND collected_at IS NOT NULL"
    if not db.query(quinn, pause):
        raise batches.Refused(503, "outreach_settings has no row, so nothing is sent: run `python db.py migrate`")
    try:
        icloud = connect_icloud()
        withdrawn = batches.withdraw(quinn, icloud, pacing.read_snapshot(quinn))
        result = Paused(withdrawn, db.query(icloud, collected)[0][0])
    except psycopg2.Error:
        result = Paused(None, 0)
    logger.info("everything paused withdrawn=%s beyondRecall=%d", result.withdrawn, result.beyond_recall)
    return result


def resume_all(quinn: Connection) -> bool:
    """Take the pause of everything back; return whether there was one. Batches that are paused stay so."""
    sql = "UPDATE outreach_settings SET paused = false WHERE id = 1 AND paused RETURNING id"
    was_paused = bool(db.query(quinn, sql))
    logger.info("everything resumed wasPaused=%s", was_paused)
    return was_paused
