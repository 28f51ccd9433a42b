"""Note each opt-out and opt-in of a test, and check that no message was collected after its opt-out was recorded.

Used by test_opt_out_faults.py. Reads event_log.changes, which triggers have written, and asks the product nothing: who
has opted out follows from the requests and their responses alone. An opt-out counts from its response on, when somebody
was told that it is recorded. Example:

    acts.note("stop", "+14155550123", lambda: mac.opt_out(...).ok, received_at); ...
    assert list(collected_after_opt_out(acts.all, collects(changes))) == []
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from event_log import Change

Kind = Literal["stop", "start", "owner", "import", "end"]


class Act(NamedTuple):
    """A request to record an opt-out (a reply, the owner's, a list's) or to end one (a reply, the owner's).

    Times are seconds since 1970. `received_at`: when the person wrote a reply. `acknowledged_at`: None if no response
    came, so that nobody knows whether it is recorded.
    """

    kind: Kind
    key: str
    received_at: datetime | None
    requested_at: float
    acknowledged_at: float | None


class Collect(NamedTuple):
    """A row of the queue was handed to a device."""

    row_id: str
    key: str
    at: float


class Acts:
    """What was asked for so far, by several threads."""

    def __init__(self) -> None:
        self.all: list[Act] = []
        self.lock = threading.Lock()

    def note(self, kind: Kind, key: str, ask: Callable[[], bool], received_at: datetime | None = None) -> bool:
        """Ask, and note it; return whether the response said that it is done."""
        requested_at = time.time()
        is_done = False
        try:
            is_done = ask()
        finally:
            with self.lock:
                self.all.append(Act(kind, key, received_at, requested_at, time.time() if is_done else None))
        return is_done


def collects(changes: Iterable[Change]) -> list[Collect]:
    """Return each collection. After a restore, the same change may come twice; it counts once."""
    found = {
        Collect(change.id, change.new["to_handle"], change.at)
        for change in changes
        if change.table == "send_queue" and change.new and change.new["collected_at"]
        if not (change.old and change.old["collected_at"])
    }
    return sorted(found, key=lambda collect: collect.at)


def opt_outs(acts: Sequence[Act]) -> dict[str, list[Act]]:
    """Return the opt-outs of each key. The same reply, reported again or by another device, is one opt-out."""
    found: dict[str, dict[object, Act]] = defaultdict(dict)
    for number, act in enumerate(acts):
        if act.kind in ("start", "end"):
            continue
        identity = act.received_at if act.kind == "stop" else number
        first = found[act.key].get(identity, act)
        known = [moment for moment in (first.acknowledged_at, act.acknowledged_at) if moment is not None]
        found[act.key][identity] = first._replace(
            requested_at=min(first.requested_at, act.requested_at), acknowledged_at=min(known, default=None)
        )
    return {key: list(of_key.values()) for key, of_key in found.items()}


def may_be_ended(opt_out: Act, acts: Iterable[Act], at: float) -> bool:
    """Return whether an opt-in of the same key may have ended this opt-out before `at`."""
    return any(
        act.requested_at < at
        and (act.acknowledged_at is None or act.acknowledged_at > opt_out.requested_at)
        and (act.kind == "end" or (opt_out.kind == "stop" and _is_later(act, opt_out)))
        for act in acts
        if act.kind in ("start", "end") and act.key == opt_out.key
    )


def _is_later(start: Act, stop: Act) -> bool:
    assert start.received_at
    assert stop.received_at
    return start.received_at > stop.received_at


def collected_after_opt_out(acts: Sequence[Act], collected: Iterable[Collect]) -> Iterator[str]:
    """Yield a sentence for each message that was collected although its handle's opt-out had been acknowledged."""
    known = opt_outs(acts)
    for collect in collected:
        for act in known.get(collect.key, ()):
            if act.acknowledged_at and act.acknowledged_at < collect.at and not may_be_ended(act, acts, collect.at):
                late = collect.at - act.acknowledged_at
                yield f"row {collect.row_id} was collected {late:.3f} s after the opt-out ({act.kind}) of {collect.key}"


def collected_after_opt_out_of_person(
    acts: Sequence[Act], collected: Iterable[Collect], others: Mapping[str, Sequence[str]], syncs: Sequence[float]
) -> Iterator[str]:
    """Yield the same for an opt-out of another handle of the person, two syncs after it was acknowledged.

    `others`: the other handles of the person, by handle. `syncs`: when each sync ended. Which client has which handle
    is in the dispatcher's database: the server does not know it. The first sync may have begun before the opt-out.
    """
    known = opt_outs(acts)
    for collect in collected:
        for act in [act for other in others.get(collect.key, ()) for act in known.get(other, ())]:
            if not act.acknowledged_at or may_be_ended(act, acts, collect.at):
                continue
            if sum(act.acknowledged_at < sync < collect.at for sync in syncs) >= 2:
                yield f"row {collect.row_id} was collected after the opt-out of {act.key}, the same person's"


def meanwhile(acts: Sequence[Act], collected: Iterable[Collect]) -> int:
    """Return how many messages were collected between the request of their opt-out and its response."""
    known = opt_outs(acts)
    return sum(
        any(act.requested_at < collect.at <= (act.acknowledged_at or collect.at) for act in known.get(collect.key, ()))
        for collect in collected
    )
