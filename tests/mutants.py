"""Mutation testing: small damage to the product, one at a time, each of which some test must notice.

Run by `make mutants`. cosmic-ray damages the Python of five modules; STATEMENTS lists the damage to their SQL,
which it does not read. Each mutant is tested in a copy of the tree, over one PostgreSQL for all. Prints every mutant
that no test notices; exits with 1 when one of them is not among the EXPECTED. Example:

    python tests/mutants.py --module db.py --workers 2
"""

import argparse
import contextlib
import difflib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cosmic_ray.mutating
import cosmic_ray.plugins

sys.path.insert(0, str(Path(__file__).parent.parent))

import db

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds for the tests of a mutant; one that takes longer hangs, which is noticed, too
# One replacement for each kind of place; others fail the same tests.
OPERATORS = re.compile(
    "core/(AddNot|RemoveDecorator|NumberReplacer|ZeroIterationForLoop"
    "|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    "|ReplaceBreakWithContinue|ReplaceContinueWithBreak|ReplaceUnaryOperator_Delete_(Not|USub)"
    "|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Add|BitAnd_BitOr)"
    "|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is|In_NotIn|NotIn_In))"
)
LEFT_OUT = shutil.ignore_patterns(".*", "pgdata", "*.egg-info", "__pycache__")

SERVER_TESTS = [
    "tests/test_send_queue_server.py",
    # Its second PostgreSQL and those of the other workers would disturb one another.
    "--deselect=tests/test_send_queue_server.py::"
    "test_postgresql_killed_under_load_is_a_503_until_it_is_back_and_costs_no_message",
    "tests/test_input.py",
    "tests/test_openapi.py",
    "tests/test_systemd.py",
]

# Which tests judge a module.
TESTS = {
    "db.py": ["tests/test_db.py"],
    "send_queue_server.py": SERVER_TESTS,
    "serving.py": ["tests/test_connections.py", *SERVER_TESTS, "tests/test_restart.py"],
    "dispatcher.py": ["tests/test_invariants.py", "tests/test_dispatcher.py", "tests/test_systemd.py"],
    "pacing.py": [
        "tests/test_pacing.py",
        "tests/test_invariants.py",
        "tests/test_dispatcher.py",
        "tests/test_status.py",
    ],
}

# Of each module: what is in a statement once, and what becomes of it.
STATEMENTS: dict[str, list[tuple[str, str]]] = {
    "serving.py": [],
    "db.py": [
        ("indisvalid AND NOT indisprimary", "indisvalid"),
        ("indisvalid AND NOT indisprimary", "NOT indisprimary"),
        ("SELECT pg_try_advisory_lock(hashtext('schema.sql'))", "SELECT true"),
        ('"SET statement_timeout = 0")  # an index', '"SET statement_timeout = 1")  # an index'),
        ("VALUES (%(name)s, %(digest)s)", "VALUES (%(digest)s, %(name)s)"),
        # the devices' commands
        ("FILTER (WHERE message.collected_at IS NULL)", ""),
        ("AND message.status = 'queued'", ""),
        ("         ORDER BY device.created_at, device.id\n", ""),
        ("SET token = %(digest)s WHERE id = %(id)s", "SET token = %(digest)s WHERE id <> %(id)s"),
        (" AND NOT EXISTS (SELECT FROM icloud.devices WHERE name = %(new_name)s)", ""),
        ("DELETE FROM icloud.devices WHERE id = %(id)s", "DELETE FROM icloud.devices"),
        (" OR (status = 'pending' AND claimed_at IS NOT NULL)", ""),
        ("WHERE device_id = %(device_id)s\n           AND (batch_item_id", "WHERE (batch_item_id"),
        (" AND status <> 'queued'))", "))"),
        (" OR id::text = %(name)s", ""),
    ],
    "send_queue_server.py": [
        # pending
        ("SELECT id, last_seen_at FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s)",
         "SELECT id, last_seen_at FROM icloud.devices WHERE token IN (%(plain)s, '')"),
        ("SELECT id, last_seen_at FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s)",
         "SELECT id, last_seen_at FROM icloud.devices WHERE token IN (%(digest)s, '')"),
        ("COALESCE(last_seen_at, '-infinity')", "last_seen_at"),
        ("< now() - %(precision)s::interval", "> now() - %(precision)s::interval"),
        ("< now() - %(precision)s::interval", "< now() + %(precision)s::interval"),
        ("             WHERE device_id = (SELECT id FROM device)\n               AND status = 'queued'\n",
         "             WHERE status = 'queued'\n"),
        ("             WHERE device_id = (SELECT id FROM device)\n               AND status = 'queued'\n",
         "             WHERE device_id = (SELECT id FROM device)\n"),
        ("AND (collected_at IS NOT NULL OR COALESCE(valid_until > now(), true))", ""),
        ("AND (collected_at IS NOT NULL OR COALESCE(valid_until > now(), true))",
         "AND COALESCE(valid_until > now(), true)"),
        ("COALESCE(valid_until > now(), true)", "COALESCE(valid_until > now(), false)"),
        ("COALESCE(valid_until > now(), true)", "COALESCE(valid_until < now(), true)"),
        ("             ORDER BY created_at, id\n             LIMIT 50", "             LIMIT 50"),
        ("             ORDER BY created_at, id\n             LIMIT 50", "             ORDER BY created_at, id"),
        ("LIMIT 50", "LIMIT 51"),
        ("SET collected_at = now(), updated_at = now()", "SET updated_at = now()"),
        ("WHERE id = ANY (ARRAY(SELECT id FROM page WHERE collected_at IS NULL))\n"
         "               AND status = 'queued' AND collected_at IS NULL",
         "WHERE id = ANY (ARRAY(SELECT id FROM page WHERE collected_at IS NULL))"),
        ("ON collected_at IS NOT NULL OR page.id IN (SELECT id FROM collected)", "ON true"),
        ("ON collected_at IS NOT NULL OR page.id IN (SELECT id FROM collected)", "ON collected_at IS NOT NULL"),
        ("         ORDER BY created_at, page.id\n", ""),
        # result
        ("SELECT id FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s)",
         "SELECT id FROM icloud.devices WHERE token IN (%(plain)s, '')"),
        ("SELECT id FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s)",
         "SELECT id FROM icloud.devices WHERE token IN (%(digest)s, '')"),
        ("WHERE id = %(id)s AND device_id = (SELECT id FROM device)", "WHERE id = %(id)s"),
        ("               FOR UPDATE\n", ""),
        ("(SELECT id FROM target WHERE status = 'queued')", "(SELECT id FROM target)"),
        ("CASE WHEN %(status)s = 'sent' THEN now() END", "now()"),
        ("                   failure_reason = %(reason)s,\n", ""),
        # enqueue
        ("to_timestamp(%(valid_until)s)", "to_timestamp(%(valid_until)s) + interval '1 hour'"),
        ("          FROM icloud.devices\n         WHERE id = %(device_id)s\n", "          FROM icloud.devices\n"),
        ("xmax = 0", "xmax <> 0"),
        ("(device_id, to_handle, body) = (%(device_id)s, %(to_handle)s, %(body)s)",
         "(to_handle, body) = (%(to_handle)s, %(body)s)"),
        ("(device_id, to_handle, body) = (%(device_id)s, %(to_handle)s, %(body)s)",
         "(device_id, body) = (%(device_id)s, %(body)s)"),
        ("(device_id, to_handle, body) = (%(device_id)s, %(to_handle)s, %(body)s)",
         "(device_id, to_handle) = (%(device_id)s, %(to_handle)s)"),
        # status
        ("WHERE status = 'failed' AND withdrawn_at IS NULL", "WHERE status = 'failed'"),
        ("interval '1 hour'", "interval '1 day'"),
        ("FILTER (WHERE message.collected_at IS NULL)", ""),
        ("FILTER (WHERE message.collected_at IS NOT NULL)", ""),
        (" AND message.status = 'queued'", ""),
        ("min(message.created_at)", "max(message.created_at)"),
        ("         ORDER BY device.created_at, device.id\n", ""),
        ("LEFT JOIN icloud.devices AS device", "JOIN icloud.devices AS device"),
    ],
    "dispatcher.py": [
        ("SET last_synced_at = now()", "SET last_synced_at = last_synced_at"),
        # withdraw
        ("COALESCE(valid_until <= now(), false)", "COALESCE(valid_until <= now(), true)"),
        ("COALESCE(valid_until <= now(), false)", "COALESCE(valid_until >= now(), false)"),
        ("batch.status = 'sending' AND NOT batch.dry_run AND item.status IN ('pending', 'queued')",
         "NOT batch.dry_run AND item.status IN ('pending', 'queued')"),
        ("batch.status = 'sending' AND NOT batch.dry_run AND item.status IN ('pending', 'queued')",
         "batch.status = 'sending' AND item.status IN ('pending', 'queued')"),
        ("batch.status = 'sending' AND NOT batch.dry_run AND item.status IN ('pending', 'queued')",
         "batch.status = 'sending' AND NOT batch.dry_run"),
        ("SET status = 'failed', withdrawn_at = now(), updated_at", "SET status = 'failed', updated_at"),
        ("         WHERE id = ANY (%(ids)s::uuid[]) AND status = 'queued' AND collected_at IS NULL\n",
         "         WHERE id = ANY (%(ids)s::uuid[]) AND status = 'queued'\n"),
        # results
        ("FROM outreach_batch_items WHERE status = 'queued'\"", "FROM outreach_batch_items WHERE status <> 'pending'\""),
        ("COALESCE(sent_at, updated_at)", "updated_at"),
        ("failure_reason, withdrawn_at IS NOT NULL\n          FROM icloud.send_queue\n",
         "failure_reason, withdrawn_at IS NULL\n          FROM icloud.send_queue\n"),
        # adoptions
        ("AND status <> 'failed'\n", "AND status = 'queued'\n"),
        ("AND status <> 'failed'\n", "AND status = 'sent'\n"),
        ("AND status = 'failed'\n               ) AS message", "AND false\n               ) AS message"),
        ("         ORDER BY created_at\n    \"\"\"\n", "         ORDER BY created_at DESC\n    \"\"\"\n"),
        # write_back
        ("               send_queue_id = ended.queue_id,\n", ""),
        ("COALESCE(ended.device_id, CASE WHEN ended.status = 'failed' THEN item.device_id END)", "ended.device_id"),
        ("COALESCE(item.queued_at, item.claimed_at)", "item.queued_at"),
        ("CASE WHEN ended.status <> 'pending' THEN COALESCE(item.queued_at, item.claimed_at) END", "item.queued_at"),
        ("               failure_reason = ended.reason,\n               claimed_at = NULL,\n",
         "               failure_reason = ended.reason,\n"),
        ("               failure_reason = ended.reason,\n", ""),
        ("           AND (item.status = 'queued' OR (item.status = 'pending' AND item.claimed_at IS NOT NULL))\n", ""),
        ("(item.status = 'queued' OR (item.status = 'pending' AND item.claimed_at IS NOT NULL))",
         "(item.status = 'queued' OR item.status = 'pending')"),
        ("(item.status = 'queued' OR (item.status = 'pending' AND item.claimed_at IS NOT NULL))",
         "item.status = 'queued'"),
        # release
        ("(batch.status <> 'sending' OR batch.dry_run)", "batch.status <> 'sending'"),
        ("(batch.status <> 'sending' OR batch.dry_run)", "batch.dry_run"),
        ("           AND batch.id = item.batch_id AND (batch.status <> 'sending' OR batch.dry_run)\n",
         "           AND batch.id = item.batch_id\n"),
        # skip
        ("WHERE client_id = candidate.client_id AND is_primary)", "WHERE client_id = candidate.client_id)"),
        ("(item.created_at, item.id) < (", "(item.created_at, item.id) <= ("),
        ("COALESCE(reachable.created_at, 'infinity')", "reachable.created_at"),
        ("LEFT JOIN LATERAL", "JOIN LATERAL"),
        ("batch_id = served.batch_id AND status = 'pending'\n                  AND EXISTS",
         "batch_id = served.batch_id\n                  AND EXISTS"),
        ("WHERE item.batch_id = served.batch_id AND item.status = 'pending'", "WHERE item.batch_id = served.batch_id"),
        # claim_heads
        ("SET last_served_at = now() WHERE id = ANY", "SET last_served_at = NULL WHERE id = ANY"),
        ("                ORDER BY created_at, id\n                LIMIT 1\n               ) AS head",
         "                ORDER BY created_at DESC, id\n                LIMIT 1\n               ) AS head"),
        ("WHERE batch_id = served_batch.id AND status = 'pending'", "WHERE batch_id = served_batch.id"),
        # claimed
        ("min(handle)", "max(handle)"),
        ("WHERE client_id = item.client_id AND is_primary)", "WHERE client_id = item.client_id)"),
        ("WHERE client_id = item.client_id AND status = 'sent' AND device_id IS NOT NULL",
         "WHERE client_id = item.client_id AND device_id IS NOT NULL"),
        ("WHERE client_id = item.client_id AND status = 'sent' AND device_id IS NOT NULL", "WHERE device_id IS NOT NULL"),
        ("ORDER BY sent_at DESC", "ORDER BY sent_at"),
        ("           AND batch.status = 'sending' AND NOT batch.dry_run\n", ""),
        ("           AND batch.status = 'sending' AND NOT batch.dry_run\n", "           AND batch.status = 'sending'\n"),
        ("ORDER BY item.claimed_at, item.created_at, item.id", "ORDER BY item.created_at DESC, item.id"),
        # deliver and record
        ("SELECT id FROM icloud.devices ORDER BY created_at, id", "SELECT id FROM icloud.devices ORDER BY created_at DESC"),
        ("SET last_dispatched_at = now()", "SET last_dispatched_at = last_dispatched_at"),
        ("queued_at = now(), claimed_at = NULL, updated_at", "queued_at = now(), updated_at"),
        ("queued_at = now(), claimed_at = NULL, updated_at", "claimed_at = NULL, updated_at"),
        ("         WHERE id = %(id)s AND status = 'pending'\n        RETURNING id",
         "         WHERE id = %(id)s\n        RETURNING id"),
        ("send_queue_id = %(queue_id)s, device_id = %(device_id)s,", "send_queue_id = %(queue_id)s,"),
        # end_item
        ("failure_reason = %(reason)s, claimed_at = NULL,", "failure_reason = %(reason)s,"),
        ("         WHERE id = %(id)s AND status = 'pending'\n    \"\"\"", "         WHERE id = %(id)s\n    \"\"\""),
        # complete
        ("WHERE id = ANY (%(ids)s::uuid[]) AND status = 'sending' AND NOT dry_run",
         "WHERE id = ANY (%(ids)s::uuid[]) AND NOT dry_run"),
        ("           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending')\n", ""),
        ("           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued')\n", ""),
        ("           AND EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id)\n", ""),
        # lock and retry
        ("SELECT pg_try_advisory_lock(hashtext(%(name)s))", "SELECT true, %(name)s"),
        ("CASE WHEN status = 'sent' THEN 'sending' ELSE status END", "'sending'"),
        ("CASE WHEN status = 'sent' THEN 'sending' ELSE status END", "status"),
        ("WHERE batch_id = %(batch_id)s AND status = 'failed'", "WHERE batch_id = %(batch_id)s"),
        ("SET status = 'pending', failure_reason = NULL,", "SET status = 'pending', send_queue_id = NULL, failure_reason = NULL,"),
        ("SET status = 'pending', failure_reason = NULL,", "SET status = 'pending',"),
    ],
    "pacing.py": [
        ("(SELECT count(*) FROM outreach_batch_items WHERE status = 'queued')\n               + ", ""),
        ("               + (SELECT count(*) FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL)", ""),
        ("sent_at > now() - interval '1 day'", "sent_at > now() - interval '1 hour'"),
        ("LIMIT COALESCE(GREATEST(", "LIMIT COALESCE(LEAST("),
        ("                      ORDER BY sent_at DESC\n", "                      ORDER BY sent_at\n"),
        ("(SELECT min(claimed_at)", "(SELECT max(claimed_at)"),
        ("         WHERE status = 'sending' AND NOT dry_run\n", "         WHERE status = 'sending'\n"),
        ("         WHERE status = 'sending' AND NOT dry_run\n", "         WHERE NOT dry_run\n"),
        ("ORDER BY last_served_at NULLS FIRST, created_at, id", "ORDER BY last_served_at, created_at, id"),
        ("ORDER BY last_served_at NULLS FIRST, created_at, id", "ORDER BY created_at, id"),
        ("EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued')\n               OR ", ""),
        ("SELECT max(sent_at) FROM outreach_batch_items", "SELECT min(sent_at) FROM outreach_batch_items"),
        (" AND message.status = 'queued'", ""),
        ("min(message.created_at)", "max(message.created_at)"),
        ("         ORDER BY device.created_at, device.id\n", ""),
    ],
}  # fmt: skip

# The survivors that are no worse than the original, each with the reason.
EXPECTED: dict[str, str] = {
    # db.py
    'db.py: platformdirs.user_runtime_path("python_PostgresServer").mkdir(mode=0o700, parents=False, exist_ok=True)':
        "the directory above it is the login's or the system's, and there",
    'db.py: platformdirs.user_runtime_path("python_PostgresServer").mkdir(mode= 449, parents=True, exist_ok=True)':
        "one more bit of a mode, in a directory that only its owner can enter",
    'db.py: title = "s" + hashlib.sha256(sql.encode()).hexdigest()[: 17]': "a name, whatever its length",
    "db.py: token = secrets.token_urlsafe( 33)": "a longer token",
    "db.py: without  /  / @functools.cache":
        "what is computed anew is the same; the wheel itself knows a server that it has started",
    # send_queue_server.py
    "send_queue_server.py: without ORDER BY created_at, page.id": "`page` has that order, and no plan of a join with it mixes it",
    "serving.py: length = max(request.content_length, 1)": "there is no byte to read without a Content-Length",
    "serving.py: return socket.create_server(address[: 3], family=family)":
        "an address has two parts in IPv4; the third one of IPv6 may be there",
    'send_queue_server.py: threads = runtime.env_int("SEND_QUEUE_THREADS", serving.THREADS, highest= 65)': "a limit is a choice",
    # dispatcher.py
    "dispatcher.py: db.query(quinn, sql, dict(zip(Change._fields, map(list, zip(*changes, strict=False)), strict=True)))":
        "each change has as many fields as the next",
    "dispatcher.py: db.query(quinn, sql, dict(zip(Change._fields, map(list, zip(*changes, strict=True)), strict=False)))":
        "and as many as their names",
    "dispatcher.py: wishes = (item.device_id, pace.settings.device_id, *devices[: 2])": "the first of them is there, and taken",
    "dispatcher.py: for pause in [RETRY_PAUSE] * RETRIES + [ 1]:": "a second more before the third 500 fails its item",
    "dispatcher.py: if time.monotonic() > end or stop.wait( 1.1):": "a second more before the lock is asked for again",
    "dispatcher.py: while not stop.wait(min( 2.0, max(0.05, schedule.idle_seconds() or 0))):":
        "a ping each two seconds, for a watchdog of 120",
    "dispatcher.py: while not stop.wait(min(1.0, max(0.05, schedule.idle_seconds() or 1))):":
        "there are jobs, so there is a time",
    "dispatcher.py: if stop.is_set() or time.monotonic() >= end:": "an instant earlier",
    "dispatcher.py: if time.monotonic() >= end or stop.wait(0.1):": "an instant earlier",
    "dispatcher.py: if (schedule.idle_seconds() or 0) + (max(runs) - min(runs)).total_seconds() >= interval():":
        "a run that is due at this instant",
}  # fmt: skip


class Mutant(NamedTuple):
    """A module with one thing changed. `what`: the operator's name, or `SQL`."""

    module: str
    what: str
    source: str

    def changes(self, original: str) -> list[str]:
        """The lines that differ, with `-` and `+` in front."""
        lines = difflib.unified_diff(original.splitlines(), self.source.splitlines(), lineterm="", n=0)
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]

    def key(self, original: str) -> str:
        """What EXPECTED calls it: the module, and the changed lines as they have become, or `without` the lost ones."""
        changes = self.changes(original)
        added = [line[1:].strip() for line in changes if line[0] == "+"]
        lost = [line[1:].strip() for line in changes if line[0] == "-"]
        return f"{self.module}: {' / '.join(added) or 'without ' + ' / '.join(lost)}"


def of_python(module: str, source: str) -> Iterator[Mutant]:
    """cosmic-ray's mutants, each text once; none of pacing.py, of which only the SQL is judged here."""
    if module == "pacing.py":
        return
    seen = {source}
    for name in filter(OPERATORS.fullmatch, cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)()
        occurrence = 0
        while changed := cosmic_ray.mutating.mutate_code(source, operator, occurrence):
            # Of the two that a number gets, one more and one less, the first is enough.
            occurrence += 2 if name.endswith("NumberReplacer") else 1
            mutant = Mutant(module, name.removeprefix("core/"), changed)
            # The figure of a limit is a choice. What becomes of it is code, and has mutants of its own.
            is_choice = name.endswith("NumberReplacer") and re.match(r"\+[A-Z_]+ = ", mutant.changes(source)[-1])
            if changed not in seen and not is_choice:
                seen.add(changed)
                yield mutant


def of_sql(module: str, source: str) -> Iterator[Mutant]:
    """Those of STATEMENTS. Raises ValueError where the text to change is not there exactly once."""
    for old, new in STATEMENTS[module]:
        if source.count(old) != 1:
            raise ValueError(f"{module} has not once but {source.count(old)} times: {old}")
        yield Mutant(module, "SQL", source.replace(old, new))


class Bench:
    """A copy of the tree in which one mutant after another is tested."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.tree = directory / "tree"
        self.scratch = directory / "scratch"
        self.environment = {**os.environ, "TEST_DATABASE_URL": database_url, "PYTHONDONTWRITEBYTECODE": "1"}
        shutil.copytree(ROOT, self.tree, ignore=LEFT_OUT)

    def notices(self, mutant: Mutant) -> bool:
        """Whether a test fails over the mutant, or hangs."""
        file = self.tree / mutant.module
        original = file.read_text()
        file.write_text(mutant.source)
        try:
            return self._tests_fail(mutant.module)
        finally:
            file.write_text(original)

    def _tests_fail(self, module: str) -> bool:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider"]
        command += [f"--basetemp={self.scratch}", *TESTS[module]]
        with subprocess.Popen(
            command, cwd=self.tree, env=self.environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as tests:  # fmt: skip
            try:
                status = tests.wait(LIMIT)
            except subprocess.TimeoutExpired:
                status = -1
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tests.pid, signal.SIGKILL)  # also what the tests have left behind
        if status not in (-1, 0, 1, 2, 4):  # hung, all passed, some failed, a module could not be imported (2 and 4)
            raise RuntimeError(f"pytest ended with {status} in {self.tree}")
        return status != 0


def test(mutants: list[Mutant], sources: dict[str, str], workers: int, directory: Path) -> list[Mutant]:
    """The mutants that no test notices. Raises RuntimeError when the tests fail without one."""
    url = db.embedded(directory / "postgres")
    with contextlib.closing(db.connect(url)) as server:
        db.query(server, "ALTER SYSTEM SET fsync = off")
        db.query(server, "SELECT pg_reload_conf()")
    todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    survivors: list[Mutant] = []
    problems: list[Exception] = []

    def work(number: int) -> None:
        try:
            bench = Bench(directory / f"worker-{number}", url)
            # All workers at once, each with the tests of one module: as it will be.
            module = list(sources)[number % len(sources)]
            if bench.notices(Mutant(module, "none", sources[module])):
                raise RuntimeError(f"the tests of {module} fail without any mutant: mend that first")
            while not todo.empty() and not problems:
                mutant = todo.get()
                noticed = bench.notices(mutant)
                if not noticed:
                    survivors.append(mutant)
                left = todo.qsize()
                print(f"{left:4} left  {'noticed' if noticed else 'SURVIVED'}  {mutant.key(sources[mutant.module])}",
                      flush=True)  # fmt: skip
        except Exception as problem:  # noqa: BLE001  # shown by the main thread
            problems.append(problem)

    for mutant in mutants:
        todo.put(mutant)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise RuntimeError(str(problems[0]))
    return survivors


def report(mutants: list[Mutant], survivors: list[Mutant], sources: dict[str, str]) -> int:
    """Print what became of the mutants; the exit status."""
    unexpected = 0
    keys = set()
    for mutant in survivors:
        key = mutant.key(sources[mutant.module])
        keys.add(key)
        if key not in EXPECTED:
            unexpected += 1
            print(f"\nno test notices {mutant.what} in {mutant.module}:")
            print("\n".join(mutant.changes(sources[mutant.module])))
    made = Counter(mutant.module for mutant in mutants)
    lived = Counter(mutant.module for mutant in survivors)
    for module, count in made.items():
        print(f"{module}: {count} mutants, {count - lived[module]} noticed, {lived[module]} not")
    for key in EXPECTED:
        if key not in keys and key.partition(":")[0] in made:
            print(f"no longer a survivor, take it off the list: {key}")
    return 1 if unexpected else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Damage the product in small ways, and see that a test notices each.",
        epilog="examples: python tests/mutants.py; python tests/mutants.py --module db.py --only SQL",
    )
    parser.add_argument("--module", choices=list(TESTS), action="append", help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="just the mutants whose operator's name has TEXT")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    arguments = parser.parse_args()
    sources = {module: (ROOT / module).read_text() for module in arguments.module or TESTS}
    mutants = [
        mutant
        for module, source in sources.items()
        for mutant in (*of_sql(module, source), *of_python(module, source))
        if arguments.only in mutant.what
    ]
    print(f"{len(mutants)} mutants, {arguments.workers} workers", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        survivors = test(mutants, sources, arguments.workers, Path(directory))
    status = report(mutants, survivors, sources)
    print(f"{(time.monotonic() - start) / 60:.0f} min")
    return status


if __name__ == "__main__":
    sys.exit(main())
