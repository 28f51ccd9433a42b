"""Read CSV files as spreadsheets write them: encoding, delimiter, records with line numbers, damaged phone numbers.

Used by importing.py; touches no table. Example:

    sheet = spreadsheet.open_sheet(file); names = [line.fields[0] for line in sheet.lines() if not line.problem]
"""

import csv
import functools
import importlib.resources
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import phonenumbers

import handles

DELIMITERS = ";\t,"  # the first wins when two fit equally well
SAMPLE_LINES = 20  # of which the delimiter is found
MAX_LINE = 1_000_000  # characters; without a limit, a file without line ends would fill the memory
# Lines that a quoted field may span. An unclosed quote would otherwise swallow the rest of the file.
MAX_RECORD_LINES = 100
SEPARATOR_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # Excel's own first line
UNDECODED = re.compile("[\udc80-\udcff]")  # how "surrogateescape" keeps a byte that is no UTF-8
NOT_CSV = {
    b"PK\x03\x04": "an Excel or Numbers workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"%PDF": "a PDF",
    b"{\\rt": "an RTF text",
}
AS_UTF8 = "in Excel, save it as `CSV UTF-8`; in Numbers, export it as CSV with the text encoding Unicode (UTF-8)"

SCIENTIFIC = re.compile(r"[+']?[0-9]+(?:[.,][0-9]+)?[eE]\+?[0-9]+")
DECIMAL = re.compile(r"\+?[0-9]{6,}[.,]0+")
AS_TEXT = "a spreadsheet has changed this number: format its column as text there, enter it again, and export again"
# In telephone directories a slash follows the area code; a contact copied from Apple's apps has invisible marks.
HANDLE_PUNCTUATION = str.maketrans({"/": " ", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-"})
# Calling codes that several large countries share.
SHARED_CODES = {1: "United States or Canada", 7: "Russia or Kazakhstan"}


class Unreadable(ValueError):
    """The file cannot be read as CSV. The message says where, why, and what to do."""


class Line(NamedTuple):
    """One record of the file, and the number of its first line; `problem` says why it has no fields."""

    number: int
    fields: list[str]
    problem: str | None = None
    cells: Sequence[str] = ()  # what was read of it, also if there is a problem


class Sheet:
    """A file whose header has been read. `lines()` reads the rest once, record by record."""

    def __init__(self, text: io.TextIOWrapper, encoding: str, file: BinaryIO) -> None:
        self.encoding = encoding
        self.file = file
        self._text = text
        self._read = 0  # lines that have been read from the file
        self._waiting: list[tuple[int, str]] = []  # lines to parse before any other: the sample, and after a bad quote
        first = self._next_line()
        if first and (separator := SEPARATOR_LINE.fullmatch(first[1].strip())):
            self.delimiter = separator[1]
        else:
            self._waiting = [first] if first else []
            self.delimiter = self._find_delimiter()
        header = next(self._records(None), None)
        if header is None:
            raise Unreadable("the file is empty: its first line must have the names of the columns")
        if header.problem:
            raise Unreadable(f"line {header.number}, which must have the names of the columns: {header.problem}")
        self.header_line = header.number
        self.header = [" ".join(name.split()) for name in header.fields]

    def lines(self) -> Iterator[Line]:
        """Yield each record that is not blank. Raises Unreadable if a line is not in the file's encoding."""
        return self._records(len(self.header))

    def close(self) -> None:
        """Let go of the file, which stays open: whoever has opened it closes it."""
        self._text.detach()

    def position(self) -> int:
        """Return about how many bytes of the file have been read."""
        return self.file.tell()

    def _find_delimiter(self) -> str:
        """Return the delimiter that gives most of the first lines as many fields as the header, and at least two."""
        while len(self._waiting) < SAMPLE_LINES and (line := self._read_line()):
            self._waiting.append(line)
        texts = [text for _, text in self._waiting]

        def fit(delimiter: str) -> tuple[int, int]:
            try:
                widths = [len(record) for record in csv.reader(texts, delimiter=delimiter) if record]
            except csv.Error:  # a field that is too long; _records says in which line
                return 0, 0
            return (widths.count(widths[0]), widths[0]) if widths and widths[0] > 1 else (0, 0)

        return max(DELIMITERS, key=fit) if any(fit(delimiter)[0] for delimiter in DELIMITERS) else ","

    def _records(self, width: int | None) -> Iterator[Line]:
        """Yield records, each with `width` fields or a problem.

        If a record of several lines is bad, only its first line is; the others are read again. So a quote that is not
        closed costs one line.
        """
        while first := self._next_line():
            lines = [first]
            fields, problem = self._parse(lines)
            while problem == "open" and len(lines) < MAX_RECORD_LINES and (line := self._next_line()):
                lines.append(line)
                fields, problem = self._parse(lines)
            if not any(field.strip() for field in fields) and not problem:
                continue
            if not problem and width is not None and len(fields) != width:
                problem = f"it has {len(fields)} fields, and the header has {width}"
            if not problem and any("\0" in field for field in fields):
                problem = "it contains a NUL character"
            if problem and len(lines) > 1:
                self._waiting = [*lines[1:], *self._waiting]
                problem = "open"
            if problem == "open":
                problem = "a quote is opened and not closed"
            yield Line(first[0], [] if problem else fields, problem, fields)

    def _parse(self, lines: list[tuple[int, str]]) -> tuple[list[str], str | None]:
        """Return the fields of one record, or a problem: `open` if a quote is not closed in these lines."""
        try:
            return next(csv.reader((text for _, text in lines), delimiter=self.delimiter, strict=True), []), None
        except csv.Error as error:
            if "end of data" in str(error):
                return [], "open"
            return [], f"a quote stands in the wrong place ({error})"

    def _next_line(self) -> tuple[int, str] | None:
        return self._waiting.pop(0) if self._waiting else self._read_line()

    def _read_line(self) -> tuple[int, str] | None:
        """Return the next line of the file and its number; None at the end."""
        try:
            text = self._text.readline(MAX_LINE)
        except UnicodeError:
            raise Unreadable(
                f"after line {self._read} the file is not {self.encoding}: save it as UTF-8 ({AS_UTF8})"
            ) from None
        if not text:
            return None
        self._read += 1
        if len(text) == MAX_LINE:
            raise Unreadable(f"line {self._read} has {MAX_LINE:,} characters or more: this is no CSV file")
        if not text.isascii() and UNDECODED.search(text):
            raise Unreadable(
                f"line {self._read} is not UTF-8: {AS_UTF8}. If you know that it was written by an older Windows "
                "program, say --encoding windows-1252"
            )
        return self._read, text


def open_sheet(file: BinaryIO, encoding: str | None = None) -> Sheet:
    """Read the header of a file that can seek. Raises Unreadable.

    UTF-8, and UTF-16 with a byte order mark, are recognized. Any other encoding must be named: Windows-1252 and Mac
    Roman cannot be told apart, and the wrong one changes names.
    """
    start = file.read(4096)
    file.seek(0)
    for magic, what in NOT_CSV.items():
        if start.startswith(magic):
            raise Unreadable(f"the file is {what}, and no CSV: save it as CSV there ({AS_UTF8})")
    if encoding is None and start.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif encoding is None and start.count(b"\0") * 4 > len(start):
        raise Unreadable(f"the file seems to be UTF-16 without a byte order mark: save it as UTF-8 ({AS_UTF8})")
    is_utf8 = encoding is None or encoding.lower().replace("-", "") in ("utf8", "utf8sig")
    try:
        text = io.TextIOWrapper(
            file,
            "utf-8-sig" if is_utf8 else encoding,
            errors="surrogateescape" if is_utf8 else "strict",
            newline="",  # a quoted line end stays as it is
        )
    except LookupError:
        raise Unreadable(f"there is no encoding {encoding}: say --encoding windows-1252, or leave it out") from None
    try:
        return Sheet(text, "UTF-8" if is_utf8 else str(encoding), file)
    except BaseException:
        text.detach()
        raise


# --- handles ------------------------------------------------------------------------------------------


class Handle(NamedTuple):
    """A handle of a cell: as Messages needs it, its key, its country (None: an e-mail address), what was repaired."""

    address: str
    key: str
    country: str | None
    repair: str | None


def read_handle(cell: str) -> Handle:
    """Read a phone number or e-mail address. Raises ValueError, which says what is wrong and what to do."""
    text = unicodedata.normalize("NFKC", cell)
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    text = " ".join(text.translate(HANDLE_PUNCTUATION).split()) if "@" not in text else text.strip()
    if SCIENTIFIC.fullmatch(text) or DECIMAL.fullmatch(text):
        raise ValueError(AS_TEXT)
    repair = "apostrophe" if text.startswith("'") else None
    text = text.removeprefix("'").strip()
    if not handles.is_handle(text):
        raise ValueError("it is neither one phone number nor one e-mail address")
    if "@" in text:
        return Handle(text, handles.key(text), None, repair)
    if not text.startswith("+"):
        text, repair = _read_without_plus(text, repair)
    number = handles.to_send(text)
    # +49 00 9847 reads as +49009847, and that as +4909847: no such number exists.
    if number is None or ("0" in number[2:5] and handles.to_send(number) != number):
        raise ValueError(handles.UNREADABLE_REMEDY)
    return Handle(number, handles.key(text), country(number), repair)


def _read_without_plus(text: str, repair: str | None) -> tuple[str, str | None]:
    """Return a number as handles.py must read it, and what a spreadsheet removed from it. Raises ValueError.

    A spreadsheet removes the + of an international number, and the 0 with which national numbers begin in most
    countries. If both readings are valid, the one that is a mobile number counts: 491701234567 is +49 170 1234567, and
    not the number 701234567 of the German town with the area code 0491.
    """
    region = handles.default_region()
    metadata = phonenumbers.PhoneMetadata.metadata_for_region(region) if region else None
    digits = re.sub("[^0-9]", "", text)
    needs_zero = metadata is not None and metadata.national_prefix == "0"
    if metadata is None or digits.startswith("0"):
        return text, repair
    number = handles.to_send(text)
    national, international = _kind(number or ""), _kind(f"+{digits}")
    if national and international and number != f"+{digits}" and needs_zero:
        if (national == MOBILE) == (international == MOBILE):
            raise ValueError(f"it may be {number} or +{digits}: write it with + and its country code")
        national, international = (national, None) if national == MOBILE else (None, international)
    if national:
        return text, "zero" if needs_zero else repair
    if international and (needs_zero or not number):
        return f"+{digits}", "plus"
    if international or needs_zero:
        raise ValueError("it has no + and is no usual number of DEFAULT_REGION: write it with + and its country code")
    return text, repair


MOBILE = "mobile"


def _kind(number: str) -> str | None:
    """Return whether a number in E.164 is a mobile number or another one; None if it is in no range that is in use."""
    try:
        kind = phonenumbers.number_type(phonenumbers.parse(number))
    except phonenumbers.NumberParseException:
        return None
    if kind == phonenumbers.PhoneNumberType.UNKNOWN:
        return None
    return MOBILE if kind == phonenumbers.PhoneNumberType.MOBILE else "other"


def country(number: str) -> str:
    """Return the English name of the country of a number in E.164, from its calling code."""
    code = next((int(number[1:end]) for end in (2, 3, 4) if is_calling_code(number[1:end])), 0)
    region = phonenumbers.COUNTRY_CODE_TO_REGION_CODE[code][0] if code else ""
    return SHARED_CODES.get(code) or _country_names().get(region) or f"+{code}"


def is_calling_code(digits: str) -> bool:
    """Return whether these digits are the calling code of a country. No code is the beginning of another one."""
    return int(digits) in phonenumbers.COUNTRY_CODE_TO_REGION_CODE


@functools.cache
def _country_names() -> dict[str, str]:
    """Return the names of countries by their two letters, from the zone files."""
    text = (importlib.resources.files("tzdata.zoneinfo") / "iso3166.tab").read_text(encoding="utf-8")
    return dict(line.split("\t")[:2] for line in text.splitlines() if line and not line.startswith("#"))
