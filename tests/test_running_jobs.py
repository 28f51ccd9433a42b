"""Check how the dispatcher runs its jobs: the loop, the lock, and the report of each error."""

import contextlib
import datetime as clock
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
import schedule
from helpers import ago, logged_problems
from testing import SERVICE_TOKEN, Databases, TestData, wait_until

import batches
import db
import dispatcher


def loop(monkeypatch: pytest.MonkeyPatch, *jobs: dispatcher.Job) -> None:
    """Run the loop with these jobs, a second apart, until a job sets `stop`."""
    monkeypatch.setenv("DISPATCH_INTERVAL_SECONDS", "1")
    monkeypatch.setattr(dispatcher, "build_jobs", lambda _: {f"job {n}": job for n, job in enumerate(jobs)})
    dispatcher.run_forever(SERVICE_TOKEN)


def test_failing_job_stops_no_job(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[str] = []

    def broken(*_: object) -> dispatcher.JobCounts:
        runs.append("broken")
        raise RuntimeError("a bug")

    def well(*_: object) -> dispatcher.JobCounts:
        runs.append("well")
        if len(runs) == 4:
            dispatcher.stop.set()
        return dispatcher.JobCounts()

    loop(monkeypatch, broken, well)
    assert runs == ["broken", "well"] * 2
    assert caplog.text.count("job 0 job failed") == 2


@pytest.mark.parametrize("seconds", [0, 0.3], ids=["between the jobs", "after both"])
def test_jobs_run_on_after_clock_goes_back(world: TestData, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    back = timedelta(0)

    class WallClock(clock.datetime):
        @classmethod
        def now(cls, tz: clock.tzinfo | None = None) -> Any:
            return datetime.now(tz) + back

    runs: list[int] = []

    def job(*_: object) -> dispatcher.JobCounts:
        runs.append(1)
        if len(runs) == 2:
            dispatcher.stop.set()
        return dispatcher.JobCounts()

    def set_back() -> None:
        nonlocal back
        back = timedelta(hours=-1)  # a job planned by the wall clock would now wait an hour

    def last_job(*_: object) -> dispatcher.JobCounts:
        threading.Timer(seconds, set_back).start() if seconds else set_back()
        return dispatcher.JobCounts()

    stand_in = types.SimpleNamespace(**{**vars(clock), "datetime": WallClock})
    monkeypatch.setattr(schedule, "datetime", stand_in)
    thread = threading.Thread(target=loop, args=(monkeypatch, job, last_job))
    thread.start()
    thread.join(5)
    dispatcher.stop.set()
    thread.join()
    assert len(runs) == 2


def test_default_interval_is_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPATCH_INTERVAL_SECONDS", raising=False)
    assert dispatcher.interval() == 30


def test_failed_job_still_writes_heartbeat(world: TestData) -> None:
    def broken(*_: object) -> dispatcher.JobCounts:
        raise RuntimeError("a bug")

    dispatcher.run_job("sync", broken)
    [(ticked, synced)] = world.quinn("SELECT last_tick_at, last_synced_at FROM outreach_settings")
    assert ticked > ago(5)
    assert synced is None


def test_unreachable_database_fails_only_the_job(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUINN_ICLOUD_DB_URL", "postgresql://127.0.0.1:1/away")
    assert dispatcher.run_job("sync", dispatcher.sync) is None
    monkeypatch.setenv("QUINN_ICLOUD_DB_URL", world.databases.icloud_url)
    assert dispatcher.run_job("sync", dispatcher.sync) is not None
    assert [record.levelname for record in logged_problems(caplog)] == ["ERROR"]
    assert "the next run tries again" in caplog.text


def test_timed_out_statement_is_named(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.batch(clients=1)
    monkeypatch.setitem(db.CONNECTION_DEFAULTS, "options", "-c lock_timeout=100ms")
    with contextlib.closing(db.connect(world.databases.quinn_url)) as rival:
        rival.autocommit = False
        db.query(rival, "LOCK TABLE outreach_batches")
        assert dispatcher.run_job("sync", dispatcher.sync) is None
    assert "statement=end_late error=LockNotAvailable" in caplog.text


def test_missing_tables_are_logged_with_migrate(world: TestData, caplog: pytest.LogCaptureFixture) -> None:
    world.quinn("ALTER TABLE outreach_batch_items RENAME TO old_items")
    assert dispatcher.run_job("sync", dispatcher.sync) is None
    assert "db.py migrate" in caplog.text


def test_missing_permission_is_logged_with_grant(databases: Databases, caplog: pytest.LogCaptureFixture) -> None:
    def forbidden(quinn: Any, _: Any) -> dispatcher.JobCounts:
        db.query(quinn, "DO $$ BEGIN RAISE SQLSTATE '42501'; END $$")
        return dispatcher.JobCounts()

    assert dispatcher.run_job("sync", forbidden) is None
    assert "GRANT the tables' owner" in caplog.text


def test_second_dispatcher_lock_waits(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batches, "LOCK_WAIT", 0.2)
    rival = "SELECT pg_advisory_lock(hashtext('outreach-dispatcher'))"
    world.quinn(rival)
    assert dispatcher.run_job("sync", dispatcher.sync) is None
    assert "job skipped: lock held by another dispatcher" in caplog.text
    [(pid,)] = world.quinn("SELECT pg_backend_pid()")
    assert pid in [holder for holder, _ in world.quinn(caplog.messages[0].partition("see ")[2])]
    monkeypatch.setattr(batches, "LOCK_WAIT", 10)
    with ThreadPoolExecutor() as threads:
        patient = threads.submit(dispatcher.run_job, "sync", dispatcher.sync)
        world.quinn(rival.replace("pg_advisory_lock", "pg_advisory_unlock"))
        assert patient.result(10) is not None


def test_stop_during_lock_wait_logs_nothing(world: TestData, caplog: pytest.LogCaptureFixture) -> None:
    world.quinn("SELECT pg_advisory_lock(hashtext('outreach-dispatcher'))")
    waits = "SELECT query LIKE 'SELECT pg_try_advisory_lock%' FROM pg_stat_activity WHERE datname = current_database()"
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(dispatcher.run_job, "sync", dispatcher.sync)
        wait_until(lambda: (True,) in db.query(world.databases.quinn, waits))
        dispatcher.stop.set()
        assert waiting.result(5) is None
    assert not caplog.records
