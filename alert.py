"""Call for help: read the report, and send one message when something begins to need a person, and one when it ends.

Run once a minute by systemd (systemd/outreach-alert.timer), also while the dispatcher or a database does not run. Reads
what report.py reads and writes nothing to a database. It keeps in STATE_DIRECTORY/alerts.json which messages it has
sent. It writes the file after it has sent a message: a crash in between repeats the message, and loses none. Example:

    python alert.py --test
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec
import requests

import handles
import opt_outs
import pacing
import quiet_times
import report
import runtime

STATE_FILE = "alerts.json"
HEARTBEAT_TIMEOUT = 10  # seconds
MAX_LISTED = 5  # handles of a message
# How long an opt-out is looked for, and at most how many, so that the state file stays short.
OPT_OUTS_OF, MAX_OPT_OUTS = timedelta(days=7), 1000
HOLD_PATIENCE = timedelta(minutes=10)  # an owner who pauses for a moment needs no message
OUTAGE_PATIENCE = timedelta(minutes=2)  # a restart of a database or of the dispatcher is no outage
# Holds that a condition of a device or of a batch describes.
DESCRIBED_ELSEWHERE = (pacing.DEVICE_PROBLEM, "waiting for device", "batch stopped itself")
OUTAGES = ("database down", "dispatcher not running", "sync job fails", "dispatch job fails", "server unavailable")
HELD, DATABASE_DOWN = "held: ", "held: database down"  # the beginnings of keys
# A full handle, which a message must not contain.
FULL_HANDLE = re.compile(r"\+[0-9][0-9 ().-]{5,}[0-9]|[^\s@]+@[^\s@]+\.[^\s@]+")

logger = logging.getLogger("outreach-alert")


class Condition(msgspec.Struct):
    """Something that needs a person. `advice`: what to do. `patience`: how long it lasts before it is told."""

    key: str
    sentence: str
    patience: timedelta = timedelta(0)
    advice: str = ""


class Known(msgspec.Struct):
    """A condition that an earlier run has seen: since when, and whether a message has told it."""

    since: datetime
    sentence: str
    is_told: bool = False


class State(msgspec.Struct):
    """What the state file keeps.

    `finished`: the batches of the last day whose end was told. `opt_outs`: the replies of the last days that an earlier
    run has looked up; each is told at most once.
    """

    conditions: dict[str, Known] = msgspec.field(default_factory=dict)
    finished: list[str] = msgspec.field(default_factory=list)
    opt_outs: list[str] = msgspec.field(default_factory=list)


class News(NamedTuple):
    """What the next message tells, a line each."""

    begun: list[str]
    ended: list[str]
    finished: list[str]
    opt_outs: list[str]

    def __bool__(self) -> bool:
        return any(self)


# --- what needs a person ------------------------------------------------------------------------------


def conditions(seen: report.Report) -> Iterator[Condition]:
    """Yield what needs a person now: the verdict, each device's problem or silence, each batch that paused itself."""
    verdict = seen.verdict
    if verdict.needs_operator and not (verdict.hold or "").startswith(DESCRIBED_ELSEWHERE):
        is_outage = (verdict.hold or "").startswith(OUTAGES)
        patience = OUTAGE_PATIENCE if is_outage else HOLD_PATIENCE
        yield Condition(f"{HELD}{verdict.hold}", verdict.sentence, patience, verdict.advice or "")
    for line in seen.devices or ():
        device = pacing.Device(*msgspec.structs.astuple(line))
        if device.problem:
            yield Condition(f"problem of device {device.id}", f"{device.complaint}.", OUTAGE_PATIENCE)
        elif device.is_late(seen.now):
            sentence = f"{device.name}, {device.seen(seen.now)}, keeps messages waiting."
            yield Condition(f"silence of device {device.id}", sentence, advice="See that it is on.")
    for batch in seen.stopped_batches or ():
        sentence = f"Batch {batch.id[:8]}… paused itself: {batch.reason}."
        yield Condition(f"stopped batch {batch.id}", sentence)


def read_opt_outs(known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the ids of the latest replies that opted out, and the handles of the new ones that no client has.

    `known`: the ids that an earlier run has looked up. Only new ones are looked up, because that reads all contacts.
    If a database is down, the next run does it.
    """
    found, problem = report.read_database(
        "icloud", lambda icloud: opt_outs.recent_replies(icloud, OPT_OUTS_OF, MAX_OPT_OUTS)
    )
    if found is None or problem:
        return list(known), []
    new = {key for opt_out_id, key in found.items() if opt_out_id not in set(known)}
    if not new:
        return list(found), []
    nobodys, problem = report.read_database("quinn", lambda quinn: opt_outs.of_nobody(quinn, sorted(new)))
    return (list(known), []) if nobodys is None or problem else (list(found), sorted(nobodys))


def compare(state: State, seen: report.Report, replies: tuple[list[str], list[str]]) -> tuple[State, News]:
    """Return the next state, and what has begun, ended or finished since the last one.

    `replies`: what read_opt_outs() returned.
    """
    found = {condition.key: condition for condition in conditions(seen)}
    known = dict(state.conditions)
    begun, ended = [], []
    for key in [key for key in known if key not in found and not _is_hidden(key, seen)]:
        gone = known.pop(key)
        if gone.is_told:
            ended.append(gone.sentence)
    for key, condition in found.items():
        before = known.get(key) or Known(seen.now, condition.sentence)
        is_due = seen.now - before.since >= condition.patience
        if is_due and not before.is_told:
            begun.append(f"{condition.sentence} {condition.advice}".rstrip())
            before = Known(before.since, condition.sentence, is_told=True)
        known[key] = before
    batches = {batch.id: batch for batch in seen.finished_batches or ()}
    finished = [_finish(batch) for name, batch in batches.items() if name not in state.finished]
    told = state.finished if seen.finished_batches is None else list(batches)
    looked_up, of_nobody = replies
    return State(known, told, looked_up), News(begun, ended, finished, _assign(of_nobody))


def _is_hidden(key: str, seen: report.Report) -> bool:
    """Return whether a condition may last although the report does not show it.

    The verdict names one hold, which hides the others. While a database is down, nothing of the rest can be read.
    """
    if key == DATABASE_DOWN:
        return False
    return seen.verdict.state == "down" or (key.startswith(HELD) and seen.verdict.needs_operator)


def _finish(batch: report.FinishedBatch) -> str:
    parts = [f"{batch.failed} message{'' if batch.failed == 1 else 's'} failed"] if batch.failed else []
    parts += [f"{batch.unknown} may have been sent: look at the Mac"] if batch.unknown else []
    return f"Batch {batch.id[:8]}… is finished: {', '.join(parts)}."


def _assign(keys: Sequence[str]) -> list[str]:
    """Return the sentence about opt-outs of handles that no client has; [] for none."""
    if not keys:
        return []
    masked = ", ".join(handles.mask_handle(key) for key in keys[:MAX_LISTED])
    more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
    return [
        f"Opted out, and no client has this number or address: {masked}{more}. Say whose it is: python outreach.py "
        "opt-outs --unassigned, then python outreach.py assign HANDLE CLIENT."
    ]


# --- telling it ---------------------------------------------------------------------------------------


def message(news: News) -> tuple[str, str]:
    """Return a message's title and text, without a full handle."""
    title = (
        "Outreach needs you"
        if news.begun or news.opt_outs
        else "Outreach: finished"
        if news.finished
        else "Outreach: over"
    )
    lines = [*news.begun, *news.opt_outs, *news.finished, *(f"Over: {sentence}" for sentence in news.ended)]
    return title, FULL_HANDLE.sub(lambda handle: handles.mask_handle(handle[0]), "\n".join(lines))


def send(urls: str, title: str, text: str) -> bool:
    """Send a message to every address of ALERT_URLS; return whether all accepted it. Raises runtime.ConfigError."""
    import apprise  # takes a second to load, which the runs without news save

    sender = apprise.Apprise()
    if not sender.add(re.split(r"[\s,]+(?=[a-z0-9+]+://)", urls.strip())):
        raise runtime.ConfigError("ALERT_URLS has an address that apprise cannot read: see docs/operating.md, Alerts")
    return bool(sender.notify(title=title, body=text))


def ping(url: str, is_well: bool) -> bool:
    """Request HEARTBEAT_URL, or its /fail if something needs a person; return whether the monitor accepted it."""
    address = url.rstrip("/") + ("" if is_well else "/fail")
    try:
        response = requests.get(address, timeout=HEARTBEAT_TIMEOUT)
    except requests.RequestException as error:
        logger.error("heartbeat failed error=%s; see HEARTBEAT_URL and this host's network", type(error).__name__)
        return False
    if not response.ok:
        logger.error("heartbeat failed status=%d; see HEARTBEAT_URL", response.status_code)
    return response.ok


# --- the state file -----------------------------------------------------------------------------------


def read_state(path: Path) -> State:
    """Read the state file; an empty state if it does not exist, or is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("state file cannot be read, starting without it file=%s error=%s", path, error)
        return State()


def write_state(path: Path, state: State) -> None:
    """Replace the state file; a crash leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(state))
    os.replace(new, path)


def state_path() -> Path:
    """Return the path of the state file. Raises runtime.ConfigError without a directory for it."""
    directory = os.environ.get("STATE_DIRECTORY")
    if not directory or not Path(directory).is_dir():
        raise runtime.ConfigError(
            "STATE_DIRECTORY names no directory: set it to one for alerts.json, which systemd does"
        )
    return Path(directory) / STATE_FILE


# --- one run ------------------------------------------------------------------------------------------


def run(interval: timedelta, urls: str | None, heartbeat: str | None) -> int:
    """Tell what is new and ping the monitor; return 1 if either failed. The next run then tries again."""
    path = state_path()
    before = read_state(path)
    state, news = compare(before, report.report(interval), read_opt_outs(before.opt_outs))
    is_told = True
    if news and urls:
        is_told = send(urls, *message(news))
        if is_told:
            logger.info("alert sent begun=%d ended=%d finished=%d opt_outs=%d", *map(len, news))
        else:
            logger.error("alert not accepted by every address in ALERT_URLS; the next run tries again")
    if is_told:
        write_state(path, state)
    is_well = not any(known.is_told for known in state.conditions.values())
    is_pinged = ping(heartbeat, is_well) if heartbeat else True
    return 0 if is_told and is_pinged else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Send a message when something begins to need a person, and when it ends. Runs once.",
        epilog="environment: ALERT_URLS (apprise addresses, such as ntfy://TOPIC), HEARTBEAT_URL, STATE_DIRECTORY, "
        "QUINN_DB_URL, QUINN_ICLOUD_DB_URL, DISPATCH_INTERVAL_SECONDS. examples: python alert.py --test; "
        "STATE_DIRECTORY=/var/lib/outreach-alert python alert.py",
    )
    parser.add_argument("--test", action="store_true", help="send a test message to every address, and nothing else")
    arguments = parser.parse_args(argv)
    runtime.load_settings()
    runtime.set_up_logging()
    quiet_times.logger.disabled = True  # the report has its warnings
    urls, heartbeat = os.environ.get("ALERT_URLS") or None, os.environ.get("HEARTBEAT_URL") or None
    if arguments.test:
        if not urls:
            raise runtime.ConfigError("ALERT_URLS is not set: set it to an address, such as ntfy://TOPIC")
        is_sent = send(urls, "Outreach: test", f"A test at {datetime.now(UTC):%H:%M} UTC. Alerts arrive here.")
        sys.stdout.write("sent to every address\n" if is_sent else "an address did not accept it: see above\n")
        return 0 if is_sent else 1
    if not urls and not heartbeat:
        logger.warning("no alert can be sent: set ALERT_URLS or HEARTBEAT_URL; see docs/operating.md, Alerts")
        return 0
    return run(timedelta(seconds=runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30)), urls, heartbeat)


def entry_point() -> None:
    """Run the command `outreach-alert`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
