"""Check GET /metrics of both servers, as Prometheus' own parser reads it."""

import math
import re
from typing import Any

import pytest
import requests
import yaml
from helpers import ago
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from situations import composed, running_system, sent_items, uncollected_items
from testing import OWNER_TOKEN, ROOT, SERVICE_TOKEN, TestData

import metrics

Samples = dict[tuple[str, tuple[str, ...]], float]
# The labels that name a device are left out where a test has one device only.
IGNORED = {"device", "device_id"}


def scrape(url: str, token: str) -> str:
    response = requests.get(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"}, timeout=10)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return response.text


def samples_of(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def values_of(text: str) -> Samples:
    """Return each sample's value by its name and the values of its labels."""
    return {
        (sample.name, tuple(value for label, value in sorted(sample.labels.items()) if label not in IGNORED)): value
        for sample in samples_of(text)
        for value in [sample.value]
    }


def of_both(base_url: str, owner_url: str) -> tuple[Samples, Samples]:
    return values_of(scrape(base_url, SERVICE_TOKEN)), values_of(scrape(owner_url, OWNER_TOKEN))


def ended(world: TestData, device_id: str, **columns: Any) -> None:
    """Insert a message that has ended, a moment ago unless `updated_at` says another time."""
    values = {"status": "failed", "collected_at": ago(60)} | columns
    world.row(device_id, **values)


@pytest.fixture
def text(world: TestData, base_url: str, owner_url: str) -> str:
    """The outreach server's metrics, with a device."""
    running_system(world)
    return scrape(owner_url, OWNER_TOKEN)


def test_queue_is_told_by_both_servers(world: TestData, base_url: str, owner_url: str) -> None:
    running_system(world)
    uncollected_items(world, 3)
    one = "WHERE id = (SELECT id FROM icloud.send_queue LIMIT 1)"
    world.icloud(f"UPDATE icloud.send_queue SET collected_at = now(), created_at = now() - interval '90 seconds' {one}")
    world.icloud("UPDATE icloud.devices SET problem = 'Messages is signed out', opt_outs = 7")
    for found in of_both(base_url, owner_url):
        assert found["send_queue_messages", ("waiting",)] == 2
        assert found["send_queue_messages", ("collected",)] == 1
        assert 90 <= found["send_queue_oldest_message_age_seconds", ()] < 100
        assert 3 <= found["send_queue_device_last_seen_age_seconds", ()] < 13
        assert found["send_queue_device_problem", ()] == 1
        assert found["send_queue_opt_out_replies_total", ()] == 7


def test_results_of_the_last_hour_are_told_by_kind(world: TestData, base_url: str) -> None:
    device_id = world.device()
    ended(world, device_id, status="sent", sent_at=ago(60))
    ended(world, device_id, status="sent", sent_at=ago(60), updated_at=ago(minutes=61))
    ended(world, device_id)
    ended(world, device_id, outcome="not_started")
    ended(world, device_id, outcome="unknown")
    ended(world, device_id, collected_at=None, withdrawn_at=ago(60))
    ended(world, device_id, collected_at=None, withdrawn_at=ago(60))
    found = values_of(scrape(base_url, SERVICE_TOKEN))
    assert {labels[0]: value for (name, labels), value in found.items() if name == "send_queue_results_last_hour"} == {
        "sent": 1, "failed": 1, "not_started": 1, "unknown": 1, "withdrawn": 2,
    }  # fmt: skip


def test_opt_outs_of_the_last_hour_are_told_by_source(world: TestData, base_url: str) -> None:
    record = "INSERT INTO icloud.opt_outs (handle_key, source, created_at) VALUES (%(key)s, %(source)s, %(at)s)"
    for key, source, at in (("a", "owner", ago(5)), ("b", "import", ago(5)), ("c", "import", ago(minutes=61))):
        world.icloud(record, key=key, source=source, at=at)
    found = values_of(scrape(base_url, SERVICE_TOKEN))
    assert [found["send_queue_opt_outs_last_hour", (source,)] for source in metrics.OPT_OUT_SOURCES] == [0, 1, 1]


def test_limits_count_what_was_sent_and_what_is_in_flight(world: TestData, base_url: str, owner_url: str) -> None:
    running_system(world)
    world.settings(max_per_hour=30, max_per_day=0)
    sent_items(world, 4, minutes=20)
    uncollected_items(world, 2)
    queue, outreach = of_both(base_url, owner_url)
    assert outreach["outreach_limit_used_messages", ("max_per_hour",)] == 6
    assert outreach["outreach_limit_max_messages", ("max_per_hour",)] == 30
    assert outreach["outreach_limit_max_messages", ("max_per_day",)] == 0
    assert ("outreach_limit_max_messages", ("max_per_minute",)) not in outreach
    assert outreach["outreach_in_flight_items", ()] == 2
    assert not any(name.startswith("outreach_") for name, _ in queue)


def test_jobs_are_told_by_their_age(world: TestData, owner_url: str) -> None:
    world.settings(last_tick_at=ago(5), last_synced_at=ago(minutes=2), last_dispatched_at=None)
    found = values_of(scrape(owner_url, OWNER_TOKEN))
    assert 5 <= found["outreach_last_tick_age_seconds", ()] < 15
    assert 120 <= found["outreach_last_sync_age_seconds", ()] < 130
    assert found["outreach_last_dispatch_age_seconds", ()] == math.inf


def test_open_batches_and_their_pending_items_are_told(world: TestData, owner_url: str) -> None:
    composed(world, clients=2)
    world.item(world.batch(clients=1), status="queued")
    for status in ("paused", "draft", "draft", "cancelled", "sent"):
        world.batch(clients=1, status=status)
    found = values_of(scrape(owner_url, OWNER_TOKEN))
    statuses = {labels[0]: value for (name, labels), value in found.items() if name == "outreach_batches"}
    assert statuses == {"draft": 2, "sending": 2, "paused": 1}
    assert found["outreach_pending_items", ()] == 3


def test_nothing_is_left_out_of_an_empty_system(world: TestData, base_url: str, owner_url: str) -> None:
    world.quinn("DELETE FROM outreach_settings")
    queue, outreach = of_both(base_url, owner_url)
    assert queue.items() <= outreach.items()
    assert outreach["send_queue_results_last_hour", ("unknown",)] == 0
    assert outreach["outreach_batches", ("sending",)] == 0
    assert outreach["outreach_last_tick_age_seconds", ()] == math.inf


def test_device_that_never_polled_is_infinitely_old(world: TestData, base_url: str) -> None:
    world.device()
    found = values_of(scrape(base_url, SERVICE_TOKEN))
    assert found["send_queue_device_last_seen_age_seconds", ()] == math.inf
    assert found["send_queue_oldest_message_age_seconds", ()] == 0


def test_two_devices_of_one_name_are_two_series(world: TestData, base_url: str) -> None:
    names = ["mac", "mac", 'a "quoted"\\name\nof two lines, with {braces} and ü']
    ids = [world.device(name, token=str(number)) for number, name in enumerate(names)]
    found = [sample.labels for sample in samples_of(scrape(base_url, SERVICE_TOKEN)) if "device" in sample.labels]
    assert {(labels["device_id"], labels["device"]) for labels in found} == set(zip(ids, names, strict=True))
    series = [(sample.name, *sorted(sample.labels.items())) for sample in samples_of(scrape(base_url, SERVICE_TOKEN))]
    assert len(series) == len(set(series))


def test_metrics_keep_prometheus_conventions(text: str) -> None:
    families = list(text_string_to_metric_families(text))
    assert len(families) == len({family.name for family in families}) >= 15
    for family in families:
        assert re.fullmatch("(send_queue|outreach)(_[a-z]+)+", family.name)
        assert family.type in ("gauge", "counter")
        assert re.search(r"From (icloud|outreach)[._][a-z_]+\.$", family.documentation), family.name
        is_time = re.search("(?i)second", family.documentation.partition(". ")[0]) and "last_hour" not in family.name
        assert family.name.endswith("_seconds") is bool(is_time), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") is (family.type == "counter")
            assert not {"job", "instance"} & set(sample.labels), "Prometheus sets these itself"


def test_page_names_each_metric_and_its_labels(text: str) -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = re.findall(r"^\| `((?:send_queue|outreach)_\w+)` \| (.*?) ?\|", page, re.MULTILINE)
    found = {sample.name: set(sample.labels) for sample in samples_of(text)}
    limits = {"outreach_limit_used_messages": {"limit"}, "outreach_limit_max_messages": {"limit"}}  # none is set
    assert {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == found | limits
    for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        assert set(re.findall(r"\b(?:send_queue|outreach)_\w+", block)) <= set(found)
        assert yaml.safe_load(block)


@pytest.mark.parametrize("token", [None, "mac-mini", OWNER_TOKEN])
def test_send_queue_server_wants_the_service_token(world: TestData, base_url: str, token: str | None) -> None:
    world.device()
    assert refusal(base_url, token) == 401


@pytest.mark.parametrize("token", [None, SERVICE_TOKEN])
def test_outreach_server_wants_the_owners_token(owner_url: str, token: str | None) -> None:
    assert refusal(owner_url, token) == 401


def refusal(url: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.get(f"{url}/metrics", headers=headers, timeout=10).status_code
