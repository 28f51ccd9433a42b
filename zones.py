"""Find the time zones in which a recipient may be: from the client's own time zone, else from the handles.

Used by composing.py when it drafts, and by the dispatcher for an item that was made by hand. Touches no table. A phone
number names every zone of its area, because a message may go only when it may go in all of them. Example:

    zones.time_zones("+1 850 234 1234")  # ("America/Chicago", "America/New_York")
"""

import functools
import zoneinfo
from collections.abc import Iterable, Sequence

import phonenumbers
import phonenumbers.tzdata

import handles

NORTH_AMERICA = "+1"  # numbers of 25 countries, which an area code of three digits tells apart
# North American area codes that serve one area together, if the library has different zones for them, or none for the
# newer code. The library knows the zones of the exchanges that were assigned when it was made: of an overlay those are
# few, or none, and often on one side of the border of two zones only.
SAME_AREA = (
    "208 986", "270 364", "306 474 639", "313 679", "318 457", "334 483", "418 273 367 581", "423 729", "502 761",
    "530 837", "541 458", "559 357", "662 471", "709 879", "718 465", "812 930", "850 448", "912 565",
    # 604, around Vancouver, shares four of these codes, but not the zones of 250.
    "250 236 257 672 778",
)  # fmt: skip
# Zones of area codes of which the library knows none of the exchanges there: counties of Tennessee and Texas, and the
# town of Lloydminster in Saskatchewan.
MORE_ZONES = {"931": "America/New_York", "915": "America/Chicago", "306": "America/Edmonton"}
# Numbers that are answered anywhere.
WITHOUT_PLACE = frozenset(
    {
        phonenumbers.PhoneNumberType.TOLL_FREE,
        phonenumbers.PhoneNumberType.PREMIUM_RATE,
        phonenumbers.PhoneNumberType.SHARED_COST,
        phonenumbers.PhoneNumberType.UAN,
    }
)
# Numbers of a country whose digits name the area, as far as the library knows it.
OF_AREA = frozenset(
    {phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.FIXED_LINE_OR_MOBILE}
)  # fmt: skip
# Keys of the system's zone files that name no place: this host's own zone, and a placeholder.
NO_ZONES = frozenset({"Factory", "localtime", "posixrules"})


def zones_of_person(time_zone: str | None, addresses: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the zones in which a client may be, sorted; () if nothing says where.

    `time_zone`: the client's own; it counts if it is a known zone. `addresses`: the client's handles, the one that is
    written to first; the others count if it names no zone. If nothing does, the sender's zone counts.
    """
    if is_known(time_zone):
        return (str(time_zone).strip(),)
    if not addresses:
        return ()
    return time_zones(addresses[0]) or _sorted(zone for other in addresses[1:] for zone in time_zones(other))


def time_zones(handle: str) -> tuple[str, ...]:
    """Return the names of the zones in which a handle may be, sorted; () for one that names no place.

    - North America: the zones of the area code and of the codes that serve the same area
    - a landline elsewhere: the zones of its area
    - another number elsewhere: all zones of its country code, because a mobile number does not say where it is used
    - e-mail, satellite, toll-free, unreadable: ()
    """
    number = handles.to_send(handle)
    return _zones_of_number(number) if number and "@" not in number else ()


def is_known(name: str | None) -> bool:
    """Return whether `name` is a time zone: an IANA name that this host knows, such as Europe/Berlin."""
    return bool(name) and str(name).strip() in _known_names()


@functools.cache
def _known_names() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones()) - NO_ZONES


@functools.lru_cache(maxsize=4096)  # the dispatcher sees the same people at each tick
def _zones_of_number(number: str) -> tuple[str, ...]:
    """Return the zones of a number in E.164."""
    if number.startswith(NORTH_AMERICA):
        return _zones_by_area_code().get(number[2:5], ())
    parsed = phonenumbers.parse(number)
    kind = phonenumbers.number_type(parsed)
    if kind in WITHOUT_PLACE:
        return ()
    if kind in OF_AREA:
        lengths = range(len(number) - 1, 0, -1)
        prefixes = (number[1 : 1 + length] for length in lengths)
        return next((_sorted(_library()[prefix]) for prefix in prefixes if prefix in _library()), ())
    return _zones_below(str(parsed.country_code))


@functools.cache
def _zones_below(country_code: str) -> tuple[str, ...]:
    """Return the zones of a country code and of all longer prefixes."""
    return _sorted(zone for prefix, names in _library().items() if prefix.startswith(country_code) for zone in names)


@functools.cache
def _zones_by_area_code() -> dict[str, tuple[str, ...]]:
    """Return the zones of each North American area code: of all its prefixes, and of the codes of the same area."""
    found: dict[str, set[str]] = {}
    for prefix, names in _library().items():
        if prefix.startswith("1") and len(prefix) >= 4:
            found.setdefault(prefix[1:4], set()).update(names)
    for code, name in MORE_ZONES.items():
        found.setdefault(code, set()).add(name)
    for codes in map(str.split, SAME_AREA):
        together = {zone for code in codes for zone in found.get(code, ())}
        found.update(dict.fromkeys(codes, together))
    return {code: _sorted(names) for code, names in found.items()}


def _library() -> dict[str, tuple[str, ...]]:
    """Return phonenumbers' zones by prefix. Its own look-up names one zone for most area codes that have two."""
    return phonenumbers.tzdata.TIMEZONE_DATA


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names) - {"Etc/Unknown"}))
