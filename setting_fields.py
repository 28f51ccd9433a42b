"""Describe the settings of sending for a form: label, meaning, kind; read what was typed; place a refusal at its field.

Used by the owner's page. The fields are those of settings.Changes: a new one appears by itself, and MEANINGS has its
words. Touches no table. Example:

    fields = setting_fields.fields(); setting_fields.read(fields["max_per_day"], "150")
"""

import functools
import re
from typing import Any, Literal, NamedTuple

import msgspec

import settings

Kind = Literal["number", "text", "time", "choice", "tick", "device"]
ELSEWHERE = {"paused"}  # has a button of its own


class Refused(ValueError):
    """What was typed cannot be read. The message is a sentence."""


class Meaning(NamedTuple):
    """What a setting is called, and what it does."""

    label: str
    text: str
    group: str


class Field(NamedTuple):
    """A setting in a form. `lowest`, `highest`: of a number. `choices`: the values, with their words.

    `can_be_empty`: nothing is a value, too.
    """

    name: str
    json_name: str
    kind: Kind
    meaning: Meaning
    lowest: int | None
    highest: int | None
    choices: tuple[tuple[str, str], ...]
    can_be_empty: bool


NIGHT, PACE, SAFETY = "When nothing is sent", "How fast", "When sending stops by itself, and what is kept"
# docs/operating.md has the same settings, for who changes them with SQL.
MEANINGS = {
    "quiet_hours_start": Meaning("Quiet from", "Such as 21:00. Empty, here and below: no quiet hours.", NIGHT),
    "quiet_hours_end": Meaning("Quiet until", "On the same day or the next, such as 08:00.", NIGHT),
    "quiet_hours_tz": Meaning("Your time zone", "Such as Europe/Berlin. Empty: the one of the server.", NIGHT),
    "quiet_hours_of": Meaning("Whose hours count", "It is quiet where you are, where the person is, or both.", NIGHT),
    "quiet_days": Meaning("Quiet days", "Nothing is sent on them. Such as sat,sun,2026-12-25.", NIGHT),
    "max_per_minute": Meaning("Messages in a minute", "Empty: no limit. 0: none at all.", PACE),
    "max_per_hour": Meaning("Messages in an hour", "Empty: no limit.", PACE),
    "max_per_day": Meaning("Messages in a day", "In any 24 hours. Empty: no limit.", PACE),
    "min_gap_seconds": Meaning("Seconds between two messages of a batch", "Empty or 0: no gap.", PACE),
    "max_new_contacts_per_hour": Meaning(
        "New people in an hour", "People to whom you never wrote before. Empty: no limit.", PACE
    ),
    "max_new_contacts_per_day": Meaning(
        "New people in a day", "Apple may block an account that writes to many. Empty: no limit.", PACE
    ),
    "max_per_client_per_week": Meaning("Messages to one person in a week", "Of all batches. Empty: no limit.", PACE),
    "device_id": Meaning("Mac for new people", "Who got a message before gets the next one from the same Mac.", PACE),
    "stop_after_failures": Meaning("Failures in a row that pause a batch", "Empty or 0: never.", SAFETY),
    "approval_days": Meaning(
        "Days for which your approval counts", "Then the batch pauses itself. Empty: for ever.", SAFETY
    ),
    "keep_bodies_days": Meaning(
        "Days for which texts are kept", "Then texts and numbers are erased; 8 or more. Empty: for ever.", SAFETY
    ),
}
CHOICES = {"sender": "where I am", "recipient": "where the recipient is", "both": "both"}


@functools.cache
def fields() -> dict[str, Field]:
    """Return the settings that can be changed, by name, in the order of MEANINGS; others follow."""
    info = msgspec.inspect.type_info(settings.Changes)
    assert isinstance(info, msgspec.inspect.StructType)  # noqa: S101  # for the type checker
    found = {field.name: _field(field) for field in info.fields if field.name not in ELSEWHERE}
    names = [name for name in MEANINGS if name in found]
    return {name: found[name] for name in [*names, *(name for name in found if name not in MEANINGS)]}


def _field(field: msgspec.inspect.Field) -> Field:
    types = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
    can_be_empty = any(isinstance(each, msgspec.inspect.NoneType) for each in types)
    words = field.name.replace("_", " ")
    meaning = MEANINGS.get(field.name) or Meaning(words[0].upper() + words[1:], "", SAFETY)
    kind: Kind = "text"
    lowest = highest = None
    choices: tuple[tuple[str, str], ...] = ()
    for each in types:
        if isinstance(each, msgspec.inspect.IntType):
            kind, lowest, highest = "number", each.ge, each.le
        elif isinstance(each, msgspec.inspect.BoolType):
            kind = "tick"
        elif isinstance(each, msgspec.inspect.LiteralType):
            kind, choices = "choice", tuple((str(value), CHOICES.get(str(value), str(value))) for value in each.values)
    if field.name == "device_id":
        kind = "device"
    elif field.name.endswith(("_start", "_end")):
        kind = "time"
    return Field(field.name, field.encode_name, kind, meaning, lowest, highest, choices, can_be_empty)


def as_text(value: object) -> str:
    """Return a setting's value as it stands in the form."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read(field: Field, typed: str) -> Any:
    """Return the value of what was typed. Raises Refused."""
    text = typed.strip()
    if field.kind == "tick":
        return text == "true"
    if not text:
        if not field.can_be_empty:
            raise Refused(f"{field.meaning.label}: this cannot be empty.")
        return None
    if field.kind != "number":
        return text
    lowest, highest = field.lowest or 0, field.highest or 2**31 - 1
    digits = re.sub(r"(?<=[0-9])[ ,.](?=[0-9]{3}\b)", "", text)
    if not re.fullmatch("[0-9]{1,10}", digits) or not lowest <= int(digits) <= highest:
        largest = f" to {highest:,}" if highest < 10**6 else ""
        raise Refused(f"{field.meaning.label}: “{text[:40]}” is no whole number from {lowest}{largest}.")
    return int(digits)


def place(sentence: str, typed: dict[str, str]) -> tuple[str, str]:
    """Return the field that a refusal of settings.change() is about, "" if that is unknown; and the refusal in words.

    `typed`: what was typed in the fields that change.
    """
    known = fields()
    named = [name for name, field in known.items() if re.search(rf"\b({name}|{field.json_name})\b", sentence)]
    quoted = [name for name, text in typed.items() if text and repr(text) in sentence]
    group = [name for name in typed if name.startswith("quiet") and sentence.startswith("quiet")]
    field_name = next(iter([*(name for name in named if name in typed), *quoted, *group, *named]), "")
    return field_name, re.sub(r"\bnull\b", "nothing", in_words(sentence), flags=re.IGNORECASE)


def in_words(sentence: str) -> str:
    """Return a sentence in which each setting is called as in the form."""
    for name, field in fields().items():
        sentence = re.sub(rf"\b({name}|{field.json_name})\b", f"“{field.meaning.label}”", sentence)
    return sentence
