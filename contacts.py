"""Find the clients who have a handle, however it is written.

Used by opt_outs.py and personal_data.py, on an owner's command. Reads the whole of contact_relationships in quinn:
handles are stored as somebody wrote them, so no index finds them by their key. Example:

    contacts.of_handles(quinn, ["+14155550123"])  # every handle of each client who has this number
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import db
import handles

TAIL = 6  # digits at the end of a number that do not depend on how it is written

Connection = Any  # psycopg2's connection


class Contact(NamedTuple):
    """A handle of a client, as it is stored, and its key."""

    client_id: str
    handle: str
    is_primary: bool
    key: str


def of_handles(quinn: Connection, keys: Iterable[str]) -> list[Contact]:
    """Return all handles of each client who has a handle with one of these keys (handles.key), by client.

    SQL finds the candidates: a number by its last digits, an address without case, which PostgreSQL may know for ASCII
    only. handles.key decides.
    """
    candidates = """
        SELECT client_id::text, handle
          FROM contact_relationships
         WHERE right(regexp_replace(handle, '[^0-9]', '', 'g'), %(tail)s) = ANY (%(tails)s)
            OR lower(regexp_replace(handle, '^\\s+|\\s+$', '', 'g')) = ANY (%(keys)s)
            OR handle ~ '[^[:ascii:]]'
    """
    all_of_client = """
        SELECT DISTINCT client_id::text, handle, is_primary
          FROM contact_relationships
         WHERE client_id::text = ANY (%(ids)s)
         ORDER BY 1, is_primary DESC, handle
    """
    wanted = set(keys)
    tails = {tail for key in wanted if (tail := "".join(filter(str.isdigit, key))[-TAIL:])}
    found = db.query(quinn, candidates, {"tail": TAIL, "tails": sorted(tails), "keys": sorted(wanted)})
    ids = sorted({client_id for client_id, handle in found if handles.key(handle) in wanted})
    rows = db.query(quinn, all_of_client, {"ids": ids}) if ids else []
    return [Contact(client_id, handle, primary, handles.key(handle)) for client_id, handle, primary in rows]
