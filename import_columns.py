"""Find which column of a file becomes what: a handle, the name, a column of `clients` that exists, an attribute.

Used by importing.py. Reads the catalogue of quinn; touches no row. Example:

    clients = import_columns.read_clients(quinn); places = import_columns.place(["Name", "Phone"], clients)
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import db

Connection = Any  # psycopg2's connection

# Names of columns, as `normalise` writes them. The first handle that a line has, in this order, is its primary one.
HANDLE_COLUMNS = (
    "handle", "imessage", "mobile", "mobile_phone", "mobile_number", "cell", "cell_phone", "cellphone", "handy",
    "handynummer", "mobil", "mobilnummer", "mobiltelefon", "movil", "portable", "phone", "phone_number",
    "phone_1_value", "telephone", "telefon", "telefonnummer", "tel", "telefono", "email", "e_mail", "mail",
    "email_address", "e_mail_address", "e_mail_adresse", "e_mail_1_value", "correo",
)  # fmt: skip
NAME_COLUMNS = ("name", "full_name", "fullname", "display_name", "kunde", "kundenname", "client", "customer", "nombre")
FIRST_NAME_COLUMNS = ("first_name", "firstname", "given_name", "vorname", "prenom")
LAST_NAME_COLUMNS = ("last_name", "lastname", "surname", "family_name", "nachname", "familienname", "nom", "apellido")
ZONE_COLUMNS = ("time_zone", "timezone", "zeitzone")
CONTACT_COLUMNS = ("client_id", "handle", "is_primary")
NEVER_WRITTEN = {"id", "attributes"}  # columns of clients that a file does not fill, whatever its columns are called


class ImportRefused(Exception):
    """The file, or the table, does not allow this import; nothing is written. The message says what to do.

    `status` is the one for HTTP: 400 if the file is at fault, 409 if something has changed in the meantime.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# --- the tables that are really there -----------------------------------------------------------------


class Attribute(NamedTuple):
    """A column of a table, as the catalogue describes it."""

    type: str
    default: str | None  # an expression
    is_required: bool  # NOT NULL, without a default


class Clients(NamedTuple):
    """What this database's `clients` has: its columns (without generated ones), and how a new id is made."""

    columns: dict[str, Attribute]
    key_type: str
    new_id: str | None  # an expression
    has_attributes: bool
    required_of_contact: list[str]  # columns of contact_relationships that an import does not fill

    def writable(self, name: str) -> bool:
        return name in self.columns and name not in NEVER_WRITTEN

    def type_of(self, name: str) -> str:
        return self.columns[name].type

    def has_text(self, name: str) -> bool:
        return name in self.columns and self.type_of(name).startswith(("text", "character varying"))


def read_clients(quinn: Connection) -> Clients:
    """Read the columns of clients and contact_relationships from the catalogue. Raises ImportRefused."""
    statement = """
        SELECT attrelid = to_regclass('clients'), attname, format_type(atttypid, atttypmod),
               pg_get_expr(adbin, adrelid), attnotnull AND adbin IS NULL AND attidentity = '',
               pg_get_serial_sequence(attrelid::regclass::text, attname)
          FROM pg_attribute
          LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
         WHERE attrelid IN (to_regclass('clients'), to_regclass('contact_relationships'))
           AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
         ORDER BY attnum
    """
    rows = db.query(quinn, statement)
    ours = [row[1:] for row in rows if row[0]]
    columns = {name: Attribute(kind, default, required) for name, kind, default, required, _ in ours}
    contact = {name: required for of_clients, name, _, _, required, _ in rows if not of_clients}
    if "id" not in columns or not contact:
        raise ImportRefused("there is no table clients, or no contact_relationships: run `python db.py migrate`")
    sequence = next(sequence for name, *_, sequence in ours if name == "id")
    new_id = columns["id"].default or (f"nextval('{sequence}')" if sequence else None)
    if new_id is None and columns["id"].type == "uuid":
        new_id = "gen_random_uuid()"
    needed = [name for name, required in contact.items() if required and name not in CONTACT_COLUMNS]
    has_attributes = "attributes" in columns and columns["attributes"].type == "jsonb"
    return Clients(columns, columns["id"].type, new_id, has_attributes, needed)


# --- which column becomes what ------------------------------------------------------------------------


class Place(NamedTuple):
    """Where one column of the file goes. `column` is of `clients`, `attribute` a key of clients.attributes."""

    field: int
    header: str
    is_handle: bool
    column: str | None
    attribute: str | None
    part: str | None  # `name`, `first` or `last`: which part of the name it is


def normalise(header: str) -> str:
    """Return a header as a name for templates: `E-Mail 1` is e_mail_1, `Straße` is strasse, `2024` is _2024."""
    decomposed = unicodedata.normalize("NFKD", header.casefold())
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    name = re.sub(r"\W+", "_", letters).strip("_")
    return f"_{name}" if name[:1].isdigit() else name


def _find(header: Sequence[str], wanted: str, option: str) -> int:
    """Return the index of the column that an option names. Raises ImportRefused."""
    found = [index for index, name in enumerate(header) if wanted in (name, normalise(name))]
    if len(found) != 1:
        listed = ", ".join(name for name in header if name)
        raise ImportRefused(f"{option} {wanted}: {len(found)} columns have this name. The columns are {listed}")
    return found[0]


def _choose(names: Sequence[str], known: Sequence[str]) -> int | None:
    """Return the index of the column whose name comes first in `known`."""
    found = [(known.index(name), index) for index, name in enumerate(names) if name in known]
    return min(found)[1] if found else None


def place(
    header: Sequence[str],
    clients: Clients,
    handle: Sequence[str] = (),
    name: str | None = None,
    ignore: Sequence[str] = (),
) -> list[Place]:
    """Return what each column with a name becomes, handles in their order first. Raises ImportRefused."""
    names = [normalise(column) for column in header]
    left_out = {_find(header, column, "--ignore") for column in ignore}
    known = ["" if index in left_out else column for index, column in enumerate(names)]
    addresses = [_find(header, column, "--handle") for column in handle] or sorted(
        (index for index, column in enumerate(known) if column in HANDLE_COLUMNS),
        key=lambda index: HANDLE_COLUMNS.index(known[index]),
    )
    if not addresses:
        listed = ", ".join(column for column in header if column)
        raise ImportRefused(
            "no column is called phone, mobile, telefon, email or the like: name the one with the phone number or "
            f"e-mail address, --handle COLUMN. The columns are {listed}. (The first line must have their names.)"
        )
    parts = {
        "name": _find(header, name, "--name") if name else _choose(known, NAME_COLUMNS),
        "first": _choose(known, FIRST_NAME_COLUMNS),
        "last": _choose(known, LAST_NAME_COLUMNS),
        "zone": _choose(known, ZONE_COLUMNS),
    }
    part_of = {index: part for part, index in parts.items() if index is not None and index not in addresses}
    rest = [index for index, column in enumerate(known) if column and index not in addresses]
    places = [
        _place_one(index, header[index], names[index], index in addresses, part_of.get(index), clients)
        for index in [*addresses, *rest]
    ]
    _refuse_conflicts(places, clients)
    return places


def _place_one(index: int, header: str, name: str, is_handle: bool, part: str | None, clients: Clients) -> Place:
    """Return where one column goes: to the column of `clients` with its name, else to the attributes."""
    field = {"name": "name", "first": "first_name", "last": "last_name", "zone": "time_zone"}.get(part or "", name)
    names = (field, name, "email") if is_handle and "mail" in name else (field, name)
    column = next((each for each in names if clients.writable(each)), None)
    attribute = None
    if column is None and not is_handle and clients.has_attributes:
        attribute = f"file_{field}" if field in NEVER_WRITTEN else field
    return Place(index, header, is_handle, column, attribute, part)


def _refuse_conflicts(places: Sequence[Place], clients: Clients) -> None:
    """Raise ImportRefused if two columns have one target, or a column has none."""
    targets: dict[str, str] = {}
    for each in places:
        target = each.column or each.attribute
        if target and target in targets:
            raise ImportRefused(
                f"the columns {targets[target]} and {each.header} would both become {target}: rename one of them in "
                "the file, or leave it out with --ignore COLUMN"
            )
        if target:
            targets[target] = each.header
    becomes_name = clients.writable("name")
    lost = [
        each.header
        for each in places
        if not (each.is_handle or each.column or each.attribute)
        and not (each.part in ("first", "last") and becomes_name)
    ]
    if lost:
        raise ImportRefused(
            f"clients has no column for {', '.join(lost)}, and no attributes: add columns of these names "
            f"({', '.join(normalise(header) for header in lost)}), or leave them out with --ignore COLUMN"
        )


def written(clients: Clients, places: Sequence[Place]) -> list[str]:
    """Return the columns of `clients` that the file fills."""
    columns = [each.column for each in places if each.column]
    has_name = any(each.part in ("name", "first", "last") for each in places) and clients.writable("name")
    return [*columns, "name"] if has_name and "name" not in columns else columns
