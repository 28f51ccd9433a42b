"""Read, compare, compute and print the values that the texts of messages use. Touches no table.

templates.py evaluates a text with these functions. A ValueError's message is about the value alone: templates.py adds
the variable's name. Example:

    to_text(times(Decimal("19.90"), rendering, "2"), rendering)  # "39.80"
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, tzinfo
from decimal import ROUND_HALF_UP, Context, Decimal, DivisionByZero, InvalidOperation, Overflow
from typing import NamedTuple
from uuid import UUID

MAX_BODY = 2000  # characters
MAX_VALUE = 10_000  # characters of one value, and of what a filter makes of it: doubling a value ends here
MAX_DIGITS = 30  # of a number, before the point and after it
MAX_PLACES = 6  # decimals of a quotient, and of `round`

# Control characters, lone surrogates, and what reorders the text around it: a value could hide or rewrite what the
# owner approved. Line breaks stay. U+200E and U+200F stay, too: right-to-left text needs them.
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# What is not white space for Python, and shows nothing: soft hyphen, joiners, fillers, variation selectors, tags.
INVISIBLE = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2060-\u2065\u2800\u3164\ufe00-\ufe0f"
    "\uffa0\U000e0000-\U000e0fff]+"
)
ASCII_START = re.compile("[0-9A-Za-z]")  # most texts, and no need to look further
NUMBER = re.compile(rf"[+-]?[0-9]{{1,{MAX_DIGITS}}}(?:\.[0-9]{{1,{MAX_DIGITS}}})?")
DECIMALS = Context(prec=3 * MAX_DIGITS, rounding=ROUND_HALF_UP, traps=[InvalidOperation, DivisionByZero, Overflow])
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class EmptyVariable(Exception):
    """A value that leaves this person out: empty without a `default`, or unusable. `str()` says which and why."""

    def __init__(self, name: str, detail: str | None = None) -> None:
        super().__init__(detail or f"{name} is empty")
        self.name = name


class TooLong(Exception):
    """The text, or a value in it, is too long for this person."""

    def __init__(self, length: int) -> None:
        super().__init__(f"{length} characters")
        self.length = length


class Missing(NamedTuple):
    """The value of a variable that is NULL or blank: false in a condition, and an error where it is printed."""

    name: str


class Rendering:
    """One person's values, and the text so far."""

    __slots__ = ("client", "defaults_taken", "locals", "output", "zone")

    def __init__(self, client: Mapping[str, object], zone: tzinfo) -> None:
        self.client, self.zone = client, zone
        self.locals: dict[str, object] = {}
        self.output: list[str] = []
        self.defaults_taken = False


# --- reading and printing ---------------------------------------------------------------------------------------------


def clean(text: str, *, trim: bool = True) -> str:
    """Return a text without control characters and bidi overrides, its line breaks as newlines."""
    text = UNPRINTABLE.sub("", LINE_BREAK.sub("\n", text).replace("\t", " "))
    return text.strip() if trim else text


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it is empty, or has only white space and invisible characters."""
    return not ASCII_START.match(text) and not INVISIBLE.sub("", UNPRINTABLE.sub("", text))


def read(name: str, value: object) -> object:
    """Return a value of the database as text, number, truth value, date, time or list; Missing if it is blank.

    Raises ValueError for other types, TooLong for a text that is too long for any filter.
    """
    match value:
        case None:
            return Missing(name)
        case str():
            if len(value) > MAX_VALUE:
                raise TooLong(len(value))
            return Missing(name) if is_blank(value) else clean(value)
        case bool() | datetime() | date() | time():
            return value
        case int() | float() | Decimal():
            return read_number(value)
        case list() | tuple():
            return list(value) or Missing(name)
        case UUID():
            return str(value)
    raise ValueError(f"a value of the type {type(value).__name__} cannot be printed")


def read_number(value: int | float | Decimal) -> Decimal:
    """Return a number as Decimal. A float with no fraction is a whole number, so 5.0 from JSON is 5."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:
        raise ValueError("the number is too large")
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    check_size(number)
    return Decimal(int(number)) if isinstance(value, float) and number == int(number) else number


def check_size(number: Decimal) -> Decimal:
    """Raise ValueError for a number that nobody would write."""
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        raise ValueError("not a number")
    if (number and number.adjusted() >= MAX_DIGITS) or exponent > MAX_DIGITS:
        raise ValueError("the number is too large")
    if exponent < -MAX_DIGITS:
        raise ValueError(f"the number has more than {MAX_DIGITS} decimals")
    return number


def to_number(value: object) -> Decimal:
    """Return a number, also one that is written as text, as CSV files have it. Raises ValueError."""
    if isinstance(value, Decimal):
        return value
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return Decimal(value)
    raise ValueError(f"{shorten(value)} is not a number")


def to_date(value: object, zone: tzinfo) -> datetime | date:
    """Return a date, also one that is written as text in ISO 8601; an instant in the zone. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{shorten(value)} is not a date; write it as 2025-12-31") from None
    if isinstance(value, datetime):
        return value.astimezone(zone) if value.tzinfo else value.replace(tzinfo=zone)
    if isinstance(value, date):
        return value
    raise ValueError(f"{shorten(value)} is not a date")


def to_text(value: object, rendering: Rendering) -> str:
    """Print a value as a person writes it. Raises EmptyVariable, and ValueError for a truth value or a list."""
    match value:
        case str():
            return value
        case Missing():
            raise EmptyVariable(value.name)
        case Decimal():
            return f"{check_size(value):f}" if value else f"{abs(value):f}"
        case datetime():
            return format_date(to_date(value, rendering.zone), DATE_AND_TIME)
        case date():
            return format_date(value, DATE_ALONE)
        case time():
            return f"{value:%H:%M}"
        case bool():
            raise ValueError("the value is true or false, which cannot be printed; use it in {% if … %}")
    raise ValueError("the value is a list, which cannot be printed; use it in {% if … contains … %}")


def shorten(value: object) -> str:
    """Quote a value in an error."""
    text = str(value)
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


# --- dates ----------------------------------------------------------------------------------------------

# Own directives: strftime takes widths such as %999999999d, and depends on the host.
DATE_DIRECTIVES: Mapping[str, Callable[[date], str]] = {
    "d": lambda day: f"{day.day:02}",
    "-d": lambda day: str(day.day),
    "m": lambda day: f"{day.month:02}",
    "-m": lambda day: str(day.month),
    "y": lambda day: f"{day.year % 100:02}",
    "Y": lambda day: f"{day.year:04}",
    "B": lambda day: MONTHS[day.month - 1],
    "b": lambda day: MONTHS[day.month - 1][:3],
    "A": lambda day: DAYS[day.weekday()],
    "a": lambda day: DAYS[day.weekday()][:3],
    "%": lambda _: "%",
}
TIME_DIRECTIVES: Mapping[str, Callable[[datetime], str]] = {
    "H": lambda moment: f"{moment.hour:02}",
    "-H": lambda moment: str(moment.hour),
    "I": lambda moment: f"{moment.hour % 12 or 12:02}",
    "-I": lambda moment: str(moment.hour % 12 or 12),
    "M": lambda moment: f"{moment.minute:02}",
    "p": lambda moment: "AM" if moment.hour < 12 else "PM",
}


def split_format(text: str) -> tuple[str, ...]:
    """Return a date's format as text, directive, text, directive, …, text. Raises ValueError."""
    parts = tuple(re.split("%(-?.?)", text, flags=re.DOTALL))
    for directive in parts[1::2]:
        if directive not in DATE_DIRECTIVES and directive not in TIME_DIRECTIVES:
            known = " ".join(f"%{each}" for each in (*DATE_DIRECTIVES, *TIME_DIRECTIVES))
            raise ValueError(f"a date has no %{directive}; there are {known}")
    return parts


def format_date(day: datetime | date, parts: Sequence[str]) -> str:
    """Write a date in a format of split_format(). Raises ValueError for the hour of a date that has none."""
    written = [*parts]
    for index in range(1, len(parts), 2):
        if directive := DATE_DIRECTIVES.get(parts[index]):
            written[index] = directive(day)
        elif isinstance(day, datetime):
            written[index] = TIME_DIRECTIVES[parts[index]](day)
        else:
            raise ValueError(f"{day} has no time of day")
    return "".join(written)


DATE_ALONE = split_format("%-d %B %Y")
DATE_AND_TIME = split_format("%-d %B %Y, %H:%M")


# --- comparisons ----------------------------------------------------------------------------------------


def is_true(value: object) -> bool:
    return not isinstance(value, Missing) and value is not False


def is_missing(value: object) -> bool:
    return isinstance(value, Missing) or (isinstance(value, str) and is_blank(value))


def is_equal(left: object, right: object, rendering: Rendering) -> bool:
    """Compare as a person reads it: a number in a text equals the number, and nothing equals an empty text."""
    if is_missing(left) or is_missing(right):
        return is_missing(left) and is_missing(right)
    if isinstance(left, bool) or isinstance(right, bool):
        return str(left).lower() == str(right).lower()
    try:
        left, right = comparable(left, right, rendering.zone)
    except ValueError:
        return False
    return left == right


def is_less(left: object, right: object, rendering: Rendering) -> bool:
    """Compare numbers, dates or texts; False if one is missing. Raises ValueError if they cannot be compared."""
    if is_missing(left) or is_missing(right):
        return False
    left, right = comparable(left, right, rendering.zone)
    if isinstance(left, Decimal | datetime | date | str):
        return left < right  # type: ignore[operator]
    raise ValueError(f"{shorten(left)} and {shorten(right)} cannot be compared")


def is_less_or_equal(left: object, right: object, rendering: Rendering) -> bool:
    return is_less(left, right, rendering) or (not is_missing(left) and is_equal(left, right, rendering))


def contains(left: object, right: object, rendering: Rendering) -> bool:
    if is_missing(left) or is_missing(right):
        return False
    if isinstance(left, list):
        return any(is_equal(read("", each), right, rendering) for each in left)
    return to_text(right, rendering) in to_text(left, rendering)


def comparable(left: object, right: object, zone: tzinfo) -> tuple[object, object]:
    """Return both as numbers, as dates, or as they are. Raises ValueError if only one can be a number or a date."""
    if isinstance(left, date) or isinstance(right, date):
        return same_kind_of_date(to_date(left, zone), to_date(right, zone), zone)
    if isinstance(left, Decimal) or isinstance(right, Decimal):
        return to_number(left), to_number(right)
    if isinstance(left, str) and isinstance(right, str) and NUMBER.fullmatch(left) and NUMBER.fullmatch(right):
        return Decimal(left), Decimal(right)
    return left, right


def same_kind_of_date(left: date, right: date, zone: tzinfo) -> tuple[date, date]:
    """Return two dates, or two instants: a date begins at its midnight."""
    if isinstance(left, datetime) == isinstance(right, datetime):
        return left, right
    return (
        left if isinstance(left, datetime) else datetime.combine(left, time(), zone),
        right if isinstance(right, datetime) else datetime.combine(right, time(), zone),
    )


# --- filters: the value, the rendering, the values after the colon ----------------------------------------


def default(value: object, rendering: Rendering, instead: object) -> object:
    if is_true(value) and not is_missing(value):
        return value
    rendering.defaults_taken = True
    return instead


def upcase(value: object, rendering: Rendering) -> str:
    return to_text(value, rendering).upper()


def downcase(value: object, rendering: Rendering) -> str:
    return to_text(value, rendering).lower()


def capitalize(value: object, rendering: Rendering) -> str:
    return to_text(value, rendering).capitalize()


def strip(value: object, rendering: Rendering) -> str:
    return to_text(value, rendering).strip()


def append(value: object, rendering: Rendering, end: object) -> str:
    text, more = to_text(value, rendering), to_text(end, rendering)
    if len(text) + len(more) > MAX_VALUE:
        raise TooLong(len(text) + len(more))
    return text + more


def prepend(value: object, rendering: Rendering, start: object) -> str:
    return append(start, rendering, value)


def truncate(value: object, rendering: Rendering, length: int, end: object = "...") -> str:
    """Shorten a text to `length` characters, its end included."""
    text, ending = to_text(value, rendering), to_text(end, rendering)
    return text if len(text) <= length else text[: max(0, length - len(ending))] + ending


def truncatewords(value: object, rendering: Rendering, count: int, end: object = "...") -> str:
    """Shorten a text to `count` words: `truncatewords: 1, ""` is the first name in a full name."""
    text = to_text(value, rendering)
    words = text.split()
    return text if len(words) <= max(1, count) else " ".join(words[: max(1, count)]) + to_text(end, rendering)


def format_as_date(value: object, rendering: Rendering, parts: Sequence[str]) -> str:
    return format_date(to_date(value, rendering.zone), parts)


def plus(value: object, rendering: Rendering, other: object) -> Decimal:
    del rendering
    return check_size(DECIMALS.add(to_number(value), to_number(other)))


def minus(value: object, rendering: Rendering, other: object) -> Decimal:
    del rendering
    return check_size(DECIMALS.subtract(to_number(value), to_number(other)))


def times(value: object, rendering: Rendering, other: object) -> Decimal:
    """Multiply: 19.90 times 2 is 39.80, and times 0.5 is 9.95."""
    del rendering
    left, right = to_number(value), to_number(other)
    return check_size(drop_zeros(DECIMALS.multiply(left, right), max(places(left), places(right))))


def divided_by(value: object, rendering: Rendering, other: object) -> Decimal:
    """Divide with decimals, at most MAX_PLACES: 25 divided by 2 is 12.5, where Liquid has 12."""
    del rendering
    left, right = to_number(value), to_number(other)
    if not right:
        raise ValueError("nothing can be divided by 0")
    quotient = DECIMALS.divide(left, right)
    return check_size(drop_zeros(round_half_up(quotient, MAX_PLACES), max(places(left), places(right))))


def round_number(value: object, rendering: Rendering, decimals: int = 0) -> Decimal:
    del rendering
    return round_half_up(to_number(value), decimals)


def round_half_up(number: Decimal, decimals: int) -> Decimal:
    return check_size(number.quantize(Decimal(1).scaleb(-decimals), context=DECIMALS))


def places(number: Decimal) -> int:
    """Return how many decimals a number has."""
    return max(0, -int(number.as_tuple().exponent))


def drop_zeros(number: Decimal, keep: int) -> Decimal:
    """Return a number without the zeros at the end of its decimals, but with `keep` decimals."""
    while places(number) > keep and number.as_tuple().digits[-1] == 0:
        number = number.quantize(Decimal(1).scaleb(1 - places(number)), context=DECIMALS)
    return number


# The function, the kinds of the values after the colon, and how many of them are required.
FILTERS: Mapping[str, tuple[Callable[..., object], tuple[str, ...], int]] = {
    "append": (append, ("any",), 1),
    "capitalize": (capitalize, (), 0),
    "date": (format_as_date, ("format",), 1),
    "default": (default, ("any",), 1),
    "divided_by": (divided_by, ("any",), 1),
    "downcase": (downcase, (), 0),
    "minus": (minus, ("any",), 1),
    "plus": (plus, ("any",), 1),
    "prepend": (prepend, ("any",), 1),
    "round": (round_number, ("count",), 0),
    "strip": (strip, (), 0),
    "times": (times, ("any",), 1),
    "truncate": (truncate, ("count", "any"), 1),
    "truncatewords": (truncatewords, ("count", "any"), 1),
    "upcase": (upcase, (), 0),
}
