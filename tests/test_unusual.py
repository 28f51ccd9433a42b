"""Check which values of a variable are shown to the owner as unusual, and which texts lack something."""

import tracemalloc
from collections.abc import Sequence

import pytest

import unusual

NAMES = """
Anna Müller|Jürgen Groß|Zoë Kravitz|Seán O'Brien|D'Angelo Russell|Jean-Luc Picard
María José García López|Łukasz Żółć|Björn Borg|Søren Kierkegaard|Åsa Nyström
Nguyễn Văn An|Trần Thị Bích|李伟|王小明|佐藤 健|鈴木 一郎|김민준|박서연|Нина Петрова
Иван Сергеевич Тургенев|Олена Шевченко|Γιώργος Παπαδόπουλος|Μαρία Ιωάννου|שרה כהן
דוד לוי|محمد علي|فاطمة الزهراء|Ayşe Yılmaz|İbrahim Çelik|Çağla Şükür|Ömer Faruk
Siobhán Ní Chonaill|Aoife Byrne|Rhys ap Gruffydd|Llŷr Evans|Ioana Popescu
Ștefan Țurcanu|Zsófia Nagy|László Kovács|Jiří Dvořák|Božena Němcová|Petra Kvitová
Ján Novák|Ana Kovačević|Đorđe Petrović|Željko Šarić|Jürgen von der Lippe
Ludwig van Beethoven|Mies van der Rohe|Vincent van Gogh|Charles de Gaulle
Leonardo da Vinci|Maria do Carmo Silva|João Gonçalves|Inês Conceição|Renée Zellweger
Chloë Sevigny|François Hollande|Hélène Carrère|Thích Nhất Hạnh|Aung San Suu Kyi
Sukarno|Suharto|Madonna|Björk|Teller|Prince|Li Na|Wu Yi|Bo Xu|Al Gore|Jo Ng|Ed Li
Ty Cobb|Null Island Smith|Jennifer Null|Christopher Test|Anna Testa|Bernard Testi
Mary Unknown-Jones|Nan Goldin|Nil Yalter|Dr. Anna Schmidt|Prof. Dr. Hans Meyer
Mrs. Jones|Mr. T. Smith|J. R. R. Tolkien|J.K. Rowling|A. A. Milne|C.S. Lewis
George H. W. Bush|Martin Luther King Jr.|Robert Downey Jr.|Henry Louis Gates III
Thomas McDonald|Ian MacLeod|Sinéad O’Connor|Conan O'Brien|Kim Min-jun|Park Seo-yeon
Lee Ji-eun|Tanaka Yuki|Yamada Tarō|Satō Hanako|Wei Zhang|Xiu Ying Wang|Ming Li
Hui Chen|Jun Ma|Priya Sharma|Arjun Reddy|Aishwarya Rai Bachchan|Amitabh Bachchan
Venkataraman Ramakrishnan|S. Jaishankar|Lakshmi Narayan|प्रिया शर्मा|अर्जुन सिंह
রবীন্দ্রনাথ ঠাকুর|தமிழ் செல்வன்|ประยุทธ์ จันทร์โอชา|สมชาย ใจดี|გიორგი მარგველაშვილი
Արամ Խաչատրյան|Fatima Zahra|Abdul Rahman|Mohammed bin Salman|Omar al-Bashir
Hassan Nasrallah|Leila Khaled|Yasmin Abdel-Magied|Noor Inayat Khan|Kwame Nkrumah
Chimamanda Ngozi Adichie|Wole Soyinka|Ngũgĩ wa Thiong'o|Thandiwe Newton
Nelson Mandela|Sipho Dlamini|Zanele Muholi|Keala Settle|Kealiʻi Reichel|Tāne Mahuta
Hinemoa Te Rangi|Sitting Bull|Maria Tallchief|Buffy Sainte-Marie|Jean Baptiste
Gabriel García Márquez|Frida Kahlo|Diego Rivera|Simón Bolívar|Salma Hayek Jiménez
Penélope Cruz|Íñigo Ortiz|Ñusta Huamán|Ole Gunnar Solskjær|Kåre Willoch
Jón Sigurðsson|Þóra Hallgrímsdóttir|Guðrún Ósvífrsdóttir|Linnea Öberg|Väinö Tanner
Mika Häkkinen|Eeva-Liisa Manner|Tõnu Kaljuste|Kristjan Järvi|Vaira Vīķe-Freiberga
Jānis Bērziņš|Dalia Grybauskaitė|Jonas Žemaitis|Anne Marie|Mary Ann|Sarah Jane Smith
Emma|Noah|Liam|Olivia|Mia|Ben|Tom|Eva|Ada Lovelace|Ib Mogensen|Ulrich|Bo|Max Power
Maria del Carmen Fernández Rodríguez|Pablo Ruiz y Picasso|Sacha Baron Cohen
Helena Bonham Carter|Olivia Newton-John|John Smith|Jane Doe|Mary Johnson|James Brown
Patricia Miller|Robert Davis|Linda Wilson|Michael Moore|Barbara Taylor|David Lee
"""
ORDINARY = NAMES.strip().replace("\n", "|").split("|")


def found(values: Sequence[object], variable: str = "name") -> list[tuple[str, str]]:
    collected = unusual.UnusualValues({variable})
    for number, value in enumerate(values):
        collected.add(str(number), {variable: value})
    return [(each.value, each.why) for each in collected.found()]


def test_no_ordinary_name_of_any_language_is_unusual() -> None:
    assert len(ORDINARY) >= 200
    assert found([*ORDINARY]) == []


@pytest.mark.parametrize(
    ("value", "variable", "why"),
    [
        ("JANE DOE", "name", "all capitals"),
        ("МАРИЯ", "first_name", "all capitals"),
        ("LEO", "Vorname", "all capitals"),
        ("BERLIN", "city", "all capitals"),
        ("Jane 2", "name", "digits in a name"),
        ("0170 1234567", "first_name", "digits in a name"),
        ("jane@example.com", "name", "an @"),
        ("jane@example.com", "city", "an @"),
        ("test", "name", "a placeholder"),
        ("Test User", "name", "a placeholder"),
        ("xxx", "city", "a placeholder"),
        ("N/A", "city", "a placeholder"),
        ("null", "name", "a placeholder"),
        ("unknown", "name", "a placeholder"),
        ("-", "name", "a placeholder"),
        ("???", "city", "a placeholder"),
        ("…", "name", "a placeholder"),
        ("Jane Doe, called on Monday, wants the blue one, call back", "name", "very long compared with the others"),
        ("J", "name", "very short compared with the others"),
    ],
)
def test_unusual_value_is_found_among_ordinary_ones(value: str, variable: str, why: str) -> None:
    assert (value, why) in found([*ORDINARY, value], variable)


@pytest.mark.parametrize(
    ("value", "variable"),
    [
        ("CA", "state"),
        ("IBM", "company"),
        ("3M Germany", "company_name"),
        ("Main Street 5", "street_name"),
        ("AJ", "name"),
        ("jane@example.com", "email"),
        ("@jane", "instagram"),
        ("🌸", "name"),
    ],
)
def test_value_that_is_usual_for_its_variable_is_not_found(value: str, variable: str) -> None:
    assert found([*ORDINARY, value], variable) == []


def test_codes_in_capitals_are_usual_where_most_values_are() -> None:
    assert found(["BERLIN", "PARIS", "Rome"], "city") == []
    assert len(found(["JANE", "ANNA", "Mia"])) == 2


def test_one_name_for_many_people_is_found_with_its_first_person() -> None:
    collected = unusual.UnusualValues({"name", "city"})
    for number in range(1000):
        collected.add(
            str(number), {"name": "Valued Customer" if number % 10 == 5 else f"Person {number:c}", "city": "Rome"}
        )
    assert [each for each in collected.found() if each.why.startswith("one value")] == [
        unusual.Unusual("name", "5", "Valued Customer", "one value for 100 of 1,000 people")
    ]


def test_nine_people_of_one_name_are_usual() -> None:
    assert found(["Kim"] * 9 + ["Anna"] * 9) == []


def test_five_examples_of_one_reason_say_how_many_more_there_are() -> None:
    shown = found([f"{name.upper()}" for name in ("Anna", "Berta", "Clara", "Dora", "Emma", "Frida", "Gerda")])
    assert shown == [(name, "all capitals, as are 6 more") for name in ("ANNA", "BERTA", "CLARA", "DORA", "EMMA")]


def test_missing_and_other_values_are_passed_over() -> None:
    assert found([None, "", "  ", 5, True, ["TEST"]]) == []


def test_long_value_is_shown_shortened() -> None:
    [(value, _)] = found([*ORDINARY, "x" * 5000])
    assert len(value) == unusual.MAX_SHOWN


def test_memory_does_not_grow_with_the_people() -> None:
    collected = unusual.UnusualValues({"name"})
    for number in range(5000):
        collected.add(str(number), {"name": f"PERSON {number}" + "x" * (number % 300)})
    tracemalloc.start()
    for number in range(5000, 20_000):
        collected.add(str(number), {"name": f"PERSON {number}" + "x" * (number % 300)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    "body",
    [
        "Hi Jane, this is Ana from Blue Salon. Reply STOP to opt out.",
        "Hallo Jana, hier ist Ana vom Blauen Salon. Mit STOPP abmelden.",
        "Bonjour Jeanne, c'est Ana. Répondez STOP pour ne plus recevoir de messages.",
        "Hola Juana, soy Ana. Responde BAJA para no recibir más mensajes.",
        "We open on Monday.\nReply stop to opt out.\nAna, Blue Salon",
        "We open on Monday!\n\n— Blue Salon\nUnsubscribe: reply STOP",
        "Your Blue Salon team is back. To opt out, write END.",
        "Jane, Ana from Blue Salon here. Not interested? Just text stop.",
    ],
)
def test_text_that_says_who_writes_and_how_to_opt_out_lacks_nothing(body: str) -> None:
    assert unusual.missing_parts(body) == []


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("Hi Jane, we open on Monday.", 2),
        ("Hi Jane, stop by on Monday at the end of the street.", 2),
        ("Hi Jane, this is Ana. We open on Monday.", 1),
        ("Hi Jane, we open on Monday. Reply STOP to opt out.", 1),
        ("Hi Jane,\nour new shop opens on Monday and you are invited to come. Reply NO to opt us out.", 2),
    ],
)
def test_text_that_does_not_say_who_writes_or_how_to_opt_out_is_found(body: str, count: int) -> None:
    assert len(unusual.missing_parts(body)) == count
