"""Check the audience: who matches, over platforms' tables of many kinds; what is refused, and with which words.

The tables are temporary ones, which stand before the migrated ones in their session.
"""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import hypothesis
import psycopg2
import pytest
from hypothesis import strategies as st
from psycopg2 import sql
from testing import TestData

import audience
import client_fields
import db
import values

BATCH = "00000000-0000-4000-8000-00000000000a"
OTHER_BATCH = "00000000-0000-4000-8000-00000000000b"
REF = "0d3f1c2e-1111-4222-8333-444455556666"
ODD = '100% "odd"; DROP TABLE clients; --'
OUTREACH_TABLES = """
    CREATE TEMP TABLE contact_relationships (client_id {key}, handle TEXT, is_primary BOOLEAN);
    CREATE TEMP TABLE outreach_batches (id UUID);
    CREATE TEMP TABLE outreach_imports (id UUID, applied_at TIMESTAMPTZ);
    CREATE TEMP TABLE outreach_import_people (import_id UUID, client_id {key});
    CREATE TEMP TABLE outreach_batch_items (
        batch_id UUID, client_id {key}, status TEXT, sent_at TIMESTAMPTZ, updated_at TIMESTAMPTZ
    )
"""
# Clients 1 and 2 have everything, 3 has nothing, and the texts of 4 fit to no type.
EVERY_TYPE = """
    CREATE TYPE pg_temp.mood AS ENUM ('bad', 'so so', 'it''s %good');
    CREATE DOMAIN pg_temp.zip AS VARCHAR(5) CHECK (VALUE ~ '^[0-9]+$');
    CREATE TEMP TABLE clients (
        id BIGINT PRIMARY KEY, name TEXT, "Größe in cm" INTEGER, small SMALLINT, big BIGINT, price NUMERIC(10, 2),
        score DOUBLE PRECISION, ratio REAL, vip BOOLEAN, born DATE, seen TIMESTAMP, joined TIMESTAMPTZ, ref UUID,
        mood pg_temp.mood, moods pg_temp.mood[], tags TEXT[], marks INTEGER[], days DATE[], profile JSONB,
        documents JSONB[], code VARCHAR(5), letter CHAR(3), address INET, addresses INET[], zip pg_temp.zip, raw JSON,
        last_sent TEXT,
        "100% ""odd""; DROP TABLE clients; --" TEXT, attributes JSONB
    );
    INSERT INTO clients VALUES
    (1, 'Anna Müller', 170, 1, 5000000000, 12.50, 1.5, 0.1, true, '1990-05-01', LOCALTIMESTAMP - interval '10 days',
     '2026-01-31 12:00Z', '0d3f1c2e-1111-4222-8333-444455556666', 'it''s %good', '{bad}', '{Vip,"New York"}', '{1,2}',
     '{2026-01-31}', '{"n": 5, "tag": "Gold"}', ARRAY['"x"'::jsonb], 'ab', 'x', '10.0.0.1', '{10.0.0.1}', '01234', '{}',
     'never', 'odd one',
     '{"city": "Berlin", "age": "42", "visits": 7, "seen": "2026-01-31T10:00", "tags": ["Gold", "x"],
       "note": "100% sure_thing", "ok": true, "none": null, "name": "Annie", "list": [], "quo''te%s": "y"}'),
    (2, 'BOB', 180, -1, 3, 7, -2, 2.5, false, '2000-02-29', LOCALTIMESTAMP - interval '40 days', '2026-02-01 12:00Z',
     '00000000-0000-0000-0000-000000000000', 'bad', '{}', '{}', '{3,NULL}', '{2026-02-01}', '["Gold", "b"]',
     '{}', 'abc', 'xyz', '::1', '{}', '99999', '[]', '2020', 'even',
     '{"city": "berlin", "age": 9, "visits": "12.0", "seen": "2026-02-01", "tags": "gold", "note": "1000 sure things",
       "ok": false, "blank": " \\t\\u00a0"}'),
    (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
     NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (4, ' ', 0, 0, 0, 0, 'NaN', 'Infinity', NULL, 'infinity', '-infinity', 'infinity', NULL, NULL, NULL, '{NULL}',
     NULL, NULL, '"a Goldfish"', NULL, '', '', NULL, NULL, NULL, 'null', '', '%',
     '{"city": "Köln", "age": "forty", "visits": "1e999999", "seen": "2026-02-30", "tags": {"Gold": 1}, "note": {},
       "ok": "yes", "city ": 1}');
    INSERT INTO contact_relationships VALUES (1, '+49 (170) 111-11', true), (1, '+1 999', true), (1, 'zz@x.org', false),
        (2, ' Bob@Example.com', true), (2, ' +49', false), (4, NULL, true), (4, 'a@b.org', false);
    INSERT INTO outreach_batches VALUES ('00000000-0000-4000-8000-00000000000a'),
        ('00000000-0000-4000-8000-00000000000b');
    INSERT INTO outreach_imports VALUES ('00000000-0000-4000-8000-00000000000a', now()),
        ('00000000-0000-4000-8000-00000000000b', NULL);
    INSERT INTO outreach_import_people VALUES ('00000000-0000-4000-8000-00000000000a', 1),
        ('00000000-0000-4000-8000-00000000000a', 3);
    INSERT INTO outreach_batch_items VALUES
        ('00000000-0000-4000-8000-00000000000a', 1, 'sent', now() - interval '10 days', now()),
        ('00000000-0000-4000-8000-00000000000b', 1, 'sent', now() - interval '50 days', now()),
        ('00000000-0000-4000-8000-00000000000a', 2, 'failed', NULL, now() - interval '20 days'),
        ('00000000-0000-4000-8000-00000000000b', 2, 'skipped', NULL, now()),
        ('00000000-0000-4000-8000-00000000000b', 4, 'sent', now() - interval '40 days', now())
"""


@contextlib.contextmanager
def platform(url: str, tables: str, key: str = "BIGINT") -> Iterator[Any]:
    """Connect to a database in which these tables are."""
    with contextlib.closing(db.connect(url)) as conn:
        db.query(conn, "SET TimeZone = 'UTC'")
        db.query(conn, OUTREACH_TABLES.format(key=key))
        db.query(conn, tables)
        yield conn


@pytest.fixture(scope="module")
def quinn(postgres: str) -> Iterator[Any]:
    """A platform whose `clients` has a column of every type. No test changes it."""
    with platform(postgres, EVERY_TYPE) as conn:
        yield conn


def search(conn: Any, where: object) -> list[str]:
    """Return who matches, by both statements: the one over everybody, and the one for a few."""
    fields = audience.read_fields(conn)
    query = audience.parse({"v": 1, "where": where}, fields)
    assert audience.parse(query, fields) == query
    condition, params = audience.condition(json.loads(json.dumps(query)), fields)
    with conn.cursor() as cursor:
        cursor.execute(sql.SQL("SELECT id::text FROM clients AS client WHERE {} ORDER BY id").format(condition), params)
        found = [client_id for (client_id,) in cursor.fetchall()]
    everybody = [client_id for (client_id,) in db.query(conn, "SELECT id::text FROM clients")]
    assert audience.matching(conn, query, everybody) == set(found)
    return found


def leaf(field: str, operator: str, value: object) -> dict[str, object]:
    return {"field": field, operator: value}


# --- who matches --------------------------------------------------------------------------------------

WHO: list[tuple[str, str, object, str]] = [
    # text
    ("name", "eq", "BOB", "2"),
    ("name", "eq", "bob", ""),
    ("name", "ne", "BOB", "134"),
    ("name", "lt", "B", "14"),
    ("name", "lte", "BOB", "124"),
    ("name", "gt", "B", "2"),
    ("name", "gte", "BOB", "2"),
    ("name", "in", ["BOB", "Anna Müller"], "12"),
    ("name", "contains", "bo", "2"),
    ("name", "contains", "MÜLL", "1"),
    ("name", "contains", "%", ""),
    ("name", "contains", "_", ""),
    ("name", "empty", True, "34"),
    ("name", "empty", False, "12"),
    # a value longer than the column is no shorter value
    ("code", "eq", "ab", "1"),
    ("code", "eq", "abc   ", ""),
    ("code", "in", ["abc", "abcdefgh"], "2"),
    ("letter", "eq", "x", "1"),
    ("zip", "eq", "01234", "1"),
    ("zip", "eq", 1234, "1"),
    ("zip", "contains", "99", "2"),
    ("zip", "empty", True, "34"),
    # numbers
    ("Größe in cm", "eq", 170, "1"),
    ("Größe in cm", "eq", "170", "1"),
    ("Größe in cm", "eq", 170.0, "1"),
    ("Größe in cm", "ne", 170, "234"),
    ("Größe in cm", "gt", 170, "2"),
    ("Größe in cm", "in", [0, "180"], "24"),
    ("Größe in cm", "empty", True, "3"),
    ("small", "lt", 0, "2"),
    ("big", "gte", 5_000_000_000, "1"),
    ("price", "eq", 12.5, "1"),
    ("price", "lt", "12.50", "24"),
    ("price", "in", [7, 12.5], "12"),
    ("score", "gt", 1.4, "14"),
    ("ratio", "eq", 0.1, "1"),
    ("ratio", "lt", 1e10, "12"),
    # booleans, UUIDs, enums
    ("vip", "eq", True, "1"),
    ("vip", "eq", "false", "2"),
    ("vip", "ne", True, "234"),
    ("vip", "in", [True, False], "12"),
    ("vip", "empty", True, "34"),
    ("ref", "eq", REF.upper(), "1"),
    ("ref", "in", [REF], "1"),
    ("ref", "ne", REF, "234"),
    ("mood", "eq", "it's %good", "1"),
    ("mood", "lt", "so so", "2"),
    ("mood", "in", ["bad", "so so"], "2"),
    ("mood", "ne", "bad", "134"),
    ("mood", "empty", False, "12"),
    # dates and times
    ("born", "eq", "1990-05-01", "1"),
    ("born", "lt", "2000-02-29", "1"),
    ("born", "gt", "1990-05-01", "24"),
    ("born", "in", ["1990-05-01", "2000-02-29"], "12"),
    ("born", "before_days", 365, "12"),
    ("born", "within_days", 365, ""),
    ("born", "empty", True, "3"),
    ("seen", "within_days", 30, "1"),
    ("seen", "before_days", 30, "24"),
    ("seen", "lt", "2100-01-01T00:00", "124"),
    ("joined", "eq", "2026-01-31", "1"),
    ("joined", "lte", "2026-01-31", "1"),
    ("joined", "gt", "2026-01-31", "24"),
    ("joined", "eq", "2026-01-31T13:00:00+01:00", "1"),
    ("joined", "gt", "2026-01-31T12:00:00Z", "24"),
    ("joined", "in", ["2026-01-31", "2026-02-01T12:00Z"], "12"),
    ("joined", "ne", "2026-01-31", "234"),
    ("joined", "within_days", 0, ""),
    # lists: `contains` and `in` look for an element
    ("tags", "contains", "vip", "1"),
    ("tags", "contains", "VI", ""),
    ("tags", "contains", "%", ""),
    ("tags", "in", ["x", "New York"], "1"),
    ("tags", "empty", True, "23"),
    ("tags", "empty", False, "14"),
    ("marks", "contains", 2, "1"),
    ("marks", "in", [3, 4], "2"),
    ("moods", "contains", "bad", "1"),
    ("days", "in", ["2026-01-31"], "1"),
    ("documents", "contains", "X", "1"),
    # JSON
    ("profile", "contains", "gold", "124"),
    ("profile", "in", ["Gold"], "12"),
    ("profile", "eq", "a Goldfish", "4"),
    ("profile", "empty", True, "3"),
    # types that are compared as text
    ("address", "eq", "::1", "2"),
    ("address", "contains", "10.0", "1"),
    ("addresses", "contains", "10.0.0.1", "1"),
    ("address", "empty", True, "34"),
    ("raw", "eq", "[]", "2"),
    # a name that no statement expects
    (ODD, "eq", "odd one", "1"),
    (ODD, "contains", "%", "4"),
    (ODD, "empty", True, "3"),
    # keys of `attributes`
    ("city", "eq", "Berlin", "1"),
    ("city", "ne", "Berlin", "234"),
    ("city", "in", ["Berlin", "Köln"], "14"),
    ("city", "contains", "BERL", "12"),
    ("city", "contains", "köLN", "4"),
    ("city", "empty", True, "3"),
    ("city", "gte", "K", "24"),
    ("city ", "eq", 1, "4"),
    ("age", "eq", "42", "1"),
    ("age", "eq", 42, "1"),
    ("age", "lt", 42, "2"),
    ("age", "gt", 9.5, "1"),
    ("age", "ne", 42, "234"),
    ("age", "in", [9, "forty"], "24"),
    ("visits", "gte", 7, "12"),
    ("visits", "eq", 12, "2"),
    ("seen", "gte", "2020-01-01", "12"),  # the column, not the key
    ("attributes.seen", "lte", "2026-01-31", "1"),
    ("attributes.seen", "gt", "2026-01-31", "24"),
    ("attributes.seen", "before_days", 10, "124"),
    ("attributes.seen", "within_days", 36_500, "124"),
    ("attributes.seen", "eq", "2026-02-01", "2"),
    ("attributes.tags", "contains", "GOLD", "12"),
    ("attributes.tags", "in", ["x", "gold"], "12"),
    ("note", "contains", "100%", "1"),
    ("note", "contains", "e_t", "1"),
    ("ok", "eq", True, "1"),
    ("ok", "ne", True, "234"),
    ("none", "empty", True, "1234"),
    ("blank", "empty", True, "1234"),
    ("list", "empty", True, "1234"),
    ("note", "empty", True, "34"),
    ("quo'te%s", "eq", "y", "1"),
    ("attributes.name", "eq", "Annie", "1"),
    ("attributes", "contains", "Berlin", "12"),
    # outreach's own: the primary handle is the first one in order
    ("handle.kind", "eq", "phone", "1"),
    ("handle.kind", "eq", "email", "2"),
    ("handle.kind", "ne", "phone", "234"),
    ("handle.kind", "in", ["phone", "email"], "12"),
    ("handle.kind", "empty", True, "34"),
    ("handle.prefix", "eq", "+1 9", "1"),
    ("handle.prefix", "eq", "+49", ""),
    ("handle.prefix", "ne", "+1", "234"),
    ("handle.prefix", "in", ["+4", "BOB@"], "2"),
    ("handle.prefix", "eq", "bob@example.com", "2"),
    ("handle.prefix", "eq", "bob@examplexcom", ""),
    ("handle.prefix", "empty", False, "12"),
    ("import.id", "eq", BATCH, "13"),
    ("import.id", "ne", BATCH, "24"),
    ("import.id", "in", [BATCH], "13"),
    ("batch.sent", "eq", BATCH, "1"),
    ("batch.sent", "eq", BATCH.upper(), "1"),
    ("batch.sent", "ne", BATCH, "234"),
    ("batch.sent", "in", [BATCH, OTHER_BATCH], "14"),
    ("batch.failed", "eq", BATCH, "2"),
    ("batch.skipped", "eq", OTHER_BATCH, "2"),
    ("batch.skipped", "ne", OTHER_BATCH, "134"),
    ("last_sent", "within_days", 30, "1"),
    ("last_sent", "before_days", 30, "4"),
    ("last_sent", "empty", True, "23"),
    ("last_sent", "empty", False, "14"),
    ("sent_count", "eq", 0, "23"),
    ("sent_count", "ne", 0, "14"),
    ("sent_count", "ne", 1, "123"),
    ("sent_count", "lt", 2, "234"),
    ("sent_count", "lte", 0, "23"),
    ("sent_count", "gt", 1, "1"),
    ("sent_count", "gte", 0, "1234"),
    ("sent_count", "gt", -1, "1234"),
    ("sent_count", "in", [0, 2], "123"),
    ("sent_count", "empty", True, "23"),
    ("last_failed", "within_days", 30, "2"),
    ("last_failed", "before_days", 30, ""),
]


@pytest.mark.parametrize(("field", "operator", "value", "expected"), WHO)
def test_each_operator_finds_who_it_says(quinn: Any, field: str, operator: str, value: object, expected: str) -> None:
    assert "".join(search(quinn, leaf(field, operator, value))) == expected
    assert "".join(search(quinn, {"not": leaf(field, operator, value)})) == "".join(sorted(set("1234") - set(expected)))


def test_a_time_beside_a_date_is_its_day(quinn: Any) -> None:
    sent, month_ago = (str(datetime.now(UTC).date() - timedelta(days=days)) for days in (10, 30))
    assert search(quinn, leaf("last_sent", "eq", sent)) == ["1"]
    assert search(quinn, leaf("last_sent", "in", ["2000-01-01", sent])) == ["1"]
    assert search(quinn, leaf("last_sent", "ne", sent)) == ["2", "3", "4"]
    assert search(quinn, leaf("last_sent", "lt", month_ago)) == ["4"]
    assert search(quinn, leaf("seen", "eq", sent)) == ["1"]


BERLIN, BOB = leaf("city", "eq", "Berlin"), leaf("name", "eq", "BOB")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"everyone": True}, "1234"),
        ({"not": {"everyone": True}}, ""),
        ({"all": [BERLIN]}, "1"),
        ({"all": [BERLIN, BOB]}, ""),
        ({"any": [BERLIN, BOB]}, "12"),
        ({"not": {"any": [BERLIN, BOB]}}, "34"),
        ({"not": {"all": [leaf("name", "gt", "A"), leaf("vip", "eq", True)]}}, "234"),
        ({"all": [{"not": leaf("batch.sent", "eq", BATCH)}, {"not": BOB}]}, "34"),
        ({"any": [leaf("sent_count", "eq", 0), leaf("last_sent", "before_days", 30)]}, "234"),
        ({"any": [{"all": [{"not": {"not": BERLIN}}]}]}, "1"),
    ],
)
def test_all_any_and_not_combine(quinn: Any, where: object, expected: str) -> None:
    assert "".join(search(quinn, where)) == expected


# --- other platforms ----------------------------------------------------------------------------------

PLATFORMS = {
    "key UUID, no attributes": (
        "UUID",
        f"""
        CREATE TEMP TABLE clients ("id" UUID PRIMARY KEY, "Last Name" VARCHAR(40), "order" INT);
        INSERT INTO clients VALUES ('{REF}', 'Smith', 1), ('{BATCH}', NULL, NULL);
        INSERT INTO contact_relationships VALUES ('{REF}', '+4917', true);
        INSERT INTO outreach_batch_items VALUES (NULL, '{REF}', 'sent', now(), now())
        """,
        REF,
    ),
    "key TEXT, attributes that are no JSONB": (
        "TEXT",
        """
        CREATE TEMP TABLE clients (id TEXT, "Last Name" TEXT, "order" INT, attributes TEXT);
        INSERT INTO clients VALUES ('c''1%', 'Smith', 1, 'x'), ('2', NULL, NULL, '{}');
        INSERT INTO contact_relationships VALUES ('c''1%', '+4917', true);
        INSERT INTO outreach_batch_items VALUES (NULL, 'c''1%', 'sent', now(), now())
        """,
        "c'1%",
    ),
    "key VARCHAR, a view": (
        "VARCHAR(8)",
        """
        CREATE TEMP TABLE people (number INT, surname TEXT, position INT);
        INSERT INTO people VALUES (7, 'Smith', 1), (8, '', NULL);
        CREATE TEMP VIEW clients AS SELECT ('c' || number)::varchar(8) AS id, surname AS "Last Name",
            position AS "order", CASE number WHEN 7 THEN jsonb_build_object('a', 1) ELSE '[1]' END AS attributes
            FROM people;
        INSERT INTO contact_relationships VALUES ('c7', '+4917', true);
        INSERT INTO outreach_batch_items VALUES (NULL, 'c7', 'sent', now(), now())
        """,
        "c7",
    ),
    "key CHAR": (
        "CHAR(4)",
        """
        CREATE TEMP TABLE clients (id CHAR(4), "Last Name" CHAR(9), "order" INT);
        INSERT INTO clients VALUES ('c1', 'Smith', 1), ('c234', NULL, NULL);
        INSERT INTO contact_relationships VALUES ('c1', '+4917', true);
        INSERT INTO outreach_batch_items VALUES (NULL, 'c1', 'sent', now(), now())
        """,
        "c1",
    ),
}


@pytest.mark.parametrize("name", PLATFORMS)
@pytest.mark.parametrize(
    "where",
    [
        leaf("Last Name", "eq", "Smith"),
        leaf("order", "in", [1]),
        leaf("handle.prefix", "eq", "+49"),
        leaf("last_sent", "within_days", 1),
        {"not": leaf("Last Name", "empty", True)},
    ],
)
def test_the_key_and_the_columns_may_be_of_any_type(postgres: str, name: str, where: object) -> None:
    key, tables, expected = PLATFORMS[name]
    with platform(postgres, tables, key) as conn:
        assert search(conn, where) == [expected]


def test_the_fields_are_the_columns_the_keys_that_somebody_has_and_outreachs_own(quinn: Any) -> None:
    names = audience.field_names(audience.read_fields(quinn))
    assert names[:3] == ["id", "name", "Größe in cm"]
    assert {"city", "city ", "quo'te%s", "attributes.name", "attributes.seen", "handle.kind", "sent_count"} < set(names)
    assert len(names) == len(set(names))


def test_all_keys_are_found_also_if_each_client_has_other_ones(postgres: str) -> None:
    tables = """
        CREATE TEMP TABLE clients (id BIGINT, attributes JSONB);
        INSERT INTO clients SELECT i, CASE WHEN i % 3 = 0 THEN '{"a": 1}' ELSE '7'::jsonb END
                              FROM generate_series(1, 3000) AS i;
        INSERT INTO clients VALUES (0, '{"rare": 1}'), (-1, NULL), (-2, '{}')
    """
    with platform(postgres, tables) as conn:
        assert audience.read_fields(conn).attribute_keys == {"a", "rare"}
        many = "INSERT INTO clients SELECT i, jsonb_build_object('k' || i, 1) FROM generate_series(1, 2000) AS i"
        db.query(conn, many)
        assert len(audience.read_fields(conn).attribute_keys) == client_fields.MAX_KEYS


def test_a_number_too_long_for_the_type_is_no_number(postgres: str) -> None:
    tables = """
        CREATE TEMP TABLE clients (id BIGINT, score TEXT);
        INSERT INTO clients VALUES (1, repeat('9', 200000)), (2, '7')
    """
    with platform(postgres, tables) as conn:
        assert search(conn, leaf("score", "gt", 5)) == ["2"]


def test_a_column_that_this_role_may_not_read_is_no_field(postgres: str) -> None:
    tables = """
        CREATE TEMP TABLE clients (id BIGINT, name TEXT, secret TEXT);
        DO $$ BEGIN CREATE ROLE audience_reader; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
        GRANT SELECT (id, name) ON clients TO audience_reader;
        SET ROLE audience_reader
    """
    with platform(postgres, tables) as conn:
        try:
            assert list(client_fields.read_columns(conn).columns) == ["id", "name"]
        finally:
            db.query(conn, "RESET ROLE; DROP OWNED BY audience_reader; DROP ROLE audience_reader")


def test_empty_means_what_it_means_for_a_template(quinn: Any) -> None:
    codes = [code for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    statement = f"SELECT code FROM unnest(%(codes)s) AS code WHERE NOT chr(code) ~ {audience.SQL_NOT_BLANK}"
    blank = {code for (code,) in db.query(quinn, statement, {"codes": codes})}
    assert blank == {code for code in codes if values.is_blank(chr(code))}


def test_citext_is_compared_without_regard_to_case(postgres: str) -> None:
    assert client_fields._kind("citext", "b", "S", "public.citext", False) == ("text", "public.citext")


def test_a_nondeterministic_collation_needs_no_exception(postgres: str) -> None:
    tables = """
        CREATE TEMP TABLE clients (id BIGINT, name TEXT COLLATE pg_temp.loose, names TEXT[] COLLATE pg_temp.loose);
        INSERT INTO clients VALUES (1, 'Anna', '{Anna}'), (2, '', NULL)
    """
    collation = "CREATE COLLATION pg_temp.loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    with contextlib.closing(db.connect(postgres)) as conn:
        try:
            db.query(conn, collation)
        except psycopg2.errors.FeatureNotSupported:
            pytest.skip("this PostgreSQL was built without ICU")
    with platform(postgres, f"{collation}; {tables}") as conn:
        assert search(conn, leaf("name", "contains", "NN")) == ["1"]
        assert search(conn, leaf("name", "empty", True)) == ["2"]
        assert search(conn, leaf("names", "contains", "anna")) == ["1"]


def test_a_column_that_has_gone_is_an_error_and_no_key(world: TestData) -> None:
    conn = world.databases.quinn
    client_id = world.client()
    world.quinn("ALTER TABLE clients ADD COLUMN city TEXT")
    query = audience.parse({"v": 1, "where": leaf("city", "ne", "Berlin")}, audience.read_fields(conn))
    assert audience.matching(conn, query, [client_id]) == {client_id}
    world.quinn("ALTER TABLE clients DROP COLUMN city")
    with pytest.raises(audience.QueryError, match='no column "city" any more'):
        audience.matching(conn, query, [client_id])


def test_a_recheck_looks_only_at_the_clients_that_it_is_given(world: TestData) -> None:
    conn = world.databases.quinn
    first, second = world.client(), world.client()
    query = audience.parse(
        {"v": 1, "limit": 1, "where": leaf("handle.kind", "eq", "phone")}, audience.read_fields(conn)
    )
    assert audience.matching(conn, query, [second]) == {second}
    assert audience.matching(conn, query, [first, second]) == {first, second}
    assert audience.matching(conn, query, []) == set()
    world.quinn("DELETE FROM contact_relationships")
    assert audience.matching(conn, query, [first, second]) == set()


@pytest.mark.parametrize("analyze", [True, False])
def test_a_recheck_scans_neither_all_handles_nor_all_items(world: TestData, analyze: bool) -> None:
    conn = world.databases.quinn
    batch_id = world.batch()
    world.quinn("INSERT INTO clients (name) SELECT 'n' || i FROM generate_series(1, 5000) AS i")
    world.quinn("INSERT INTO contact_relationships SELECT id, '+4917' || name, true FROM clients")
    items = """
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, status, sent_at)
        SELECT %(batch_id)s, id, 'Hello!', 'sent', now() FROM clients
    """
    world.quinn(items, batch_id=batch_id)
    if analyze:
        world.quinn("ANALYZE")
    where = {
        "all": [
            leaf("handle.prefix", "eq", "+49"),
            leaf("sent_count", "lt", 5),
            leaf("batch.sent", "eq", batch_id),
            {"any": [leaf("sent_count", "eq", 0), leaf("last_sent", "within_days", 1)]},
            {"not": leaf("batch.failed", "eq", batch_id)},
        ]
    }
    query = audience.parse({"v": 1, "where": where}, audience.read_fields(conn))
    some = [client_id for (client_id,) in world.quinn("SELECT id::text FROM clients LIMIT 20")]
    scanned = "SELECT relname, seq_tup_read FROM pg_stat_xact_user_tables WHERE seq_tup_read > 0 ORDER BY relname"
    conn.autocommit = False
    world.quinn("SELECT 1")
    before = world.quinn(scanned)
    assert audience.matching(conn, query, some) == set(some)
    assert world.quinn(scanned) == before
    conn.rollback()
    conn.autocommit = True


# --- what is refused ----------------------------------------------------------------------------------

EVERYONE = {"everyone": True}


def deep(levels: int) -> dict[str, object]:
    node: dict[str, object] = dict(EVERYONE)
    for _ in range(levels - 1):
        node = {"not": node}
    return node


REFUSED: list[tuple[object, str]] = [
    # the document
    (None, "the query must be a JSON object"),
    ([], "the query must be a JSON object"),
    ({}, 'the query must be a JSON object that is not empty; for everyone, write {"everyone": true}'),
    ("everyone", "the query must be a JSON object"),
    ({"v": 1}, 'has no "where"'),
    ({"where": EVERYONE}, '"v" must be 1'),
    ({"v": 2, "where": EVERYONE}, '"v" must be 1'),
    ({"v": True, "where": EVERYONE}, '"v" must be 1'),
    ({"v": 1.0, "where": EVERYONE}, '"v" must be 1'),
    ({"v": 1, "where": EVERYONE, "order": 1}, 'the query has "order", which is unknown here'),
    ({"v": 1, "where": EVERYONE, "limit": 0}, "limit must be a whole number from 1"),
    ({"v": 1, "where": EVERYONE, "limit": "5"}, "limit must be a whole number"),
    ({"v": 1, "where": EVERYONE, "limit": True}, "limit must be a whole number"),
    ({"v": 1, "where": EVERYONE, "limit": 1.5}, "limit must be a whole number"),
    ({"v": 1, "where": EVERYONE, "limit": 10**12}, "limit must be a whole number"),
    # nodes
    ({"v": 1, "where": {}}, "where must be a JSON object that is not empty"),
    ({"v": 1, "where": []}, "where must be a JSON object that is not empty"),
    ({"v": 1, "where": {"all": []}}, "where.all must be a list with at least one node"),
    ({"v": 1, "where": {"any": {}}}, "where.any must be a list with at least one node"),
    ({"v": 1, "where": {"not": {}}}, "where.not must be a JSON object that is not empty"),
    ({"v": 1, "where": {"not": [EVERYONE]}}, "where.not must be a JSON object"),
    ({"v": 1, "where": {"everyone": 1}}, '"everyone" must be true'),
    ({"v": 1, "where": {"everyone": False}}, '"everyone" must be true'),
    ({"v": 1, "where": {"all": [EVERYONE], "any": [EVERYONE]}}, 'it has "all", "any"'),
    ({"v": 1, "where": {"and": [EVERYONE]}}, 'where must have one of "all", "any", "not"'),
    ({"v": 1, "where": {"all": [EVERYONE, {"x": 1}]}}, r"where.all[1] must have one of"),
    ({"v": 1, "where": deep(6)}, "where.not.not.not.not.not: at most 5 nodes"),
    ({"v": 1, "where": {"any": [EVERYONE] * 51}}, "where.any[50]: at most 50 conditions"),
    # leaves
    ({"v": 1, "where": {"field": "city"}}, "where must have one operator, and has none"),
    ({"v": 1, "where": {"field": "city", "eq": "x", "ne": "y"}}, 'must have one operator, and has "eq", "ne"'),
    ({"v": 1, "where": {"field": "city", "equals": "x"}}, 'where has "equals", which is unknown here'),
    ({"v": 1, "where": {"field": "city", "eq": "x", "all": []}}, 'where has "all"'),
    ({"v": 1, "where": {"eq": "x"}}, 'or "field" and an operator; it has "eq"'),
    ({"v": 1, "where": {"field": 5, "eq": "x"}}, "where.field must be a text"),
    ({"v": 1, "where": {"field": None, "eq": "x"}}, "where.field must be a text"),
    (
        {"v": 1, "where": {"field": "ctiy", "eq": "x"}},
        'no field "ctiy". Did you mean "city"? The fields are: id, name,',
    ),
    ({"v": 1, "where": {"field": "City", "eq": "x"}}, 'no field "City". Did you mean "city"?'),
    ({"v": 1, "where": {"field": "attributes.nobody", "eq": "x"}}, 'no field "attributes.nobody"'),
    ({"v": 1, "where": {"field": "", "eq": "x"}}, 'no field ""'),
    ({"v": 1, "where": {"field": "a\x00\ud800", "eq": "x"}}, "no field"),
    ({"v": 1, "where": {"field": "batch", "eq": BATCH}}, 'no field "batch"'),
]
VALUES: list[tuple[str, str, object, str]] = [
    ("name", "eq", None, 'where.eq is null: for "has no value"'),
    ("name", "eq", ["x"], "where.eq must be a text, a number"),
    ("name", "eq", {}, "where.eq must be a text, a number"),
    ("name", "eq", float("nan"), "where.eq must be a finite number"),
    ("name", "eq", float("inf"), "where.eq must be a finite number"),
    ("name", "eq", "a\x00b", "a character that no text in the database can contain"),
    ("name", "eq", "\ud800", "a character that no text in the database can contain"),
    ("name", "eq", 10**400, "outside the range"),
    ("name", "in", "x", "where.in must be a list with at least one value"),
    ("name", "in", [], "where.in must be a list with at least one value"),
    ("name", "in", ["x", None], "where.in[1] is null"),
    ("name", "in", ["x"] * 1001, "where.in: at most 1,000 values"),
    ("name", "contains", " ", "where.contains must be a text that is not blank"),
    ("name", "contains", True, "where.contains must be a text"),
    ("name", "gt", True, "where.gt must be a text or a number"),
    ("age", "gt", "18", 'is a number in quotes, and as texts "9" is after "10": write 18 without'),
    ("name", "empty", "yes", "where.empty must be true or false"),
    ("name", "empty", 1, "where.empty must be true or false"),
    ("born", "before_days", "30", "where.before_days must be a whole number from 0 to 36,500"),
    ("born", "within_days", -1, "must be a whole number"),
    ("born", "within_days", 10**6, "must be a whole number"),
    ("Größe in cm", "eq", "abc", '"abc" does not fit: "Größe in cm" has whole numbers from -2147483648 to 2147483647'),
    ("Größe in cm", "eq", 2**31, "whole numbers from"),
    ("Größe in cm", "eq", 1.5, "whole numbers from"),
    ("Größe in cm", "eq", True, "whole numbers from"),
    ("Größe in cm", "eq", "9" * 200, "whole numbers from"),
    ("Größe in cm", "contains", 1, '"contains" cannot be used with it; use "eq", "ne"'),
    ("small", "eq", 40_000, "whole numbers from -32768"),
    ("big", "eq", 2**63, "whole numbers from"),
    ("marks", "contains", "x", "whole numbers from"),
    ("price", "eq", "1,50", '"1,50" is no number, such as 12.5'),
    ("price", "eq", "NaN", "is no number"),
    ("price", "eq", False, "is no number"),
    ("ratio", "eq", 1e39, "outside the range"),
    ("ratio", "eq", 1e-50, "outside the range"),
    ("score", "eq", 10**309, "outside the range"),
    ("vip", "eq", "ja", '"vip" is a boolean'),
    ("vip", "eq", 1, '"vip" is a boolean'),
    ("vip", "lt", True, '"lt" cannot be used'),
    ("born", "eq", "Mars", '"Mars" is no date, such as 2026-01-31'),
    ("born", "eq", "2026-02-30", "is no date"),
    ("born", "eq", "20260131", "is no date"),
    ("born", "eq", "0000-01-01", "is no date"),
    ("born", "eq", "today", "is no date"),
    ("born", "eq", 2026, "is no date"),
    ("born", "eq", "2026-01-31T09:00:00", "is no date"),
    ("joined", "eq", "2026-01-31T09:00:00", "write 2026-01-31, or 2026-01-31T09:00:00+01:00"),
    ("joined", "eq", "2026-01-31T25:00:00Z", "is no date and no time"),
    ("joined", "eq", "0001-01-01T00:00:00+14:00", "is no date and no time"),
    ("seen", "eq", "2026-01-31T09:00:00Z", "write 2026-01-31, or 2026-01-31T09:00:00"),
    ("seen", "eq", "Mars", "is no date and no time"),
    ("ref", "eq", "x", '"x" is no UUID'),
    ("ref", "contains", "x", '"contains" cannot be used'),
    ("mood", "eq", "good", '"mood" is one of "bad", "so so", "it\'s %good"'),
    ("mood", "eq", 1, '"mood" is one of'),
    ("tags", "eq", "vip", 'is a list (a text), and "eq" cannot be used with it; use "contains", "in", "empty"'),
    ("address", "gt", "10.0.0.0", '"gt" cannot be used'),
    ("last_sent", "eq", "never", "is no date and no time"),
    ("sent_count", "eq", "many", "whole numbers"),
    ("handle.kind", "eq", "fax", '"handle.kind" is one of "phone", "email"'),
    ("handle.kind", "contains", "phone", '"contains" cannot be used'),
    ("handle.prefix", "eq", " ", "must be the beginning of a number"),
    ("handle.prefix", "eq", "+", "must be the beginning of a number"),
    ("handle.prefix", "eq", 49, "must be the beginning of a number"),
    ("handle.prefix", "eq", "(", "must be the beginning of a number"),
    ("batch.sent", "eq", "x", 'there is no batch with the id "x"'),
    ("batch.sent", "ne", REF, "there is no batch with the id"),
    ("import.id", "ne", OTHER_BATCH, "there is no import with the id"),  # its file is not imported yet
    ("batch.sent", "empty", True, '"empty" cannot be used'),
]


@pytest.mark.parametrize(
    ("query", "message"),
    REFUSED + [({"v": 1, "where": leaf(field, operator, value)}, words) for field, operator, value, words in VALUES],
)
def test_what_cannot_be_used_is_refused_with_words_that_help(quinn: Any, query: object, message: str) -> None:
    with pytest.raises(audience.QueryError) as refusal:
        audience.parse(query, audience.read_fields(quinn))
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 700


def test_the_limits_count_the_whole_document(quinn: Any) -> None:
    fields = audience.read_fields(quinn)

    def parse(where: object) -> None:
        audience.parse({"v": 1, "where": where}, fields)

    parse(deep(5))
    parse({"any": [EVERYONE] * 50})
    parse({"all": [leaf("name", "in", ["x"] * 500)] * 2})
    parse(leaf("name", "eq", "x" * 16_000))
    with pytest.raises(audience.QueryError, match="at most 1,000 values"):
        parse({"all": [leaf("name", "in", ["x"] * 500), leaf("name", "in", ["x"] * 501)]})
    with pytest.raises(audience.QueryError, match="at most 50 conditions"):
        parse({"all": [{"any": [EVERYONE] * 26}, {"any": [EVERYONE] * 25}]})
    with pytest.raises(audience.QueryError, match="bytes: at most 16,384"):
        parse({"all": [leaf("name", "eq", "ü" * 4_100)] * 2})
    with pytest.raises(audience.QueryError, match="at most 5 nodes"):
        parse(deep(900))


# --- SQL injection ------------------------------------------------------------------------------------

ATTACKS = [
    "'; DROP TABLE clients; --",
    "' OR '1'='1",
    '"; DROP TABLE clients; --',
    "\\'; DROP TABLE clients; --",
    "%(client_ids)s",
    "%s %% %d",
    "{0} {text}",
    "$$; DROP TABLE clients; $$",
    "') OR true --",
    "(((",
    "[a",
    "\\",
    "+1\\",
    "a@\\1*{2}",
    "ü@•\\d",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_string_becomes_sql(quinn: Any, attack: str) -> None:
    kinds = audience.read_fields(quinn).columns
    names = [name for name, column in kinds.items() if column.kind in ("text", "json", "other")]
    for name in [*names, "city", "handle.prefix"]:
        for operator in ("eq", "in", "contains", "lt"):
            with contextlib.suppress(audience.QueryError):
                value = [attack] if operator == "in" else attack
                assert search(quinn, leaf(name, operator, value)) in (
                    [],
                    ["2"],
                    ["1"],
                    ["4"],
                    ["1", "4"],
                    ["2", "4"],
                ) or (operator == "lt")
    with pytest.raises(audience.QueryError, match="no field"):
        search(quinn, leaf(attack, "eq", "x"))
    assert db.query(quinn, "SELECT count(*) FROM clients") == [(4,)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_column_or_a_key_may_have_any_name(postgres: str, attack: str) -> None:
    with platform(postgres, "CREATE TEMP TABLE clients (id BIGINT, attributes JSONB)") as conn:
        column = sql.Identifier(attack.replace("%", "%%"))
        with conn.cursor() as cursor:
            cursor.execute(sql.SQL("ALTER TABLE clients ADD COLUMN {} TEXT").format(column), {})
            insert = "INSERT INTO clients VALUES (1, %(attributes)s, 'x'), (2, NULL, NULL)"
            cursor.execute(insert, {"attributes": json.dumps({attack + "!": "y"})})
        assert search(conn, leaf(attack, "eq", "x")) == ["1"]
        assert search(conn, leaf(attack, "empty", True)) == ["2"]
        assert search(conn, leaf(attack + "!", "contains", "Y")) == ["1"]
        assert search(conn, leaf(attack + "!", "ne", attack)) == ["1", "2"]


# --- a naive reading ----------------------------------------------------------------------------------

Person = dict[str, Any]
texts = st.sampled_from(["Berlin", "berlin", "", " ", "a_b", "a%b", "10", "9", "9.0", "2026-01-31", "x"])
numbers = st.sampled_from([0, 9, 10, -1, 9.5])


def depth(node: dict[str, Any]) -> int:
    [inner] = node.values() if len(node) == 1 else [None]
    children = inner if isinstance(inner, list) else [inner] if isinstance(inner, dict) else []
    return 1 + max(map(depth, children), default=0)


people = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.none() | texts,
            "count": st.none() | st.integers(-2, 10),
            "attributes": st.none()
            | st.dictionaries(st.just("key"), texts | numbers | st.none() | st.booleans(), max_size=1),
            "sent": st.sampled_from([0, 0, 1, 3]),
        }
    ),
    max_size=6,
)
leaves = st.one_of(
    st.builds(leaf, st.sampled_from(["name", "attributes.key"]), st.sampled_from(["eq", "ne"]), texts | numbers),
    st.builds(leaf, st.sampled_from(["name", "attributes.key"]), st.sampled_from(["lt", "gte"]), numbers),
    st.builds(leaf, st.sampled_from(["name", "attributes.key"]), st.just("empty"), st.booleans()),
    st.builds(leaf, st.just("attributes.key"), st.just("in"), st.lists(texts | numbers, min_size=1, max_size=3)),
    st.builds(leaf, st.just("name"), st.just("contains"), texts.filter(str.strip)),
    st.builds(
        leaf,
        st.sampled_from(["count", "sent_count"]),
        st.sampled_from(["eq", "ne", "lt", "lte", "gt", "gte"]),
        st.integers(-1, 4),
    ),
)
nodes = st.recursive(
    leaves | st.just({"everyone": True}),
    lambda inner: st.one_of(
        st.builds(lambda node: {"not": node}, inner),
        st.builds(
            lambda key, children: {key: children},
            st.sampled_from(["all", "any"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
    ),
    max_leaves=6,
).filter(lambda node: depth(node) <= audience.MAX_DEPTH)
TESTS = {
    "eq": lambda seen, value: seen == value,
    "ne": lambda seen, value: seen != value,
    "lt": lambda seen, value: seen < value,
    "lte": lambda seen, value: seen <= value,
    "gt": lambda seen, value: seen > value,
    "gte": lambda seen, value: seen >= value,
}


def as_number(seen: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return float(seen) if not isinstance(seen, bool) else None
    return None


def matches(node: dict[str, Any], person: Person) -> bool:
    """Read the rules naively: what a person lacks is None, which is only unequal."""
    if "everyone" in node:
        return True
    if "not" in node:
        return not matches(node["not"], person)
    for key, combine in (("all", all), ("any", any)):
        if key in node:
            return combine(matches(child, person) for child in node[key])
    [(operator, value)] = [(key, value) for key, value in node.items() if key != "field"]
    if node["field"] == "attributes.key":
        seen = (person["attributes"] or {}).get("key")
        seen = json.dumps(seen) if isinstance(seen, int | float) else seen
    else:
        seen = person["sent"] if node["field"] == "sent_count" else person[node["field"]]
    if operator == "empty":
        return (seen is None or not str(seen).strip()) is value
    if operator == "contains":
        return seen is not None and value.lower() in seen.lower()
    return any(is_true(seen, operator, item) for item in value) if operator == "in" else is_true(seen, operator, value)


def is_true(seen: Any, operator: str, value: Any) -> bool:
    if not isinstance(value, str):
        seen = as_number(seen)
    if seen is None:
        return operator == "ne"
    return bool(TESTS["eq" if operator == "in" else operator](seen, value))


@hypothesis.given(people=people, where=nodes)
@hypothesis.settings(max_examples=150)
def test_who_matches_is_who_a_naive_reading_finds(naive: Any, people: list[Person], where: dict[str, Any]) -> None:
    db.query(naive, "TRUNCATE clients, outreach_batch_items")
    for number, person in enumerate(people):
        row = {**person, "id": number, "attributes": json.dumps(person["attributes"])}
        db.query(naive, "INSERT INTO clients VALUES (%(id)s, %(name)s, %(count)s, %(attributes)s)", row)
        item = """
            INSERT INTO outreach_batch_items
            SELECT NULL, %(id)s, 'sent', now(), now() FROM generate_series(1, %(sent)s)
        """
        db.query(naive, item, row)
    db.query(naive, """INSERT INTO clients VALUES (99, 'z', 5, '{"key": "z"}')""")
    found = search(naive, where)
    expected = [number for number, person in enumerate(people) if matches(where, person)]
    assert [int(number) for number in found if number != "99"] == expected


@pytest.fixture(scope="module")
def naive(postgres: str) -> Iterator[Any]:
    with platform(postgres, "CREATE TEMP TABLE clients (id BIGINT, name TEXT, count INT, attributes JSONB)") as conn:
        yield conn
