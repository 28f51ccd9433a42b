"""The page Settings: each setting with its meaning; what is refused gets a sentence, and nothing typed is lost.

Used by outreach_server.py. The fields come from setting_fields.py, which derives them from settings.py, and
settings.change() decides what is possible.
"""

from collections.abc import Mapping

import msgspec
import psycopg2

import db
import page
import setting_fields
import settings

WAS = "was-"  # before a field's name: its value when the page was made


def show(call: page.Call) -> page.Answer:
    """GET settings."""
    current = settings.read(call.quinn)
    return _render(call, {name: setting_fields.as_text(getattr(current, name)) for name in _fields(current)}, current)


def _fields(current: settings.Settings) -> dict[str, setting_fields.Field]:
    return {name: field for name, field in setting_fields.fields().items() if hasattr(current, name)}


def _render(
    call: page.Call,
    values: Mapping[str, str],
    current: settings.Settings,
    status: int = 200,
    errors: Mapping[str, str] | None = None,
) -> page.Answer:
    fields = _fields(current)
    groups: dict[str, list[setting_fields.Field]] = {}
    for field in fields.values():
        groups.setdefault(field.meaning.group, []).append(field)
    return call.render(
        "settings.html",
        status,
        groups=groups,
        values=values,
        was={name: setting_fields.as_text(getattr(current, name)) for name in fields},
        was_prefix=WAS,
        devices=_devices(call),
        errors=errors or {},
    )


def _devices(call: page.Call) -> list[tuple[str, str]]:
    """Return the devices that can be chosen; none while their database is unavailable."""
    try:
        rows = db.query(call.icloud, "SELECT id::text, name FROM icloud.devices ORDER BY created_at, id")
    except psycopg2.Error:
        return []
    return [(device_id, name) for device_id, name in rows]


def change(call: page.Call) -> page.Answer:
    """POST settings: change what differs from what the page showed."""
    current = settings.read(call.quinn)
    fields = _fields(current)
    typed = {name: call.form.text(name) for name in fields}
    before = {name: call.form.text(WAS + name, setting_fields.as_text(getattr(current, name))) for name in fields}
    changed = [name for name in fields if typed[name].strip() != before[name]]
    errors, values = {}, {}
    for name in changed:
        field, now = fields[name], setting_fields.as_text(getattr(current, name))
        try:
            values[field.json_name] = setting_fields.read(field, typed[name])
        except setting_fields.Refused as refused:
            errors[name] = str(refused)
        if now not in (before[name], typed[name].strip()):
            errors[name] = (
                f"{field.meaning.label}: it became “{now or 'nothing'}” meanwhile. Write again what it is to be."
            )
    if not errors and values:
        try:
            current = settings.change(call.quinn, call.icloud, msgspec.convert(values, settings.Changes))
        except settings.SettingsRefused as refused:
            name, sentence = setting_fields.place(str(refused), {name: typed[name] for name in changed})
            errors[name if name in fields else ""] = page.as_sentence(sentence)
        except msgspec.ValidationError as refused:
            name, sentence = setting_fields.place(str(refused), {name: typed[name] for name in changed})
            errors[name if name in fields else ""] = page.as_sentence(sentence)
    if errors:
        return _render(call, typed, current, 400, errors)
    return call.redirect("/settings", _sentence(fields, changed, before, current))


def _sentence(
    fields: Mapping[str, setting_fields.Field],
    changed: list[str],
    before: Mapping[str, str],
    after: settings.Settings,
) -> str:
    """Return what was changed, for the message."""
    if not changed:
        return "Nothing was changed: every value is as before."
    parts = [
        f"{fields[name].meaning.label}: {before[name] or 'nothing'} → "
        f"{setting_fields.as_text(getattr(after, name)) or 'nothing'}"
        for name in changed
    ]
    return f"Saved. {'; '.join(parts)}. The next message already goes by it."


ROUTES = [
    page.Route("GET", "/settings", show),
    page.Route("POST", "/settings", change),
]
