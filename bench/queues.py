"""Measure two other queues on PostgreSQL, without HTTP.

Used by message_rows.py. Each function needs its own database, and installs the queue's tables at first use.
Example:

    rate = asyncio.run(pgqueuer(url, count=500))
"""

import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta

import msgspec

HANDLE, BODY = "+14155550123", "Hello, are you free on Friday?"


async def timed(count: int, step: Callable[[], Awaitable[None]]) -> float:
    """Return the steps per second, one after another."""
    for _ in range(10):  # the first ones prepare statements
        await step()
    start = time.perf_counter()
    for _ in range(count):
        await step()
    return count / (time.perf_counter() - start)


async def procrastinate(url: str, count: int) -> float:
    """Return the messages per second through procrastinate: defer, fetch, finish."""
    import procrastinate as library
    from procrastinate.jobs import Status

    app = library.App(connector=library.PsycopgConnector(conninfo=url, min_size=1, max_size=1))
    # The task never runs: step() fetches its jobs and finishes them.
    send = app.task(name="send", queue="outbox")(lambda to_handle, body: None)
    async with app.open_async():
        manager = app.job_manager
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        worker = await manager.register_worker()

        async def step() -> None:
            await send.defer_async(to_handle=HANDLE, body=BODY)
            job = await manager.fetch_job(["outbox"], worker)
            if job is None:
                raise RuntimeError("procrastinate had no job")
            await manager.finish_job(job, Status.SUCCEEDED, delete_job=False)

        return await timed(count, step)


async def pgqueuer(url: str, count: int) -> float:
    """Return the messages per second through pgqueuer: enqueue, dequeue, log as done."""
    import asyncpg
    from pgqueuer.queries import EntrypointExecutionParameter, Queries

    conn = await asyncpg.connect(url)
    try:
        queries = Queries.from_asyncpg_connection(conn)
        if not await queries.schema_is_installed():
            await queries.install()
        manager = uuid.uuid4()
        entrypoints = {"send": EntrypointExecutionParameter(0)}
        payload = msgspec.json.encode({"toHandle": HANDLE, "body": BODY})

        async def step() -> None:
            await queries.enqueue("send", payload)
            [job] = await queries.dequeue(1, entrypoints, manager, None, timedelta(seconds=30))
            await queries.log_jobs([(job, "successful", None)])

        return await timed(count, step)
    finally:
        await conn.close()
