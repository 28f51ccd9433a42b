"""Group pending items by what holds their recipients: the time zones, and whether the client is a new contact.

Used by pacing.py, forecast.py and the dispatcher. All items of one group may go at the same times, so the dispatcher
finds a batch's next item by looking at each group, and not at each item. Reads outreach_batch_items in quinn. Example:

    recipient_groups.read(quinn)  # the groups of all pending items
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import db


class Group(NamedTuple):
    """What pending items have in common.

    `time_zones`: where the recipients may be, sorted; (): nothing says where; None: the dispatcher has not looked yet.
    `is_new`: the clients were never written to before.
    """

    time_zones: tuple[str, ...] | None
    is_new: bool


def of_item(time_zones: list[str] | None, new_contact: bool | None) -> Group:
    """Return the group of an item, from its two columns."""
    return Group(None if time_zones is None else tuple(time_zones), new_contact is not False)


def read(quinn: Any) -> list[Group]:
    """Return the groups of the pending items of all batches, those that are not being sent included.

    One index probe for each group, however many items there are.
    """
    sql = """
        WITH RECURSIVE found AS (
            (SELECT time_zones, new_contact
               FROM outreach_batch_items
              WHERE status = 'pending' AND time_zones IS NOT NULL
              ORDER BY time_zones, new_contact
              LIMIT 1)
            UNION ALL
            SELECT following.time_zones, following.new_contact
              FROM found
             CROSS JOIN LATERAL (
                   SELECT time_zones, new_contact
                     FROM outreach_batch_items
                    WHERE status = 'pending' AND (time_zones, new_contact) > (found.time_zones, found.new_contact)
                    ORDER BY time_zones, new_contact
                    LIMIT 1
                   ) AS following
        )
        SELECT time_zones, new_contact FROM found
        UNION ALL
        SELECT NULL, true
         -- With the order, the planner takes the index; for any one row, it may scan the table.
         WHERE (SELECT true
                  FROM outreach_batch_items
                 WHERE status = 'pending' AND time_zones IS NULL
                 ORDER BY time_zones, new_contact
                 LIMIT 1)
    """
    return [of_item(*row) for row in db.query(quinn, sql)]


def parameters(groups: Iterable[Group] | None) -> dict[str, Any]:
    """Return groups as the parameters `zones`, `is_new` and `in_groups` of a statement; None: items of all groups."""
    known = [group for group in groups or () if group.time_zones is not None]
    return {
        "zones": [as_array(group.time_zones or ()) for group in known],
        "is_new": [group.is_new for group in known],
        "in_groups": groups is not None,
    }


def as_array(names: Iterable[str]) -> str:
    """Return zones as the text of an array: arrays of different lengths cannot be the elements of a parameter."""
    return "{" + ",".join(f'"{name}"' for name in names) + "}"
