"""Fill the databases of a test of the owner's page: batches in each state, people, failures, opt-outs; hostile texts.

Used by the tests of the page. Example:

    shop = PageWorld(world); shop.fill(); open_page(f"/batch/{shop.sending}")
"""

import uuid
from typing import Any

from testing import TestData, numbers

SCRIPT = "<script>window.hacked = 1</script>"
IMAGE = '<img src=x onerror="window.hacked = 1">'
TURNED = "\u202eretrograde\u2066 name\u200f"
LONG = "x" * 10_000
HOSTILE = [SCRIPT, IMAGE, TURNED, LONG, "\x1b[31mred\x07", '"><b id=hacked>', "{{ 7 * 7 }}", "javascript:alert(1)"]
TEXT = "Hi Jane, this is Ana from Blue Salon. From March on we open at 8. Reply STOP to opt out."


class PageWorld:
    """One Mac, and batches that are being sent, paused, drafted, finished."""

    def __init__(self, world: TestData) -> None:
        self.world = world
        self.device = world.device("Mac mini")
        world.icloud("UPDATE icloud.devices SET last_seen_at = now(), version = '1.0'")
        self.is_alive()
        world.settings(max_per_minute=2, max_per_hour=30, max_per_day=150)

    def is_alive(self) -> None:
        """Let the dispatcher have run a moment ago."""
        for column in ("last_tick_at", "last_synced_at", "last_dispatched_at"):
            self.world.quinn(f"UPDATE outreach_settings SET {column} = now()")

    def client(self, name: str, handle: str | None = None) -> str:
        client_id = self.world.client(handle or f"+44770090{next(numbers) % 10_000:04}")
        self.world.quinn("UPDATE clients SET name = %(name)s WHERE id = %(id)s", name=name, id=client_id)
        return client_id

    def batch(self, names: list[str], **columns: Any) -> str:
        approved = {"digest": uuid.uuid4().hex * 2, "approved_at": "now"}
        return self.world.batch([self.client(name) for name in names], **(approved | columns))

    def items(self, batch_id: str) -> list[str]:
        sql = "SELECT id FROM outreach_batch_items WHERE batch_id = %(id)s ORDER BY created_at, id"
        return [item_id for (item_id,) in self.world.quinn(sql, id=batch_id)]

    def set_item(self, item_id: str, assignments: str, **values: Any) -> None:
        self.world.quinn(f"UPDATE outreach_batch_items SET {assignments} WHERE id = %(id)s", id=item_id, **values)

    def sent(self, item_id: str, body: str = TEXT, minutes: int = 5) -> None:
        self.set_item(
            item_id,
            "status = 'sent', sent_at = now() - %(minutes)s * interval '1 minute', rendered_body = %(body)s",
            minutes=minutes,
            body=body,
        )

    def failed(self, item_id: str, reason: str = "Not delivered: the number has no iMessage") -> None:
        self.set_item(item_id, "status = 'failed', failure_reason = %(reason)s", reason=reason)

    def unknown(self, item_id: str, reason: str = "the Mac could not tell") -> None:
        """It may have been sent, and no Mac watches it any more."""
        self.set_item(
            item_id,
            "status = 'failed', failure_reason = %(reason)s, outcome_unknown_at = now() - interval '9 days'",
            reason=reason,
        )

    def reply(self, handle_key: str, word: str = "STOP") -> None:
        """Let a Mac have reported an opt-out."""
        sql = """
            INSERT INTO icloud.opt_outs (handle_key, word, source, device_id, received_at)
            VALUES (%(key)s, %(word)s, 'reply', %(device)s, now())
        """
        self.world.icloud(sql, key=handle_key, word=word, device=self.device)

    def status(self, batch_id: str) -> str:
        return str(self.world.quinn("SELECT status FROM outreach_batches WHERE id = %(id)s", id=batch_id)[0][0])

    def fill(self) -> None:
        """Make what each page shows in its richest form."""
        people = [*(f"Person {number}" for number in range(8))]
        self.jane = self.client("Jane Doe", "+447700900111")
        self.sending = self.batch(people, name="Spring opening hours", template="Hi {{ client.name }}!")
        items = self.items(self.sending)
        self.sent(items[0])
        self.failed(items[1])
        self.unknown(items[2])
        self.set_item(items[3], "status = 'skipped', failure_reason = 'opted out'")
        self.paused = self.batch(
            people[:3], name="Your next appointment", status="paused", pause_reason="the last 5 messages failed"
        )
        self.draft = self.batch(people[:2], name="Thank you", status="draft", approved_at=None)
        self.finished = self.batch(people[:2], name="Old news", status="sent")
        for item in self.items(self.finished):
            self.sent(item, minutes=60 * 24 * 3)
        self.reply("jane@example.com")
        self.reply("+447700900111")

    def fill_hostile(self) -> None:
        """Make people, texts, reasons, names and words that attack the page."""
        self.world.icloud("UPDATE icloud.devices SET name = %(name)s, problem = %(name)s", name=f"{SCRIPT}{TURNED}")
        self.jane = self.client(f"{SCRIPT}{TURNED}", "+447700900111")
        self.sending = self.batch(HOSTILE, name=f"{IMAGE}{TURNED}{LONG}", template=f"{SCRIPT}{TURNED}{LONG}")
        items = self.items(self.sending)
        for item, text in zip(items, HOSTILE, strict=True):
            self.sent(item, text)
        for item, text in zip(items[:3], (SCRIPT, TURNED, LONG), strict=True):
            self.failed(item, text)
        self.unknown(items[4], IMAGE)
        self.paused = self.batch(HOSTILE[:3], name=SCRIPT, status="paused", pause_reason=f"{SCRIPT}{TURNED}")
        self.draft = self.batch(HOSTILE[:3], name=TURNED, status="draft", approved_at=None)
        self.finished = self.batch(HOSTILE[:2], name=LONG, status="sent")
        for item in self.items(self.finished):
            self.failed(item, IMAGE)
        for number, word in enumerate((SCRIPT, TURNED, IMAGE)):
            self.reply(f"{number}@example.com", word)
        self.reply("+447700900111", SCRIPT)

    def pages(self) -> list[str]:
        """Return the address of each page."""
        batches = [f"/batch/{each}" for each in (self.sending, self.paused, self.draft, self.finished)]
        person = f"/people/{self.jane}"
        return [
            "/", "/batch", *batches, f"/batch/{self.sending}?show=all", "/people", person, f"{person}/stored",
            "/people/opt-outs", "/settings", "/nowhere",
        ]  # fmt: skip
