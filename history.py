"""Ask who was written to before, and how often.

Used when a batch is drafted (recipients.py, composing.py), when an item is chosen and right before its request
(last_checks.py), and when the dispatcher first sees an item (recipient_zones.py). Reads clients and
outreach_batch_items in quinn. Example:

    client_ids, keys = history.written_to(quinn, ["..."], ["+14155550123"], days=30)
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import db

Connection = Any  # psycopg2's connection


def written_to(
    quinn: Connection,
    client_ids: Sequence[str],
    keys: Sequence[str],
    days: int | None,
    with_claimed: bool = True,
    except_items: Sequence[str] = (),
    times: int = 1,
) -> tuple[set[str], set[str]]:
    """Return which of the clients, and which of the handle keys, were written to in the last `days` (None: ever).

    `times`: at least so many times. Messages in flight and of unknown outcome count. Before a request, when the item
    itself is claimed, the claimed ones do not count: of two claimed items for one person, the first is queued before
    the second is checked.

    `except_items`: the items that are about to be sent. If one of them has an unknown outcome itself, a person asked to
    send it again by name.
    """
    sql = """
        -- Rows are compared, not times: with an index by time alone, the planner would read all that was sent since
        -- then, for each person.
        SELECT client.id::text, NULL,
               (SELECT count(*)
                  FROM (SELECT FROM outreach_batch_items
                         WHERE client_id = client.id AND status = 'sent'
                           AND (client_id, sent_at)
                               > (client.id, COALESCE(now() - %(days)s * interval '1 day', '-infinity'))
                         LIMIT %(times)s) AS sent)
               + (SELECT count(*)
                    FROM (SELECT FROM outreach_batch_items
                           WHERE client_id = client.id AND outcome_unknown_at IS NOT NULL
                             AND (client_id, outcome_unknown_at)
                                 > (client.id, COALESCE(now() - %(days)s * interval '1 day', '-infinity'))
                             AND id <> ALL (%(except_items)s::uuid[])
                           LIMIT %(times)s) AS unknown)
          FROM clients AS client
         WHERE client.id = ANY (%(client_ids)s)
           -- Without these, the planner may scan all clients: it does not know that the counts are costly.
           AND (EXISTS (SELECT FROM outreach_batch_items
                         WHERE client_id = client.id AND status = 'sent' OFFSET 0)
                OR EXISTS (SELECT FROM outreach_batch_items
                            WHERE client_id = client.id AND outcome_unknown_at IS NOT NULL OFFSET 0))
        UNION ALL
        SELECT NULL, key,
               (SELECT count(*)
                  FROM (SELECT FROM outreach_batch_items
                         WHERE handle_key = key AND status = 'sent'
                           AND (handle_key, sent_at)
                               > (key, COALESCE(now() - %(days)s * interval '1 day', '-infinity'))
                         LIMIT %(times)s) AS sent)
               + (SELECT count(*)
                    FROM (SELECT FROM outreach_batch_items
                           WHERE handle_key = key AND outcome_unknown_at IS NOT NULL
                             AND (handle_key, outcome_unknown_at)
                                 > (key, COALESCE(now() - %(days)s * interval '1 day', '-infinity'))
                             AND id <> ALL (%(except_items)s::uuid[])
                           LIMIT %(times)s) AS unknown)
          FROM unnest(%(keys)s::text[]) AS key
        UNION ALL
        SELECT client_id::text, handle_key, 1
          FROM outreach_batch_items
         WHERE status = 'queued'
        UNION ALL
        SELECT client_id::text, handle_key, 1
          FROM outreach_batch_items
         WHERE %(with_claimed)s AND status = 'pending' AND claimed_at IS NOT NULL
    """
    # As one literal, the ids take the type of clients.id, whatever it is.
    literal = "{" + ",".join('"' + re.sub(r'(["\\\\])', r"\\\1", name) + '"' for name in client_ids) + "}"
    parameters = {
        "client_ids": literal, "keys": sorted(set(keys)), "days": days, "with_claimed": with_claimed,
        "except_items": list(except_items), "times": times,
    }  # fmt: skip
    clients: Counter[str] = Counter()
    people: Counter[str] = Counter()
    for client_id, key, count in db.query(quinn, sql, parameters):
        clients[client_id] += count
        people[key] += count
    return _reached(clients, times), _reached(people, times)


def _reached(counts: Counter[str], times: int) -> set[str]:
    return {name for name, count in counts.items() if name is not None and count >= times}
