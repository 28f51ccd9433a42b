"""Find out whether the people of a batch were sent the same text before.

Used by composing.py. Reads outreach_batches and outreach_batch_items in quinn. Two texts are the same if their
templates and their variables are. Memory grows with the number of such batches only. Example:

    repeats = Repeats(quinn, request.template, request.vars, batch_id)
    repeats.add(["+14155550123"]); repeats.found()
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

import db

MAX_BATCHES = 20  # earlier batches with the same text that are looked at, the newest first
SHOWN = 3  # of them

Connection = Any  # psycopg2's connection


class Repeat(msgspec.Struct, rename="camel"):
    """An earlier batch with the same text. `people`: those of the new batch's people who were sent it."""

    batch_id: str
    name: str | None
    sent_at: datetime
    people: int


class Repeats:
    """Count the people who were sent the same text before, some at a time."""

    def __init__(self, quinn: Connection, template: str, variables: Mapping[str, object], batch_id: str | None) -> None:
        # md5(template) is the index; the template itself is compared after it.
        sql = """
            SELECT id::text, name
              FROM outreach_batches
             WHERE md5(template) = md5(%(template)s) AND template = %(template)s AND vars = %(vars)s::jsonb
               AND status IN ('sending', 'paused', 'sent', 'cancelled') AND id IS DISTINCT FROM %(id)s::uuid
             ORDER BY created_at DESC
             LIMIT %(limit)s
        """
        parameters = {"template": template, "vars": json.dumps(dict(variables)), "id": batch_id, "limit": MAX_BATCHES}
        self.quinn = quinn
        self.names: dict[str, str | None] = dict(db.query(quinn, sql, parameters))
        self.people: dict[str, int] = {}
        self.sent_at: dict[str, datetime] = {}

    def add(self, handle_keys: Sequence[str]) -> None:
        """Count those of these people who were sent one of the earlier batches."""
        sql = """
            SELECT batch_id::text, count(*), max(sent_at)
              FROM unnest(%(keys)s::text[]) AS key
             CROSS JOIN LATERAL (SELECT batch_id, sent_at
                                   FROM outreach_batch_items
                                  WHERE handle_key = key AND status = 'sent' AND batch_id = ANY (%(ids)s::uuid[])
                                 OFFSET 0) AS item
             GROUP BY batch_id
        """
        if not self.names:
            return
        for batch_id, count, sent_at in db.query(self.quinn, sql, {"keys": handle_keys, "ids": list(self.names)}):
            self.people[batch_id] = self.people.get(batch_id, 0) + count
            self.sent_at[batch_id] = max(sent_at, self.sent_at.get(batch_id, sent_at))

    def found(self) -> list[Repeat]:
        """Return the earlier batches that reached some of the people, those that reached most first."""
        found = [Repeat(each, self.names[each], self.sent_at[each], count) for each, count in self.people.items()]
        return sorted(found, key=lambda repeat: (-repeat.people, repeat.batch_id))[:SHOWN]
