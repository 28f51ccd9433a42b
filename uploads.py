"""Keep an uploaded CSV file from its plan until it is imported, and who was in it.

Used by the owner's page. Touches outreach_imports and outreach_import_people in quinn, and, through importing.py,
clients and contact_relationships. The page shows the plan, and the file is imported by a later request, which has only
the id. Example:

    upload_id = uploads.add(quinn, b"Name,Phone\\nAna,+14155550123\\n", "people.csv")
    job = uploads.plan(quinn, icloud, upload_id)
    uploads.apply(quinn, upload_id, job, job.plan.digest)

What a crash leads to: the clients, who was in the file, and `applied_at` are one transaction. A second request for the
same file changes nothing, and returns the same.
"""

import contextlib
import hashlib
import io
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

import db
import importing
import spreadsheet
from batches import Refused

KEPT = "1 day"  # an upload that is not imported
MAX_FILE_NAME = 200  # characters
MAX_RAW_ROWS = 100  # rows of the file that are shown beside the plan

Connection = Any  # psycopg2's connection


class Options(msgspec.Struct):
    """Which column is what, by the names in the file; None and () leave it to importing.py."""

    handle: list[str] = []
    name: str | None = None
    ignore: list[str] = []
    encoding: str | None = None


class Upload(NamedTuple):
    """A file that was uploaded. `people`: those of its lines that are not bad, once it is imported."""

    id: str
    file: str
    created_at: datetime
    applied_at: datetime | None
    people: int | None
    options: Options


class Earlier(NamedTuple):
    """An earlier import of the same file, and the batch that was sent to most of its people since."""

    file: str
    applied_at: datetime
    people: int
    batch_id: str | None = None
    batch_name: str | None = None
    sent_at: datetime | None = None
    sent: int = 0


def add(quinn: Connection, content: bytes, file: str) -> str:
    """Keep a file; return its id. The same file again, while it is not imported, is the same upload."""
    delete_old = "DELETE FROM outreach_imports WHERE applied_at IS NULL AND created_at < now() - %(kept)s::interval"
    find = """
        UPDATE outreach_imports SET created_at = now(), file = %(file)s
         WHERE content_hash = %(hash)s AND applied_at IS NULL
        RETURNING id::text
    """
    insert = """
        INSERT INTO outreach_imports (file, content_hash, content) VALUES (%(file)s, %(hash)s, %(content)s)
        RETURNING id::text
    """
    name = db.replace_unstorable(file)[:MAX_FILE_NAME] or "upload.csv"
    values = {"file": name, "hash": hashlib.sha256(content).hexdigest(), "content": content}
    db.query(quinn, delete_old, {"kept": KEPT})
    rows = db.query(quinn, find, values) or db.query(quinn, insert, values)
    return str(rows[0][0])


def find(quinn: Connection, upload_id: str) -> Upload:
    """Return an upload. Raises Refused if it is not there, or no longer."""
    sql = """
        SELECT id::text, file, created_at, applied_at, people, options FROM outreach_imports WHERE id = %(id)s
    """
    rows = db.query(quinn, sql, {"id": upload_id})
    if not rows:
        raise Refused(404, "this file is no longer here: an upload is kept for a day. Choose the file again")
    return _upload(rows[0])


def set_options(quinn: Connection, upload_id: str, options: Options) -> None:
    """Say which column is what."""
    sql = "UPDATE outreach_imports SET options = %(options)s WHERE id = %(id)s AND applied_at IS NULL"
    db.query(quinn, sql, {"id": upload_id, "options": msgspec.json.encode(options).decode()})


def plan(quinn: Connection, icloud: Connection, upload_id: str) -> importing.Job:
    """Return what importing the file would do now. Raises Refused, and ImportRefused."""
    upload = find(quinn, upload_id)
    return importing.plan(quinn, icloud, _read(quinn, upload_id), upload.file, **msgspec.structs.asdict(upload.options))


def apply(quinn: Connection, upload_id: str, job: importing.Job, digest: str) -> importing.Applied:
    """Import the file as its plan said, and keep who was in it. Raises Refused if the plan would now be another one."""
    if job.plan.digest != digest:
        raise Refused(409, "somebody has changed the clients since you saw the plan. This is the new plan")
    return importing.apply(quinn, job, import_id=upload_id)


def _read(quinn: Connection, upload_id: str) -> io.BytesIO:
    """Return the file. Raises Refused if it has been imported."""
    sql = "SELECT content FROM outreach_imports WHERE id = %(id)s AND content IS NOT NULL"
    rows = db.query(quinn, sql, {"id": upload_id})
    if not rows:
        raise Refused(409, "this file has been imported already")
    return io.BytesIO(bytes(rows[0][0]))


@contextlib.contextmanager
def _sheet(quinn: Connection, upload_id: str, encoding: str | None) -> Iterator[spreadsheet.Sheet]:
    with contextlib.closing(spreadsheet.open_sheet(_read(quinn, upload_id), encoding)) as sheet:
        yield sheet


def header(quinn: Connection, upload_id: str, encoding: str | None) -> list[str]:
    """Return the names of the file's columns; [] if it cannot be read."""
    with contextlib.suppress(spreadsheet.Unreadable), _sheet(quinn, upload_id, encoding) as sheet:
        return [name for name in sheet.header if name]
    return []


def read_rows(
    quinn: Connection, upload_id: str, encoding: str | None, lines: Collection[int]
) -> tuple[list[str], dict[int, list[str]]]:
    """Return the file's header, and the cells of the records that begin in these lines, at most MAX_RAW_ROWS."""
    found: dict[int, list[str]] = {}
    wanted = set(sorted(lines)[:MAX_RAW_ROWS])
    if not wanted:
        return [], found
    with _sheet(quinn, upload_id, encoding) as sheet:
        for line in sheet.lines():
            if line.number in wanted:
                found[line.number] = list(line.cells)
            if line.number >= max(wanted):
                break
        return sheet.header, found


def earlier(quinn: Connection, upload_id: str) -> Earlier | None:
    """Return the last import of the same file before this one, and the batch that most of its people got since."""
    same = """
        SELECT before.id, before.file, before.applied_at, before.people
          FROM outreach_imports AS upload
          JOIN outreach_imports AS before USING (content_hash)
         WHERE upload.id = %(id)s AND before.id <> upload.id AND before.applied_at IS NOT NULL
         ORDER BY before.applied_at DESC
         LIMIT 1
    """
    sent = """
        SELECT batch.id::text, batch.name, max(item.sent_at), count(DISTINCT item.client_id)
          FROM outreach_import_people AS person
          JOIN outreach_batch_items AS item ON item.client_id = person.client_id AND item.status = 'sent'
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE person.import_id = %(id)s AND item.sent_at > %(since)s
         GROUP BY batch.id
         ORDER BY 4 DESC, 3 DESC
         LIMIT 1
    """
    rows = db.query(quinn, same, {"id": upload_id})
    if not rows:
        return None
    before, *columns = rows[0]
    found = Earlier(*columns)
    batch = db.query(quinn, sent, {"id": before, "since": found.applied_at})
    return Earlier(*columns, *batch[0]) if batch else found


def recent(quinn: Connection, limit: int = 50) -> list[Upload]:
    """Return the imports, the newest first."""
    sql = """
        SELECT id::text, file, created_at, applied_at, people, options FROM outreach_imports
         WHERE applied_at IS NOT NULL
         ORDER BY applied_at DESC
         LIMIT %(limit)s
    """
    rows = db.query(quinn, sql, {"limit": limit})
    return [_upload(row) for row in rows]


def _upload(row: db.Row) -> Upload:
    upload_id, file, created_at, applied_at, people, options = row
    return Upload(upload_id, file, created_at, applied_at, people, msgspec.convert(options, Options))


def audience(upload_id: str) -> dict[str, Any]:
    """Return the audience of those who were in the file."""
    return {"v": 1, "where": {"all": [{"field": "import.id", "eq": upload_id}]}}
