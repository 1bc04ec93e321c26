"""The miniature's sentences: English, with their correct French, German and Spanish translations.

Every template is written in the four languages side by side; numbers, dates, times and amounts come from
num2words and Babel. All is lower case without punctuation, as the paper's texts are.
"""

import datetime
import zlib
from collections.abc import Callable

import numpy as np
from babel.dates import format_date
from num2words import num2words

# Codes of the languages, and their names in instructions. The first is spoken, the others are translations.
LANGUAGES = {"en": "English", "fr": "French", "de": "German", "es": "Spanish"}

# Each phrase: English, French, German, Spanish.
Phrase = tuple[str, str, str, str]

CITIES: list[Phrase] = [
    ("london", "londres", "london", "londres"),
    ("paris", "paris", "paris", "parís"),
    ("vienna", "vienne", "wien", "viena"),
    ("geneva", "genève", "genf", "ginebra"),
    ("lisbon", "lisbonne", "lissabon", "lisboa"),
    ("munich", "munich", "münchen", "múnich"),
    ("brussels", "bruxelles", "brüssel", "bruselas"),
    ("moscow", "moscou", "moskau", "moscú"),
    ("cologne", "cologne", "köln", "colonia"),
    ("warsaw", "varsovie", "warschau", "varsovia"),
]
# Nominative, with the article.
THINGS: list[Phrase] = [
    ("the book", "le livre", "das buch", "el libro"),
    ("the table", "la table", "der tisch", "la mesa"),
    ("the lamp", "la lampe", "die lampe", "la lámpara"),
    ("the bicycle", "le vélo", "das fahrrad", "la bicicleta"),
    ("the jacket", "la veste", "die jacke", "la chaqueta"),
    ("the picture", "le tableau", "das bild", "el cuadro"),
    ("the ticket", "le billet", "die fahrkarte", "el billete"),
    ("the hotel room", "la chambre d'hôtel", "das hotelzimmer", "la habitación de hotel"),
]
CURRENCIES: list[Phrase] = [
    ("euros", "euros", "euro", "euros"),
    ("dollars", "dollars", "dollar", "dólares"),
    ("francs", "francs", "franken", "francos"),
]
PEOPLE: list[Phrase] = [
    ("mary", "marie", "maria", "maría"),
    ("peter", "pierre", "peter", "pedro"),
    ("my sister", "ma sœur", "meine schwester", "mi hermana"),
    ("my brother", "mon frère", "mein bruder", "mi hermano"),
    ("the teacher", "le professeur", "der lehrer", "el profesor"),
    ("the doctor", "le médecin", "der arzt", "el médico"),
    ("our neighbour", "notre voisin", "unser nachbar", "nuestro vecino"),
]
GOODS: list[Phrase] = [
    ("apples", "pommes", "äpfel", "manzanas"),
    ("books", "livres", "bücher", "libros"),
    ("chairs", "chaises", "stühle", "sillas"),
    ("flowers", "fleurs", "blumen", "flores"),
    ("keys", "clés", "schlüssel", "llaves"),
    ("letters", "lettres", "briefe", "cartas"),
    ("bottles", "bouteilles", "flaschen", "botellas"),
    ("horses", "chevaux", "pferde", "caballos"),
]
EVENTS: list[Phrase] = [
    ("the meeting", "la réunion", "das treffen", "la reunión"),
    ("the concert", "le concert", "das konzert", "el concierto"),
    ("the wedding", "le mariage", "die hochzeit", "la boda"),
    ("the exam", "l'examen", "die prüfung", "el examen"),
    ("the lesson", "le cours", "der unterricht", "la clase"),
    ("the film", "le film", "der film", "la película"),
]
DURATIONS: list[Phrase] = [
    ("minutes", "minutes", "minuten", "minutos"),
    ("hours", "heures", "stunden", "horas"),
    ("days", "jours", "tage", "días"),
    ("weeks", "semaines", "wochen", "semanas"),
]
JOURNEYS: list[Phrase] = [
    ("the journey", "le voyage", "die reise", "el viaje"),
    ("the flight", "le vol", "der flug", "el vuelo"),
    ("the walk", "la promenade", "der spaziergang", "el paseo"),
]
PLACES: list[Phrase] = [
    ("at the station", "à la gare", "am bahnhof", "en la estación"),
    ("at the school", "à l'école", "an der schule", "en la escuela"),
    ("in the park", "dans le parc", "im park", "en el parque"),
    ("at the museum", "au musée", "am museum", "en el museo"),
    ("in the library", "à la bibliothèque", "in der bibliothek", "en la biblioteca"),
]


def number(n: int, ordinal: bool = False) -> Phrase:
    """A number in words."""
    words = [num2words(n, to="ordinal" if ordinal else "cardinal", lang=code) for code in LANGUAGES]
    return (words[0].replace("-", " ").replace(",", ""), *words[1:])


def year(n: int) -> Phrase:
    """A year: English and German read the four digits in pairs."""
    english, french, german, spanish = (num2words(n, to="year", lang=code) for code in LANGUAGES)
    return english.replace("-", " "), french, german, spanish


def time(hour: int, minute: int) -> Phrase:
    """A time of day, hour 2 to 12 and minute 10 to 59, as it is read off a clock."""
    hours, minutes = number(hour), number(minute)
    return (
        f"at {hours[0]} {minutes[0]}",
        f"à {hours[1]} heures {minutes[1]}",
        f"um {hours[2]} uhr {minutes[2]}",
        f"a las {hours[3]} y {minutes[3]}",
    )


def date(day: datetime.date) -> Phrase:
    """A day of the year with its weekday, for what happens on it; not the first of a month."""
    weekdays = [format_date(day, "EEEE", locale=code).lower() for code in LANGUAGES]
    months = [format_date(day, "MMMM", locale=code).lower() for code in LANGUAGES]
    ordinals, cardinals = number(day.day, ordinal=True), number(day.day)
    return (
        f"on {weekdays[0]} the {ordinals[0]} of {months[0]}",
        f"le {weekdays[1]} {cardinals[1]} {months[1]}",
        f"am {weekdays[2]} dem {ordinals[2]}n {months[2]}",
        f"el {weekdays[3]} {cardinals[3]} de {months[3]}",
    )


def weekday(index: int) -> Phrase:
    """A weekday, 0 for Monday, for what happens on it."""
    day = datetime.date(2024, 1, 1 + index)  # a Monday
    names = [format_date(day, "EEEE", locale=code).lower() for code in LANGUAGES]
    return f"on {names[0]}", f"{names[1]}", f"am {names[2]}", f"el {names[3]}"


# Sentences, and what stands in their places, in order: names in PARTS.
TEMPLATES: list[tuple[Phrase, tuple[str, ...]]] = [
    (
        (
            "the train to {} leaves {}",
            "le train pour {} part {}",
            "der zug nach {} fährt {}",
            "el tren a {} sale {}",
        ),
        ("city", "time"),
    ),
    (
        ("{} costs {} {}", "{} coûte {} {}", "{} kostet {} {}", "{} cuesta {} {}"),
        ("thing", "up to 999", "currency"),
    ),
    (("{} is {}", "{} a lieu {}", "{} ist {}", "{} es {}"), ("event", "date")),
    (("{} has {} {}", "{} a {} {}", "{} hat {} {}", "{} tiene {} {}"), ("person", "up to 99", "goods")),
    (
        (
            "{} has lived in {} since {}",
            "{} vit à {} depuis {}",
            "{0} lebt seit {2} in {1}",
            "{} vive en {} desde {}",
        ),
        ("person", "city", "year"),
    ),
    (
        (
            "this house was built in {}",
            "cette maison a été construite en {}",
            "dieses haus wurde {} gebaut",
            "esta casa fue construida en {}",
        ),
        ("year",),
    ),
    (
        ("we meet {} {}", "nous nous retrouvons {} {}", "wir treffen uns {1} {0}", "nos vemos {} {}"),
        ("place", "time"),
    ),
    (
        ("{} takes {} {}", "{} dure {} {}", "{} dauert {} {}", "{} dura {} {}"),
        ("journey", "up to 99", "duration"),
    ),
    (
        ("{} arrives in {} {}", "{} arrive à {} {}", "{0} kommt {2} in {1} an", "{} llega a {} {}"),
        ("person", "city", "weekday"),
    ),
    (
        ("{} arrives {} {}", "{} arrive {} {}", "{} kommt {} {} an", "{} llega {} {}"),
        ("person", "weekday", "time"),
    ),
    (
        (
            "please open the book at page {}",
            "ouvrez le livre à la page {}",
            "bitte öffnen sie das buch auf seite {}",
            "abran el libro en la página {}",
        ),
        ("up to 999",),
    ),
    (
        (
            "the number of the bus is {}",
            "le numéro du bus est {}",
            "die nummer des busses ist {}",
            "el número del autobús es {}",
        ),
        ("up to 999",),
    ),
    (
        ("it is {} degrees in {}", "il fait {} degrés à {}", "es sind {} grad in {}", "hace {} grados en {}"),
        ("up to 39", "city"),
    ),
]


def _plain(rng: np.random.Generator, low: int, high: int) -> int:
    """From low to high, and written the same in whatever place: in some of the languages what ends in
    one agrees with its noun, and French hundreds and eighties depend on what they count."""
    while (n := int(rng.integers(low, high + 1))) % 10 == 1 or n % 100 in (0, 80):
        pass
    return n


def _draw_date(rng: np.random.Generator) -> Phrase:
    day = datetime.date(2024, 1, 1)
    while day.day % 10 == 1:
        day = datetime.date(2024, 1, 1) + datetime.timedelta(int(rng.integers(366)))
    return date(day)


def _one_of(phrases: list[Phrase]) -> Callable[[np.random.Generator], Phrase]:
    return lambda rng: phrases[rng.integers(len(phrases))]


PARTS: dict[str, Callable[[np.random.Generator], Phrase]] = {
    "city": _one_of(CITIES),
    "thing": _one_of(THINGS),
    "currency": _one_of(CURRENCIES),
    "person": _one_of(PEOPLE),
    "goods": _one_of(GOODS),
    "event": _one_of(EVENTS),
    "duration": _one_of(DURATIONS),
    "journey": _one_of(JOURNEYS),
    "place": _one_of(PLACES),
    "up to 39": lambda rng: number(_plain(rng, 2, 39)),
    "up to 99": lambda rng: number(_plain(rng, 2, 99)),
    "up to 999": lambda rng: number(_plain(rng, 2, 999)),
    "time": lambda rng: time(int(rng.integers(2, 13)), _plain(rng, 10, 59)),
    "date": _draw_date,
    "weekday": lambda rng: weekday(int(rng.integers(7))),
    "year": lambda rng: year(100 * int(rng.integers(18, 20)) + _plain(rng, 10, 99)),
}


def held_out(text: str) -> bool:
    """Whether a sentence is kept for evaluation, one in ten; a property of its English text alone."""
    return zlib.crc32(text.encode()) % 10 == 0


def sentences(num: int, seed: int, *, test: bool) -> list[dict[str, str]]:
    """`num` different sentences, each {code of the language: text}; held-out ones alone, or the others.

    The sentences of a smaller `num` are the first of a larger one.
    """
    rng = np.random.default_rng([seed, test])
    found: dict[str, dict[str, str]] = {}
    while len(found) < num:
        texts, names = TEMPLATES[rng.integers(len(TEMPLATES))]
        parts = [PARTS[name](rng) for name in names]
        sentence = {
            code: text.format(*(part[i] for part in parts))
            for i, (code, text) in enumerate(zip(LANGUAGES, texts, strict=True))
        }
        if held_out(sentence["en"]) == test:
            found.setdefault(sentence["en"], sentence)
    return list(found.values())
