"""Check the checker of the opt-out tests: what it must complain about, and what it must not."""

from datetime import UTC, datetime, timedelta

import pytest
from opt_out_check import (
    Act,
    Collect,
    Kind,
    collected_after_opt_out,
    collected_after_opt_out_of_person,
    meanwhile,
)

KEY, OTHER = "+14155550123", "jane@example.com"
NOON = datetime(2026, 4, 22, 12, tzinfo=UTC)


def act(kind: Kind, requested: float, acknowledged: float | None, minute: int = 0, key: str = KEY) -> Act:
    received_at = NOON + timedelta(minutes=minute) if kind in ("stop", "start") else None
    return Act(kind, key, received_at, requested, acknowledged)


@pytest.mark.parametrize(
    ("acts", "is_late"),
    [
        ([], False),
        ([act("stop", 1, 2)], True),
        ([act("owner", 1, 2)], True),
        ([act("import", 1, 2)], True),
        ([act("stop", 1, 11)], False),  # its response came after the collection
        ([act("stop", 1, None)], False),  # nobody knows whether it is recorded
        ([act("stop", 1, 2, key=OTHER)], False),
        ([act("stop", 1, 2, 1), act("start", 3, 4, 2)], False),
        ([act("stop", 1, 2, 1), act("start", 3, None, 2)], False),  # it may have arrived
        ([act("stop", 1, 2, 1), act("start", 11, 12, 2)], True),
        ([act("stop", 1, 2, 2), act("start", 3, 4, 1)], True),  # START is older
        ([act("stop", 1, 2, 1), act("start", 3, 4, 1)], True),  # of the same moment
        ([act("start", 1, 2, 2), act("stop", 3, 4, 1)], True),  # START had nothing to end
        ([act("stop", 1, 2, 1), act("start", 3, 4, 2), act("stop", 5, 6, 1)], False),  # the daily repetition
        ([act("stop", 1, 2, 1), act("start", 3, 4, 2), act("stop", 5, 6, 3)], True),
        ([act("stop", 1, None, 1), act("stop", 3, 4, 1)], True),  # its first response was lost
        ([act("owner", 1, 2), act("start", 3, 4, 1)], True),
        ([act("owner", 1, 2), act("end", 3, 4)], False),
        ([act("stop", 1, 2), act("end", 3, 4)], False),
        ([act("owner", 1, 2), act("end", 3, 4), act("owner", 5, 6)], True),
        ([act("end", 1, 2), act("owner", 3, 4)], True),
    ],
)
def test_collection_at_10_is_late_or_not(acts: list[Act], is_late: bool) -> None:
    assert bool(list(collected_after_opt_out(acts, [Collect("row", KEY, 10)]))) is is_late


@pytest.mark.parametrize(("syncs", "is_late"), [([], False), ([1, 5], False), ([5, 6], True), ([5, 11], False)])
def test_another_handle_counts_two_syncs_later(syncs: list[float], is_late: bool) -> None:
    acts, collected = [act("stop", 1, 2, key=OTHER)], [Collect("row", KEY, 10)]
    found = collected_after_opt_out_of_person(acts, collected, {KEY: [OTHER]}, syncs)
    assert bool(list(found)) is is_late


def test_collections_during_a_request_are_counted() -> None:
    acts = [act("stop", 9, 11), act("stop", 9, None, 1)]
    assert meanwhile(acts, [Collect("row", KEY, 10), Collect("row", OTHER, 10), Collect("row", KEY, 8)]) == 1
