"""Render the owner's page: the templates and static files of pages/, and how values are written in them.

Used by page.py; touches no table. Each text that a template writes is escaped, and loses its control characters and
bidi overrides: a name could otherwise turn the line around. Filters: `number`, `short`, `typed` (see below),
`as_json`.
Example:

    page_templates.render("error.html", sentence="There is no such page.")
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

FOLDER = Path(__file__).with_name("pages")
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
SHORT = 80  # characters of a text in a list
# Control characters but tab and line feed; what turns the direction of a line; line and paragraph separators.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Static(NamedTuple):
    """A file that the browser may keep: its path contains a digest of its content."""

    path: str
    content: bytes
    type: str


def plain(text: str) -> str:
    """Replace what is not to be seen, or turns a line around, by U+FFFD. `\\r\\n` is one line end."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _finalize(value: Any) -> Any:
    """Return what a template's expression writes: a plain text; nothing for None."""
    if value is None:
        return ""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def short(value: object, length: int = SHORT) -> str:
    """Return a text on one line, and cut."""
    line = " ".join(plain(str(value)).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def number(value: int) -> str:
    return f"{value:,}"


def typed(value: object) -> Markup:
    """Return what the owner typed, for a form: escaped, and otherwise as it is, so that nothing of it is lost."""
    return escape("" if value is None else str(value).encode(errors="replace").decode())


def count(value: int, one: str, many: str | None = None) -> str:
    """Return `1 message`, `2 messages`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def _read_static() -> dict[str, Static]:
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            found[path.name] = Static(f"/static/{digest}/{path.name}", content, TYPES[path.suffix])
    return found


STATIC = _read_static()


def _static(name: str) -> str:
    """Return the path of a static file, for a template."""
    return STATIC[name].path


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {"number": number, "short": short, "typed": typed, "as_json": json.dumps}
    made.globals |= {"static": _static, "count": count}
    return made


ENVIRONMENT = _environment()


def render(template: str, **values: object) -> str:
    """Return a page of pages/. A value that a template names and that is missing is an error."""
    return ENVIRONMENT.get_template(template).render(values)
