"""Show why nothing is being sent: a summary, then the batches with their finish, the limits and the devices.

Run by an operator, or by a monitor (--json). Needs only the URLs of the two databases; reports a database that is
unavailable. Formats the data of report.py and forecast.py; writes nothing. Example:

    python status.py --watch
"""

import argparse
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import forecast
import pacing
import quiet_times
import report
import runtime

WATCH_PAUSE = 2  # seconds between two updates of --watch
MAX_ROWS = 20  # batches, and devices, that fit on a screen; --json has all
PLAIN_WIDTH = 1000  # columns, if the output is not a terminal: wide enough to cut and wrap no line
WIDE = 118  # columns; a batch's whole id fits
NUMBERS = {"pending", "queued", "sent", "failed", "skipped", "used", "of", "waiting", "collected", "times", "done"}


# --- the report on the screen -------------------------------------------------------------------------


def screen(seen: report.Report, console: Console) -> RenderableType:
    """Format the report for a terminal, or in plain lines if the output is not a terminal."""
    formatter = report.LocalTimeFormatter(seen.now, seen.zone)
    verdict = seen.verdict
    colour = "red" if verdict.needs_operator else "yellow" if verdict.state == "held" else "green"
    parts: list[RenderableType] = [Text(printable(verdict.sentence), style=f"bold {colour}")]
    parts += [Text(verdict.advice)] if verdict.advice else []
    parts += [Text(f"Warning: {printable(warning)}.", style="red") for warning in seen.warnings]
    for each in (batches_table(seen, formatter, console), limits_table(seen, formatter), devices_table(seen),
                 failures_table(seen, formatter)):  # fmt: skip
        parts += [Text(), each] if each else []
    return Group(*parts, Text(), Text(footer(seen, formatter), style="dim"))


def printable(text: str) -> str:
    """Replace control characters: a failure reason or a name could otherwise move the terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def table(*columns: str, title: str) -> Table:
    """Return an empty table: numbers are aligned right, other columns left."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), show_edge=False)
    made.add_column(title, no_wrap=True, header_style="bold")
    for column in columns:
        is_number = column in NUMBERS
        made.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    return made


def batches_table(seen: report.Report, formatter: report.LocalTimeFormatter, console: Console) -> Table | None:
    if not seen.batches:
        return None
    bars = ["", "done"] if console.is_terminal else ["done"]
    made = table(*bars, "pending", "queued", "sent", "failed", "skipped", "finish", "now", title="Batches")
    for batch in seen.batches[:MAX_ROWS]:
        total = batch.pending + batch.queued + batch.sent + batch.failed + batch.skipped
        ended = total - batch.pending - batch.queued
        bar: list[RenderableType] = [ProgressBar(max(total, 1), ended, width=12)] if console.is_terminal else []
        finish = formatter.at(batch.finish) if batch.finish else "no time known" if batch.pending else ""
        finish += f", {batch.late} too late" if batch.late else ""
        made.add_row(
            batch.id if console.width >= WIDE else batch.id[:8], *bar, f"{ended * 100 // total if total else 0} %",
            str(batch.pending), str(batch.queued), str(batch.sent), str(batch.failed), str(batch.skipped),
            finish if batch.finish_is_exact or not batch.finish else f"about {finish}",
            batch.hold or ("is served next" if batch.id == seen.verdict.batch_id else ""),
        )  # fmt: skip
    if len(seen.batches) > MAX_ROWS:
        made.add_row(f"and {len(seen.batches) - MAX_ROWS} more")
    return made


def limits_table(seen: report.Report, formatter: report.LocalTimeFormatter) -> Table | None:
    made = table("used", "of", "next place", title="Limits")
    for limit in seen.limits or ():
        frees = (
            formatter.at(limit.frees_at) if limit.frees_at else "" if limit.used < limit.maximum else "no time known"
        )
        made.add_row(limit.limit, str(limit.used), str(limit.maximum), frees)
    return made if made.row_count else None


def devices_table(seen: report.Report) -> Table | None:
    made = table("last seen", "waiting", "collected", "oldest", title="Devices")
    for device in (seen.devices or ())[:MAX_ROWS]:
        last_seen = f"{pacing.format_duration(seen.now - device.last_seen_at)} ago" if device.last_seen_at else "never"
        oldest = f"{pacing.format_duration(seen.now - device.oldest_at)}" if device.oldest_at else ""
        made.add_row(Text(printable(device.name)), last_seen, str(device.waiting), str(device.collected), oldest)
    return made if made.row_count else None


def failures_table(seen: report.Report, formatter: report.LocalTimeFormatter) -> Table | None:
    made = table("times", "last", title="Failures of the last 7 days")
    for failure in seen.failures or ():
        reason = Text(printable(failure.reason), overflow="ellipsis")
        made.add_row(reason, str(failure.count), formatter.at(failure.last_at))
    return made if made.row_count else None


def footer(seen: report.Report, formatter: report.LocalTimeFormatter) -> str:
    """Return the time, the last tick, the items in flight, and the number of batches in each idle status."""
    parts = [f"{seen.now.astimezone(formatter.zone):%H:%M:%S} {formatter.name}"]
    if seen.last_tick_at:
        parts.append(f"last tick {pacing.format_duration(seen.now - seen.last_tick_at)} ago")
    if seen.in_flight is not None:
        parts.append(f"in flight {seen.in_flight}")
    parts += [f"outcome unknown {seen.unknown_outcomes}"] if seen.unknown_outcomes else []
    parts += [f"batches in status {status}: {count}" for status, count in sorted((seen.idle_batches or {}).items())]
    return " · ".join(parts)


# --- the forecast of one batch on the screen ----------------------------------------------------------


def forecast_screen(found: forecast.BatchForecast, formatter: report.LocalTimeFormatter) -> RenderableType:
    """Format the forecast of one batch."""
    about = "" if found.is_exact else "about "
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_row("would be sent", f"{found.would_send}")
    for what, reasons in (("skipped", found.would_skip), ("failed", found.would_fail)):
        for reason, count in reasons.items():
            made.add_row(f"would be {what}", f"{count}  {reason}")
    if found.pending:
        made.add_row("first message", formatter.at(found.first_at) if found.first_at else "no time known")
        made.add_row("last message", about + formatter.at(found.last_at) if found.last_at else "no time known")
        made.add_row("bottleneck", found.bottleneck or "")
    for code, seconds in found.held_seconds.items():
        made.add_row("held by", f"{code}, {pacing.format_duration(timedelta(seconds=seconds))} in all")
    title = f"Batch {found.batch_id} ({found.status}), {found.pending} items pending. If it were sent from now on:"
    notes = [Text(f"Note: {note}.", style="yellow") for note in found.notes]
    return Group(Text(title, style="bold"), made, *notes, Text("Nothing was written.", style="dim"))


# --- running ------------------------------------------------------------------------------------------


def show(console: Console, interval: timedelta, as_json: bool) -> int:
    """Show the report once; return 1 if something needs the operator."""
    seen = report.report(interval)
    if as_json:
        sys.stdout.write(msgspec.json.encode(seen).decode() + "\n")
    else:
        console.print(screen(seen, console))
    return exit_status(seen)


def exit_status(seen: report.Report) -> int:
    return 1 if seen.verdict.needs_operator or seen.warnings else 0


def watch(console: Console, interval: timedelta) -> int:
    """Show the report every two seconds until Ctrl-C; return the exit status of the last report."""
    seen = report.report(interval)
    try:
        if not console.is_terminal:
            while True:
                console.print(screen(seen, console), "")
                time.sleep(WATCH_PAUSE)
                seen = report.report(interval)
        with Live(screen(seen, console), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_PAUSE)
                seen = report.report(interval)
                live.update(screen(seen, console), refresh=True)
    except KeyboardInterrupt:
        return exit_status(seen)


def show_forecast(console: Console, interval: timedelta, batch_id: str, as_json: bool) -> int:
    """Show what sending this batch would do; return 1 if the batch cannot be read or does not exist."""
    read = report.read_databases(batch_id)
    for problem in read.problems:
        sys.stderr.write(f"status.py: {problem.what}: {problem.remedy}\n")
    outreach = read.outreach
    if outreach is None:
        return 1
    if batch_id not in outreach.counts:
        sys.stderr.write(f"status.py: there is no batch {batch_id}\n")
        return 1
    found = forecast.forecast_batch(outreach, read.queue, interval, batch_id)
    if as_json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        zone = outreach.snapshot.settings.quiet_hours_tz if outreach.snapshot else None
        console.print(forecast_screen(found, report.LocalTimeFormatter(outreach.now, zone)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Show what is being sent, or why nothing is being sent. "
        "Exit status: 0 if sending, held or idle; 1 if something needs the operator.",
        epilog="environment: QUINN_DB_URL, QUINN_ICLOUD_DB_URL, DISPATCH_INTERVAL_SECONDS (the dispatcher's, if it is "
        "not 30), DEFAULT_REGION (the dispatcher's). examples: python status.py; python status.py --watch",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="update every two seconds, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="print one JSON document, for scripts")
    parser.add_argument(
        "--forecast", metavar="BATCH_ID", type=uuid.UUID, help="show what sending this batch would do; writes nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.watch and arguments.forecast:
        parser.error("--forecast cannot be combined with --watch: leave out --watch")
    runtime.load_settings()
    quiet_times.logger.disabled = True  # the report shows its warnings
    interval = timedelta(seconds=runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    if arguments.forecast:
        return show_forecast(console, interval, str(arguments.forecast), arguments.json)
    return watch(console, interval) if arguments.watch else show(console, interval, arguments.json)


def entry_point() -> None:
    """Run the command `send-queue-status`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
