"""Let opt-outs come at every step of a message's way: nothing is collected after one is recorded.

Where a race is meant, a held transaction decides who is first. opt_out_check.py judges from the requests and from the
recorded changes; it asks the product nothing.
"""

import contextlib
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import opt_out_check
import pytest
import requests
from helpers import LOCK_WAITS, run_sql
from opt_out_site import Site, Unreachable, figures
from opt_out_step_run import STOPS, VARIANTS, StepRun, minute
from testing import SERVICE_TOKEN, Script, TestData, wait_until

import db
import dispatcher
import opt_outs

pytestmark = pytest.mark.faults

Start = Callable[..., Script]


@pytest.fixture
def site(world: TestData, start: Start, tmp_path: Path) -> Iterator[Site]:
    site = Site(world, start, tmp_path)
    yield site
    site.client.session.close()


@pytest.fixture
def no_pauses(world: TestData) -> None:
    """Let no batch pause itself: here most people opt out, and messages fail on purpose."""
    world.settings(stop_after_failures=None)


def before_the_draft(run: StepRun) -> None:
    run.opt_out()
    run.draft()
    run.approve()
    run.finish()
    run.expect("left out")


def after_the_draft(run: StepRun) -> None:
    run.draft()
    run.opt_out()
    run.approve()
    run.finish()
    run.expect("skipped: opted out", rows=0, asked=False, claimed=False)


def after_the_approval(run: StepRun) -> None:
    run.draft()
    run.approve()
    run.opt_out()
    run.finish()
    run.expect("skipped: opted out", rows=0, asked=False, claimed=False)


def claimed(run: StepRun) -> None:
    """The server is down when the items are claimed, and up again after the opt-outs."""
    run.draft()
    run.approve()
    run.site.dispatch(Unreachable(run.site.url, SERVICE_TOKEN))
    run.opt_out()
    run.finish()
    run.expect("skipped: opted out", rows=0, asked=False)


def being_enqueued(run: StepRun) -> None:
    """The dispatcher has looked for opt-outs, and has not asked the server yet."""
    run.draft()
    run.approve()
    run.site.client.before = run.opt_out_one
    run.site.dispatch()
    run.site.client.before = lambda item_id: None
    run.finish()
    run.expect("skipped: opted out", rows=0, asked=True)


def while_the_row_is_not_committed(run: StepRun) -> None:
    """The server has looked for opt-outs, and its INSERT waits: no recording of an opt-out can see the row.

    A rival holds the items' places in the unique index, and gives them up after the opt-outs.
    """
    site = run.site
    run.draft()
    run.approve()
    site.dispatch(Unreachable(site.url, SERVICE_TOKEN))
    items = dispatcher.claimed_items(site.world.databases.quinn)
    insert = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
        SELECT %(device)s, 'rival', 'rival', id FROM unnest(%(ids)s::uuid[]) AS id
    """
    device_id = site.device_ids[0]
    with contextlib.closing(site.connect()) as rival, ThreadPoolExecutor(len(items)) as threads:
        db.query(rival, insert, {"device": device_id, "ids": [item.id for item in items]})
        waiting = [threads.submit(enqueue_alone, site, item, device_id) for item in items]
        wait_until(lambda: len(run_sql(site.world.databases.icloud_url, LOCK_WAITS)) == len(items))
        run.opt_out()
        rival.rollback()
        assert {each.result(10) for each in waiting} == {200}
    run.finish()
    run.expect("skipped: opted out", rows=1)


def enqueue_alone(site: Site, item: dispatcher.Item, device_id: str) -> int:
    """Ask the server for a row as the dispatcher does; return the status."""
    message = {
        "batchItemId": item.id, "deviceId": device_id, "toHandle": item.handle, "body": item.body,
        "attempt": item.attempt, "draftedAt": item.created_at.isoformat(),
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    response = requests.post(f"{site.url}/admin/send-queue/enqueue", json=message, headers=headers, timeout=30)
    return response.status_code


def while_the_response_is_on_its_way(run: StepRun) -> None:
    """The row is there, and the item does not know it yet."""
    run.draft()
    run.approve()
    batch_of = {item_id: batch_id for batch_id, item_id in run.item_of.items()}

    def after(item_id: str) -> None:
        [person] = [person for person in run.people if person.batch_id == batch_of[item_id]]
        VARIANTS[person.variant](run.site, person)

    run.site.client.after = after
    run.site.dispatch()
    run.site.client.after = lambda item_id: None
    run.expect_expired()
    run.finish()
    run.expect("skipped: opted out", rows=1)


def queued(run: StepRun) -> None:
    run.draft()
    run.approve()
    run.site.dispatch()
    run.opt_out()
    run.expect_expired()
    run.finish()
    run.expect("skipped: opted out", rows=1)


def peeked(run: StepRun) -> None:
    """The Mac has the texts, and has not asked to hand them over."""
    run.draft()
    run.approve()
    run.site.dispatch()
    assert len(run.device.peek()["items"]) == len(run.people)
    run.opt_out()
    run.finish()
    run.expect("skipped: opted out", rows=1)


def collected_and_given_back(run: StepRun) -> None:
    """The Mac asks again for what it has: it does not get it again, and gives it back."""
    run.draft()
    run.approve()
    run.site.dispatch()
    last = {batch_id: rows[-1] for batch_id, rows in run.rows().items()}
    ids = {row_id: str(uuid.uuid4()) for row_id in last.values()}
    for row_id, collect_id in ids.items():
        assert run.device.collect(row_id, collect_id).status_code == 200
    run.opt_out()
    for person in run.people:
        row_id = last[person.batch_id]
        again = run.device.collect(row_id, ids[row_id])
        if person.variant in STOPS and again.status_code == 200:
            run.fail(f"{person.variant}: handed over again")
        assert run.device.result(row_id, "failed", error="asleep", outcome="not_started").status_code == 200
    run.finish()
    run.expect("skipped: opted out", rows=1)


def sent(run: StepRun) -> None:
    """What was sent stays so; the next draft leaves them out."""
    run.draft()
    run.approve()
    run.site.dispatch()
    run.collect(list(VARIANTS))
    run.send()
    run.opt_out()
    run.site.sync()
    sql = "SELECT DISTINCT status FROM outreach_batch_items WHERE id = ANY (%(ids)s::uuid[])"
    if run.site.world.quinn(sql, ids=list(run.item_of.values())) != [("sent",)]:
        run.fail("a message that was sent is not `sent`")
    run.draft(again=True)
    run.approve()
    run.finish()
    run.expect("left out")


def failed_and_retried(run: StepRun) -> None:
    run.draft()
    run.approve()
    run.site.dispatch()
    for rows in run.rows().values():
        assert run.device.collect(rows[-1]).status_code == 200
        assert run.device.result(rows[-1], "failed", error="not registered").status_code == 200
    run.site.sync()
    run.opt_out()
    run.site.client.asked.clear()
    for batch_id in run.item_of:
        assert run.site.owner.call("POST", f"/my/outreach/batch/{batch_id}/retry", {}).status_code == 200
    run.finish()
    run.expect("skipped: opted out", rows=1, asked=False)


BY_ONE = (
    before_the_draft, after_the_draft, after_the_approval, claimed, being_enqueued, while_the_row_is_not_committed,
    while_the_response_is_on_its_way, queued, peeked, collected_and_given_back, sent, failed_and_retried,
)  # fmt: skip
BY_POLL = (while_the_row_is_not_committed, while_the_response_is_on_its_way, queued)
STEPS = [(step, False) for step in BY_ONE] + [(step, True) for step in BY_POLL]


def test_opt_outs_at_every_step_of_a_message(site: Site, no_pauses: None, capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[str] = []
    others: dict[str, list[str]] = {}
    for step, is_polled in STEPS:
        run = StepRun(site, step.__name__.replace("_", " "), is_polled)
        step(run)
        failures += run.failures
        others |= run.others()
    found = site.violations(others)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(STEPS)} steps, {len(others)} people: {figures(site)}\n")
    assert not failures + found, "\n".join(failures + found)


# --- races at a lock ----------------------------------------------------------------------------------

HANDLE = "+14155550123"


def waiting(site: Site, count: int) -> None:
    """Wait until so many sessions wait for a lock."""
    wait_until(lambda: len(run_sql(site.world.databases.icloud_url, LOCK_WAITS)) == count)


def ask_for(site: Site, way: str, row_id: str) -> bool:
    """Let the device collect a row; return whether it got it."""
    if way == "poll":
        return [item["id"] for item in site.devices[0].poll()] == [row_id]
    return site.devices[0].collect(row_id).status_code == 200


@pytest.mark.parametrize("way", ["collect", "poll"])
def test_collect_that_has_looked_before_the_opt_out_and_waits_at_its_row_gets_nothing(site: Site, way: str) -> None:
    """Both statements that record it are one held transaction: only the row itself can say no."""
    row_id = site.world.row(site.device_ids[0], to_handle=HANDLE, handle_key=HANDLE)
    with contextlib.closing(site.connect()) as recorder, ThreadPoolExecutor() as threads:
        asked: list[Future[bool]] = []

        def record() -> bool:
            opt_outs.record(site.world.databases.quinn, recorder, HANDLE)
            asked.append(threads.submit(ask_for, site, way, row_id))
            waiting(site, 1)
            recorder.commit()
            return True

        site.acts.note("owner", HANDLE, record)
        assert asked[0].result(10) is False
    assert not ask_for(site, way, row_id)
    assert site.violations({}) == []
    assert site.world.row_columns(row_id, "collected_at") is None


@pytest.mark.parametrize("way", ["collect", "poll"])
@pytest.mark.parametrize("is_collect_first", [True, False])
def test_who_is_first_at_the_row_decides(site: Site, way: str, is_collect_first: bool) -> None:
    """A rival holds the row. A collect that is first gets it, and the response to the opt-out comes after it."""
    row_id = site.world.row(site.device_ids[0], to_handle=HANDLE, handle_key=HANDLE)
    with contextlib.closing(site.connect()) as rival, ThreadPoolExecutor() as threads:
        db.query(rival, "SELECT id FROM icloud.send_queue FOR UPDATE")
        asked: dict[bool, Future[bool]] = {}
        for number, is_collect in enumerate((is_collect_first, not is_collect_first), start=1):
            if is_collect:
                asked[True] = threads.submit(ask_for, site, way, row_id)
            else:
                asked[False] = threads.submit(site.reply, site.devices[1], HANDLE, "STOP", minute(1))
            # A poll that begins after the opt-out was recorded does not want the row, and does not wait.
            waiting(site, 1 if number == 2 and is_collect and way == "poll" else number)
        rival.commit()
        assert asked[False].result(10)
        assert asked[True].result(10) is is_collect_first
    assert site.violations({}) == []
    assert opt_out_check.meanwhile(site.acts.all, opt_out_check.collects(site.changes())) == is_collect_first


def test_rows_expire_after_the_opt_out_is_committed_not_before(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row comes between the two statements, and a collect that has looked waits at it: the response waits as well."""
    asked: list[Future[bool]] = []
    with contextlib.closing(site.connect()) as rival, ThreadPoolExecutor() as threads:
        insert = opt_outs._query_again

        def meanwhile(*arguments: Any) -> list[db.Row]:
            row_id = site.world.row(site.device_ids[0], to_handle=HANDLE, handle_key=HANDLE)
            db.query(rival, "SELECT id FROM icloud.send_queue FOR UPDATE")
            asked.append(threads.submit(ask_for, site, "collect", row_id))
            waiting(site, 1)
            return insert(*arguments)

        def record() -> bool:
            return opt_outs.record(site.world.databases.quinn, site.world.databases.icloud, HANDLE).is_new

        monkeypatch.setattr(opt_outs, "_query_again", meanwhile)
        recorded = threads.submit(site.acts.note, "owner", HANDLE, record)
        wait_until(lambda: recorded.done() or len(run_sql(site.world.databases.icloud_url, LOCK_WAITS)) == 2)
        rival.rollback()
        assert recorded.result(10)
        asked[0].result(10)
    assert site.violations({}) == []
