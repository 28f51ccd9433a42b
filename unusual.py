"""Find what an owner should look at before sending: unusual values of a variable, and a text that lacks something.

A wrong row in the data shows in its values first: a test entry, a shifted column, a name in capitals. The rules are
simple, and report; they leave nobody out. Touches no table. Example:

    values = unusual.UnusualValues(template.variables)
    for client_id, client in recipients:
        values.add(client_id, client)
    values.found()  # [Unusual("name", "17", "JANE DOE", "all capitals"), …]
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import handles

MAX_EXAMPLES = 5  # of one variable and one reason
MAX_SHOWN = 80  # characters of a value
MAX_COUNTED = 1000  # different values of a variable that are counted at a time
MAX_SAMPLED_LENGTH = 1000  # characters; longer values count as this long
MANY_PEOPLE = 10  # who share one name …
MANY_SHARE = 0.05  # … and this share of all
LONG_FACTOR, LONG_EXTRA = 3, 30  # longer than 3 times the median, and than 30 characters more
SHORT_FACTOR = 8  # not longer than an eighth of the median

# A variable that holds a person's name, by its own name.
NAME_WORDS = {"first", "last", "surname", "vorname", "nachname", "prenom", "nom", "nombre", "apellido", "apellidos"}
NAME_WORDS |= {"nome", "cognome", "naam", "namn", "navn", "imie", "nazwisko", "contact", "person", "ansprechpartner"}
NOT_A_PERSON = ("user", "company", "firm", "business", "product", "file", "street", "domain", "host")
ADDRESS_WORDS = ("mail", "handle", "user", "instagram", "twitter", "social", "contact", "url")
PLACEHOLDERS = {
    "test", "tester", "testing", "xx", "xxx", "xxxx", "n/a", "n.a.", "n. a.", "#n/a", "null", "nil", "none", "nan",
    "unknown", "undefined", "anonymous", "tbd", "todo", "asdf", "qwerty", "foo", "dummy", "sample", "example",
    "no name", "noname", "unbekannt", "keine angabe", "k.a.", "inconnu", "desconocido", "sconosciuto", "#ref!",
    "#value!", "#name?",
}  # fmt: skip
TEST_WORDS = {"test", "testing", "xxx", "asdf", "dummy"}  # as the first word of several: "Test User"

# How to opt out: the words that the product understands as a reply, in capitals, or such a phrase.
OPT_OUT = re.compile(
    r"\b(?:unsubscribe|opt(?:ing)?[ -]?out|abmelden|abbestellen|austragen|désabonner|désinscrire|darse de baja)\b"
    r"|\b(?:reply|replying|answer|text|send|write|antworte\w*|schreib\w*|répond\w*|envoy\w*|respond\w*|envía\w*)\b"
    r"[^.!?\n]{0,25}\bstopp?\b",
    re.IGNORECASE,
)
# Who writes: "this is Ana", "Ana from Blue Salon", "your Salon team", and the same in German, French, Spanish.
INTRODUCTION = re.compile(
    r"\b(?:this is|it['’]s|i am|i['’]m|we are|we['’]re|my name is|here is|hier (?:ist|sind|schreibt)|ich bin|wir sind"
    r"|mein name ist|c['’]est|je suis|ici|nous sommes|je m['’]appelle|soy|somos|aquí|me llamo|sono|siamo) +(?=\S)"
    r"|\b(?:from|von|vom|de chez|de la part de|at) +(?:the +|der +)?(?-i:[A-ZÀ-Þ])"
    r"|\b(?:your|ihr|ihre|euer|dein|votre|tu|su) (?:\S+ ){0,3}team\b",
    re.IGNORECASE,
)
SIGNATURE = re.compile(r"[-–—~]\s*\S.*|(?:(?-i:[A-ZÀ-Þ0-9])[\w.&'’+-]*,?(?: (?:[\w.&'’+-]+),?){0,4})", re.IGNORECASE)


class Unusual(NamedTuple):
    """A value that an owner should look at."""

    variable: str  # "name" of client.name
    client_id: str
    value: str  # at most MAX_SHOWN characters
    why: str


class UnusualValues:
    """Collect the unusual values of some variables, one client after the other. Memory does not grow with them."""

    def __init__(self, variables: Iterable[str]) -> None:
        self._variables = {variable: _Variable(variable) for variable in sorted(variables)}

    def add(self, client_id: str, client: Mapping[str, object]) -> None:
        """Take in one client who gets the text."""
        for name, variable in self._variables.items():
            value = client.get(name)
            if isinstance(value, str) and (text := value.strip()):
                variable.add(client_id, text)

    def found(self) -> list[Unusual]:
        """Return at most MAX_EXAMPLES of each variable and reason, in the order of the clients."""
        return [unusual for variable in self._variables.values() for unusual in variable.found()]


class _Variable:
    """One variable's examples by reason, and what is known of all its values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_name, self.is_address = is_name(name), holds_address(name)
        self.count = 0
        self.examples: dict[str, list[tuple[str, str]]] = {}
        self.counts: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.by_length: dict[int, list[tuple[str, str]]] = {}  # the first values of each length
        self.shared: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # a value in `shared`: the first client with it

    def add(self, client_id: str, text: str) -> None:
        self.count += 1
        for why in reasons(text, in_name=self.is_name, in_address=self.is_address):
            self.counts[why] += 1
            _keep(self.examples.setdefault(why, []), client_id, text)
        length = min(len(text), MAX_SAMPLED_LENGTH)
        self.lengths[length] += 1
        _keep(self.by_length.setdefault(length, []), client_id, text)
        if self.is_name:
            self._count_shared(client_id, text)

    def _count_shared(self, client_id: str, text: str) -> None:
        """Count a value (Misra and Gries): each count is too low by at most a thousandth of all."""
        self.shared[text] += 1
        self.first.setdefault(text, client_id)
        if len(self.shared) > MAX_COUNTED:
            self.shared -= Counter(dict.fromkeys(self.shared, 1))
            self.first = {value: first for value, first in self.first.items() if value in self.shared}

    def found(self) -> list[Unusual]:
        found = []
        for why, examples in self.examples.items():
            # Codes and countries are in capitals; in a column that is mostly so, they are not unusual.
            if why == "all capitals" and not self.is_name and self.counts[why] * 2 > self.count:
                continue
            more = f", as are {self.counts[why] - 1:,} more" if self.counts[why] > MAX_EXAMPLES else ""
            found += [self._show(client_id, text, why + more) for client_id, text in examples]
        return [*found, *self._found_shared(), *self._found_lengths()]

    def _found_shared(self) -> list[Unusual]:
        least = max(MANY_PEOPLE, self.count * MANY_SHARE)
        return [
            self._show(self.first[text], text, f"one value for {count:,} of {self.count:,} people")
            for text, count in self.shared.most_common(MAX_EXAMPLES)
            if count >= least
        ]

    def _found_lengths(self) -> list[Unusual]:
        if self.count < MANY_PEOPLE:
            return []
        median = _median(self.lengths)
        long = [n for n in sorted(self.lengths, reverse=True) if n > max(LONG_FACTOR * median, median + LONG_EXTRA)]
        short = [n for n in sorted(self.lengths) if n * SHORT_FACTOR <= median]
        found = [
            self._show(client_id, text, "very long compared with the others")
            for client_id, text in [each for n in long for each in self.by_length[n]][:MAX_EXAMPLES]
        ]
        # Two Chinese characters are a whole name.
        shorts = [each for n in short for each in self.by_length[n] if each[1].isascii()]
        return found + [
            self._show(client_id, text, "very short compared with the others")
            for client_id, text in shorts[:MAX_EXAMPLES]
        ]

    def _show(self, client_id: str, text: str, why: str) -> Unusual:
        shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
        return Unusual(self.name, client_id, shown, why)


def is_name(variable: str) -> bool:
    """Return whether a variable holds a person's name: `name`, `first_name`, `Vorname`, not `company_name`."""
    key = _plain(variable)
    if any(word in key for word in NOT_A_PERSON):
        return False
    return "name" in key or not NAME_WORDS.isdisjoint(re.split(r"[^a-z]+", key))


def holds_address(variable: str) -> bool:
    """Return whether an @ is usual in a variable, by its own name."""
    return any(word in _plain(variable) for word in ADDRESS_WORDS)


def reasons(text: str, *, in_name: bool, in_address: bool) -> list[str]:
    """Return why a value is unusual by itself."""
    found = []
    if text.isupper() and sum(letter.isalpha() for letter in text) >= (3 if in_name else 4):
        found.append("all capitals")
    if in_name and any(letter.isdigit() for letter in text):
        found.append("digits in a name")
    if "@" in text and not in_address:
        found.append("an @")
    if is_placeholder(text):
        found.append("a placeholder")
    return found


def is_placeholder(text: str) -> bool:
    """Return whether a value stands for no value: `test`, `N/A`, `-`, `Test User`."""
    word = text.casefold()
    words = word.split()
    if word in PLACEHOLDERS or (len(words) > 1 and words[0] in TEST_WORDS):
        return True
    return all(unicodedata.category(letter)[0] in "PZ" or letter in "+=~^|<>$" for letter in text)


def missing_parts(body: str) -> list[str]:
    """Return what a text to people who were never written to should say, and does not: who writes, how to opt out.

    `body` is the text of one person. The rules know English, German, French and Spanish, and look for
    - an opt-out: a word of handles.STOP_WORDS in capitals, "unsubscribe", "opt out", "reply … stop" and the like;
    - who writes: "this is Ana", "Ana from Blue Salon", "your Blue Salon team", or a last line that is a signature.
    """
    missing = []
    if not INTRODUCTION.search(body) and not _has_signature(body):
        missing.append('The text does not say who writes. Begin with "This is …", or sign it in its last line.')
    capitals = re.findall(r"\b[A-ZÀ-Þ]+(?: [A-ZÀ-Þ]+)?\b", body)
    if not OPT_OUT.search(body) and not any(handles.reply_word(word) in handles.STOP_WORDS for word in capitals):
        missing.append('The text does not say how to opt out. Add "Reply STOP to opt out".')
    return missing


def _has_signature(body: str) -> bool:
    """Return whether the last line of several is a few words without a full stop: "Ana, Blue Salon"."""
    lines = [line.strip() for line in body.splitlines() if line.strip() and not OPT_OUT.search(line)]
    return len(lines) > 1 and len(lines[-1]) <= 40 and SIGNATURE.fullmatch(lines[-1]) is not None


def _plain(variable: str) -> str:
    """Return a variable's name in lower case, without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", variable.lower()) if not unicodedata.combining(c))


def _keep(examples: list[tuple[str, str]], client_id: str, text: str) -> None:
    if len(examples) < MAX_EXAMPLES:
        examples.append((client_id, text))


def _median(lengths: Counter[int]) -> int:
    middle = lengths.total() // 2
    for length in sorted(lengths):
        middle -= lengths[length]
        if middle < 0:
            return length
    return 0
