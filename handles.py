"""Validate, normalize, compare and mask handles (phone numbers, e-mail addresses), and find opt-out replies.

Used by every script that reads a handle; touches no table. A number without `+` belongs to DEFAULT_REGION. Example:

    handles.to_send("(415) 555-0123")  # "+14155550123" with DEFAULT_REGION=US, else None
"""

import functools
import os
import re
import unicodedata

import phonenumbers

import runtime

# The server refuses a handle that does not match this.
HANDLE_PATTERN = re.compile(
    r"\+?(?:[ ().-]*[0-9]){3,15}|[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+\.[^@\s\x00-\x1f\x7f]+"
)
MAX_HANDLE_LENGTH = 254  # characters
UNREADABLE_REMEDY = "write the number with + and its country code, or set DEFAULT_REGION"
# Mexico's mobile numbers had a 1 after the country code until 2019, and are still stored with it.
MEXICAN_MOBILE = re.compile(r"\+521([0-9]{10})")
# Argentina's mobile numbers have a 9 after the country code in calls from abroad.
ARGENTINE_MOBILE = re.compile(r"\+549([0-9]{10})")
# A reply that is one of these opts out: the FCC's words and the carriers', then French, German and Spanish ones.
# Written as reply_word() returns them: upper case, no accents. mac/mac_sender.py has a copy: it imports nothing.
STOP_WORDS = frozenset(
    (
        "STOP", "QUIT", "END", "REVOKE", "OPT OUT", "CANCEL", "UNSUBSCRIBE", "STOPALL", "OPTOUT", "REMOVE", "ARRET",
        "STOPP", "ABMELDEN", "ABBESTELLEN", "AUSTRAGEN", "ALTO", "PARAR", "BAJA", "CANCELAR", "DETENER",
    )
)  # fmt: skip
START_WORDS = frozenset({"START", "UNSTOP"})  # take such an opt-out back
# What Messages puts between letters: an object's place, variation selectors, zero-width spaces and joiners.
INVISIBLE = dict.fromkeys((0xFFFC, 0xFE0E, 0xFE0F, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF))


def is_handle(text: str) -> bool:
    """Return whether `text` has the format of a phone number or an e-mail address."""
    return len(text) <= MAX_HANDLE_LENGTH and HANDLE_PATTERN.fullmatch(text) is not None


def to_send(handle: str) -> str | None:
    """Return `handle` as Messages needs it: a number in E.164, an e-mail address unchanged; None if unreadable.

    A number is readable if its length is possible for its country, area code included. It need not be in an assigned
    range, because the library's tables of assigned ranges lack new ones.
    """
    if "@" in handle:
        return handle
    return _e164(handle, default_region())


def key(handle: str) -> str:
    """Return a key for comparing handles: two ways to write one handle have the same key.

    - number: E.164, without the extra digit of Mexican and Argentine mobile numbers
    - unreadable number: its digits, and `+`
    - e-mail address: lower case
    """
    if "@" in handle:
        return handle.strip().lower()
    number = _e164(handle, default_region())
    if number is None:
        return re.sub("[^0-9+]", "", handle)
    argentine = ARGENTINE_MOBILE.fullmatch(number)
    return f"+54{argentine[1]}" if argentine else number


def reply_word(text: str) -> str | None:
    """Return the STOP or START word that is the whole of `text`; None for any other text.

    Case, accents and closing punctuation do not count: `Stop.` and `ARRÊT!!` are words, `stop by at 5?` is none.
    """
    decomposed = unicodedata.normalize("NFKD", text.translate(INVISIBLE))
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    word = " ".join(letters.upper().split())
    while word and unicodedata.category(word[-1])[0] in "PZ":
        word = word[:-1]
    return word if word in STOP_WORDS or word in START_WORDS else None


def mask_handle(handle: str) -> str:
    """Return `handle` masked for a log: `+1415•••71`, `a•••@example.com`."""
    name, at, domain = handle.partition("@")
    if at:
        return f"{name[:1]}•••@{domain}"
    digits = re.sub("[^0-9]", "", handle)
    if len(digits) < 11:
        return f"•••{digits[-2:]}"
    return f"{'+' if handle.startswith('+') else ''}{digits[:4]}•••{digits[-2:]}"


def default_region() -> str | None:
    """Return DEFAULT_REGION, such as `US`; None if it is not set. Raises runtime.ConfigError if it is unknown."""
    region = (os.environ.get("DEFAULT_REGION") or "").upper() or None
    if region and region not in phonenumbers.SUPPORTED_REGIONS:
        raise runtime.ConfigError(
            f"DEFAULT_REGION is {region!r}: set it to a country's two letters, such as US or DE, or remove it"
        )
    return region


@functools.lru_cache(maxsize=4096)  # status.py --watch needs the same numbers every two seconds
def _e164(number: str, region: str | None) -> str | None:
    """Return `number` in E.164; None if it is unreadable."""
    if not HANDLE_PATTERN.fullmatch(number):
        return None
    if mexican := MEXICAN_MOBILE.fullmatch(re.sub("[^0-9+]", "", number)):
        number = f"+52{mexican[1]}"
    try:
        parsed = phonenumbers.parse(number, region)
    except phonenumbers.NumberParseException:
        return None
    if phonenumbers.is_possible_number_with_reason(parsed) != phonenumbers.ValidationResult.IS_POSSIBLE:
        return None  # too short, too long, or without its area code
    return str(phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164))
