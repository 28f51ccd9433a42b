"""Check the time zones of a person: of area codes that have two, of overlays, and of what names no place."""

import zoneinfo
from datetime import UTC, datetime

import phonenumbers.timezone
import pytest

import zones

SUMMER, WINTER = datetime(2026, 7, 1, tzinfo=UTC), datetime(2026, 1, 15, tzinfo=UTC)
# What each zone's clock shows: the offsets from UTC in hours, in winter and in summer.
CLOCKS = {
    "AST": (-4, -4), "A": (-4, -3), "N": (-3.5, -2.5), "E": (-5, -4), "C": (-6, -5), "M": (-7, -6), "P": (-8, -7),
    "AK": (-9, -8), "HA": (-10, -9), "H": (-10, -10), "MST": (-7, -7), "CST": (-6, -6),
}  # fmt: skip
# The area codes with several zones, and the codes that overlay them. The source is the report of all area codes by the
# North American Numbering Plan Administrator, as of January 5, 2026 (its columns TIME_ZONE and OVERLAY_COMPLEX), which
# is independent of the library. An overlay has the zones of the code that it overlays: the report has one letter for
# 930 and 986.
REPORTED = {
    "208": "M P", "986": "M P", "219": "E C", "270": "E C", "364": "E C", "308": "C M", "423": "E C", "729": "E C",
    "448": "E C", "850": "E C", "458": "M P", "541": "M P", "574": "E C", "605": "C M", "606": "E C", "620": "C M",
    "701": "C M", "775": "P M", "785": "C M", "807": "E C", "812": "E C", "930": "E C", "867": "C M P", "906": "E C",
    "915": "C M", "931": "E C",
}  # fmt: skip
# The report has one letter for these, and the zones' legal borders say more: the Navajo Nation has summer time and the
# rest of Arizona has none, the Aleutian Islands, Labrador, the Magdalen Islands, the east of British Columbia, and
# Lloydminster in Saskatchewan. The source is the tz database: zone.tab and the comments in its file northamerica.
BY_LAW = {
    "928": "M MST", "907": "AK HA", "709": "N A", "879": "N A", "418": "E A", "367": "E A", "581": "E A", "273": "E A",
    "250": "P M", "236": "P M", "257": "P M", "672": "P M", "778": "P M", "306": "CST M", "474": "CST M",
    "639": "CST M",
}  # fmt: skip
# Codes of one zone that are newer than the library's table.
NEW = {
    "357": "P", "457": "C", "465": "E", "471": "C", "483": "C", "565": "E", "679": "E", "761": "E", "837": "P",
}  # fmt: skip
ONE_ZONE = {"212": "E", "415": "P", "604": "P", "808": "H", "787": "AST", "602": "MST", "204": "C", "902": "A"}


@pytest.fixture(autouse=True)
def no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFAULT_REGION", raising=False)


def clocks(names: tuple[str, ...]) -> set[tuple[float, float]]:
    """Return what the clocks of these zones show, in winter and in summer."""
    return {(hours(name, WINTER), hours(name, SUMMER)) for name in names}


def hours(name: str, moment: datetime) -> float:
    offset = moment.astimezone(zoneinfo.ZoneInfo(name)).utcoffset()
    assert offset is not None
    return offset.total_seconds() / 3600


@pytest.mark.parametrize("code", sorted(REPORTED | BY_LAW | NEW | ONE_ZONE))
def test_area_code_has_every_zone_that_its_numbers_may_be_in(code: str) -> None:
    letters = (REPORTED | BY_LAW | NEW | ONE_ZONE)[code]
    assert clocks(zones.time_zones(f"+1{code}2345678")) >= {CLOCKS[letter] for letter in letters.split()}


@pytest.mark.parametrize("code", sorted(NEW | ONE_ZONE))
def test_area_code_of_one_zone_has_no_other(code: str) -> None:
    assert clocks(zones.time_zones(f"+1{code}2345678")) == {CLOCKS[(NEW | ONE_ZONE)[code]]}


def test_the_table_is_about_what_the_library_alone_does_not_know() -> None:
    """If the library learns them all, zones.py can ask it."""

    def known(code: str) -> set[tuple[float, float]]:
        number = phonenumbers.parse(f"+1{code}2345678")
        names = phonenumbers.timezone.time_zones_for_geographical_number(number)
        return clocks(tuple(name for name in names if name != "Etc/Unknown"))

    lacking = [code for code in REPORTED if len(known(code)) < 2]
    assert len(lacking) >= 17


@pytest.mark.parametrize(
    ("handle", "expected"),
    [
        ("+49 170 1234567", ("Europe/Berlin",)),
        ("+49 30 123456", ("Europe/Berlin",)),
        ("+351 291 234 567", ("Europe/Lisbon",)),
        ("+351 296 234 567", ("Atlantic/Azores",)),
        ("+351 912 345 678", ("Atlantic/Azores", "Europe/Lisbon")),
        ("+34 612 345 678", ("Atlantic/Canary", "Europe/Madrid")),
        ("+52 1 646 123 4567", ("America/Tijuana",)),
        ("+65 6123 4567", ("Asia/Singapore",)),
    ],
)
def test_number_elsewhere_has_the_zones_of_its_area_and_a_mobile_number_those_of_its_country(
    handle: str, expected: tuple[str, ...]
) -> None:
    assert zones.time_zones(handle) == expected


@pytest.mark.parametrize(
    ("handle", "some"),
    [
        ("+61 412 345 678", {"Australia/Perth", "Australia/Sydney"}),
        ("+7 912 345 67 89", {"Europe/Moscow", "Asia/Kamchatka"}),
        ("+55 11 91234 5678", {"America/Sao_Paulo", "America/Rio_Branco", "America/Noronha"}),
        ("+62 812 3456 7890", {"Asia/Jakarta", "Asia/Jayapura"}),
        ("+44 56 1234 5678", {"Europe/London"}),  # by internet
        ("+61 551 234 567", {"Australia/Perth", "Australia/Sydney"}),  # in no range that the library knows
    ],
)
def test_mobile_number_of_country_with_several_zones_may_be_in_any_of_them(handle: str, some: set[str]) -> None:
    assert set(zones.time_zones(handle)) >= some


@pytest.mark.parametrize(
    "handle",
    [
        "+1 800 234 5678", "+1 888 234 5678", "+1 833 234 5678", "+1 500 234 5678", "+1 900 234 5678",
        "+1 700 234 5678", "+1 600 234 5678", "+800 1234 5678", "+44 800 123 4567", "+49 800 1234567",
        "+870 773 123456", "+881 6 1234 5678", "+1 999 234 5678", "jane@example.com", "0170 1234567", "911", "call me",
        "", "+999 12345678",
    ],
)  # fmt: skip
def test_handle_that_names_no_place_has_no_zone(handle: str) -> None:
    assert zones.time_zones(handle) == ()


def test_number_without_country_code_belongs_to_the_default_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "US")
    assert zones.time_zones("(212) 555-0123") == ("America/New_York",)
    monkeypatch.setenv("DEFAULT_REGION", "DE")
    assert zones.time_zones("030 1234567") == ("Europe/Berlin",)


def test_every_zone_is_one_that_this_host_can_compute() -> None:
    for codes in zones._zones_by_area_code().values():
        assert all(zones.is_known(name) for name in codes), codes
    for number in ("+61412345678", "+79123456789", "+243812345678", "+12992345678", "+6912345678"):
        assert all(zones.is_known(name) for name in zones.time_zones(number))


@pytest.mark.parametrize(
    ("time_zone", "addresses", "expected"),
    [
        ("Asia/Tokyo", ["+12125550123"], ("Asia/Tokyo",)),
        (" Asia/Tokyo ", [], ("Asia/Tokyo",)),
        ("Mars/Base", ["+12125550123"], ("America/New_York",)),
        ("Mars/Base", [], ()),
        ("", ["+12125550123"], ("America/New_York",)),
        ("localtime", ["+12125550123"], ("America/New_York",)),
        ("../../etc/passwd", ["+12125550123"], ("America/New_York",)),
        (None, ["+12125550123", "+14155550123"], ("America/New_York",)),
        (None, ["jane@example.com", "+14155550123"], ("America/Los_Angeles",)),
        (None, ["+18002345678", "+14155550123", "+12125550123"], ("America/Los_Angeles", "America/New_York")),
        (None, ["jane@example.com", "+18002345678"], ()),
        (None, [], ()),
    ],
)
def test_own_time_zone_counts_before_the_number_and_the_number_before_the_others(
    time_zone: str | None, addresses: list[str], expected: tuple[str, ...]
) -> None:
    assert zones.zones_of_person(time_zone, addresses) == expected
