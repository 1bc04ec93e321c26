"""The miniature's sentences: right in four languages, and held out for evaluation."""

import datetime

import pytest

from sparqle_jax.demo import grammar


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        (grammar.number(76), ("seventy six", "soixante-seize", "sechsundsiebzig", "setenta y seis")),
        (
            grammar.number(237),
            (
                "two hundred and thirty seven",
                "deux cent trente-sept",
                "zweihundertsiebenunddreißig",
                "doscientos treinta y siete",
            ),
        ),
        (
            grammar.time(7, 35),
            (
                "at seven thirty five",
                "à sept heures trente-cinq",
                "um sieben uhr fünfunddreißig",
                "a las siete y treinta y cinco",
            ),
        ),
        (
            grammar.date(datetime.date(2024, 3, 12)),
            (
                "on tuesday the twelfth of march",
                "le mardi douze mars",
                "am dienstag dem zwölften märz",
                "el martes doce de marzo",
            ),
        ),
        (
            grammar.year(1984),
            (
                "nineteen eighty four",
                "mille neuf cent quatre-vingt-quatre",
                "neunzehnhundertvierundachtzig",
                "mil novecientos ochenta y cuatro",
            ),
        ),
    ],
)
def test_phrases_as_a_reader_of_the_four_languages_writes_them(phrase, expected):
    assert phrase == expected


def test_word_order_follows_the_language():
    texts = {s["en"]: s for s in grammar.sentences(3000, 0, test=False)}
    sentence = next(s for text, s in texts.items() if " has lived in " in text)
    assert sentence["de"].split()[-2] == "in"  # lebt seit ... in ...
    assert "depuis" in sentence["fr"]
    assert all("{" not in text for s in texts.values() for text in s.values())


def test_sentences_are_lower_case_words_without_digits():
    for sentence in grammar.sentences(500, 1, test=False):
        for text in sentence.values():
            assert text == text.lower()
            assert not any(c.isdigit() or c in ".,;:!?" for c in text)


def test_held_out_sentences_are_in_no_training_set():
    training = {s["en"] for seed in (0, 1) for s in grammar.sentences(2000, seed, test=False)}
    assert training.isdisjoint(s["en"] for s in grammar.sentences(300, 0, test=True))


def test_sentences_are_distinct_and_a_function_of_the_seed():
    a = grammar.sentences(400, 3, test=False)
    assert len({s["en"] for s in a}) == 400
    assert grammar.sentences(100, 3, test=False) == a[:100]
    assert grammar.sentences(100, 4, test=False) != a[:100]
