"""Describe the queue and the outreach as Prometheus metrics, for GET /metrics of both servers.

Reads icloud.devices, icloud.send_queue and icloud.opt_outs, and the outreach tables of quinn; writes nothing. Every
figure is read at the scrape, so that all processes of a server say the same. No statement counts what ended before the
last hour: its cost would grow with each message. Example:

    body = metrics.render([*metrics.queue(query), *metrics.outreach(quinn)])
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

import db
import pacing

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # the version that every Prometheus reads
# The values of labels. A value that no row has is exported as 0, so that an alert rule finds its series.
RESULTS = ("sent", "failed", "not_started", "unknown", "withdrawn")
OPT_OUT_SOURCES = ("reply", "owner", "import")
OPEN_BATCHES = ("draft", "sending", "paused")
# Two devices may have the same name, and Prometheus refuses a scrape that has a series twice.
DEVICE = ("device_id", "device")

Query = Callable[[str], list[db.Row]]
Samples = Iterable[tuple[Sequence[str], float]]


class Families:
    """The metrics of one scrape, in the form that prometheus-client asks for."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families


def render(families: Iterable[Metric]) -> bytes:
    """Return the metrics in the text format of Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families(families))
    return generate_latest(registry)


# --- icloud -------------------------------------------------------------------------------------------


def queue(query: Query) -> Iterator[Metric]:
    """Yield what the icloud database knows. `query` runs a statement there."""
    yield from _devices(query)
    yield _results(query)
    yield _opt_outs(query)


def _devices(query: Query) -> Iterator[Metric]:
    sql = """
        SELECT device.id::text, device.name,
               count(message.id) FILTER (WHERE message.collected_at IS NULL),
               count(message.id) FILTER (WHERE message.collected_at IS NOT NULL),
               COALESCE(EXTRACT(epoch FROM now() - min(message.created_at)), 0)::float8,
               EXTRACT(epoch FROM now() - device.last_seen_at)::float8,
               device.problem IS NOT NULL, device.opt_outs
          FROM icloud.devices AS device
          LEFT JOIN icloud.send_queue AS message ON message.device_id = device.id AND message.status = 'queued'
         GROUP BY device.id
         ORDER BY device.created_at, device.id
    """
    rows = query(sql)
    yield _gauge(
        "send_queue_messages",
        "Messages without a result, by device. state: waiting (not collected) or collected. From icloud.send_queue.",
        [*DEVICE, "state"],
        [
            ((*row[:2], state), count)
            for row in rows
            for state, count in zip(("waiting", "collected"), row[2:4], strict=True)
        ],
    )
    yield _gauge(
        "send_queue_oldest_message_age_seconds",
        "Seconds since the oldest message without a result was enqueued; 0 if there is none. From icloud.send_queue.",
        DEVICE,
        [(row[:2], row[4]) for row in rows],
    )
    yield _gauge(
        "send_queue_device_last_seen_age_seconds",
        "Seconds since the device last polled; +Inf if it never did. From icloud.devices.",
        DEVICE,
        [(row[:2], math.inf if row[5] is None else row[5]) for row in rows],
    )
    yield _gauge(
        "send_queue_device_problem",
        "1 if the device reports that it cannot send, else 0. From icloud.devices.",
        DEVICE,
        [(row[:2], row[6]) for row in rows],
    )
    replies = CounterMetricFamily(
        "send_queue_opt_out_replies",
        "Opt-outs that the device has reported, those that ended since included. From icloud.devices.",
        labels=DEVICE,
    )
    for row in rows:
        replies.add_metric(row[:2], row[7])
    yield replies


def _results(query: Query) -> Metric:
    sql = """
        SELECT CASE WHEN withdrawn_at IS NOT NULL THEN 'withdrawn' ELSE COALESCE(outcome, status) END, count(*)
          FROM icloud.send_queue
         WHERE status <> 'queued' AND updated_at > now() - interval '1 hour'
         GROUP BY 1
    """
    return _gauge(
        "send_queue_results_last_hour",
        "Messages that ended in the last 3600 seconds. result: sent, failed (certainly not sent), not_started (given "
        "back), unknown (may have been sent) or withdrawn (never collected). From icloud.send_queue.",
        ["result"],
        _complete(RESULTS, query(sql)),
    )


def _opt_outs(query: Query) -> Metric:
    sql = """
        SELECT source, count(*) FROM icloud.opt_outs WHERE created_at > now() - interval '1 hour' GROUP BY source
    """
    return _gauge(
        "send_queue_opt_outs_last_hour",
        "Opt-outs recorded in the last 3600 seconds. source: reply, owner or import. From icloud.opt_outs.",
        ["source"],
        _complete(OPT_OUT_SOURCES, query(sql)),
    )


# --- quinn --------------------------------------------------------------------------------------------


def outreach(quinn: Any) -> Iterator[Metric]:
    """Yield what the quinn database knows."""
    yield from _pacing(pacing.read_snapshot(quinn))
    yield from _batches(quinn)


def _pacing(snapshot: pacing.Snapshot | None) -> Iterator[Metric]:
    """Yield the limits and the ages of the jobs. Without a row of settings there are no limits, and no job ran."""
    usage = [*pacing.limit_usage(snapshot), *pacing.new_contact_usage(snapshot)] if snapshot else []
    yield _gauge(
        "outreach_limit_used_messages",
        "Messages that count against the limit now: sent in its window, may have been sent, or in flight. Only limits "
        "that are set. From outreach_batch_items.",
        ["limit"],
        [([each.limit], each.used) for each in usage],
    )
    yield _gauge(
        "outreach_limit_max_messages",
        "The limit's maximum. Only limits that are set. From outreach_settings.",
        ["limit"],
        [([each.limit], each.maximum) for each in usage],
    )
    yield _gauge(
        "outreach_in_flight_items",
        "Items whose result is not known yet: claimed, queued or collected. From outreach_batch_items.",
        [],
        [([], snapshot.in_flight if snapshot else 0)],
    )
    for name, what, moment in (
        ("tick", "the dispatcher's last tick began", snapshot and snapshot.last_tick),
        ("sync", "the sync job last succeeded", snapshot and snapshot.last_synced),
        ("dispatch", "the dispatch job last succeeded", snapshot and snapshot.last_dispatched),
    ):
        # An age and not a point in time, as elsewhere: both times are the database's, so no other clock matters.
        yield _gauge(
            f"outreach_last_{name}_age_seconds",
            f"Seconds since {what}; +Inf if never. From outreach_settings.",
            [],
            [([], _age(snapshot.now, moment) if snapshot else math.inf)],
        )


def _batches(quinn: Any) -> Iterator[Metric]:
    batches = """
        SELECT status, count(*) FROM outreach_batches WHERE status IN ('draft', 'sending', 'paused') GROUP BY status
    """
    # Not the items of all batches: a cancelled batch keeps its pending items for ever.
    pending = """
        SELECT count(*)
          FROM outreach_batch_items
         WHERE status = 'pending' AND batch_id = ANY (ARRAY(SELECT id FROM outreach_batches WHERE status = 'sending'))
    """
    yield _gauge(
        "outreach_batches",
        "Batches that have not ended. status: draft, sending or paused. From outreach_batches.",
        ["status"],
        _complete(OPEN_BATCHES, db.query(quinn, batches)),
    )
    yield _gauge(
        "outreach_pending_items",
        "Items of sending batches that are not in the queue yet. From outreach_batch_items.",
        [],
        [([], db.query(quinn, pending)[0][0])],
    )


# --- samples ------------------------------------------------------------------------------------------


def _gauge(name: str, documentation: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for values, figure in samples:
        family.add_metric(values, figure)
    return family


def _complete(names: Sequence[str], rows: Iterable[db.Row]) -> Samples:
    """Return a sample for each of these names, 0 where there is no row."""
    counts: dict[str, int] = dict(rows)
    return [([name], counts.get(name, 0)) for name in names]


def _age(now: datetime, moment: datetime | None) -> float:
    return (now - moment).total_seconds() if moment else math.inf
