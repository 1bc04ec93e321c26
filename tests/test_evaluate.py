"""Scores of hand-made answers."""

import pytest

from sparqle_jax.evaluate import score, table


def test_word_error_rate_counts_substitutions_deletions_and_insertions():
    scores = score("transcribe", ["a b c d", "e f"], ["a x c", "e f g"])
    assert scores == {"wer": pytest.approx(3 / 6), "exact": 0.0}


def test_bleu_of_the_reference_is_100_and_of_other_words_0():
    references = ["il fait dix degrés à paris", "le train part"]
    assert score("fr", references, references) == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "exact": 1.0,
    }
    scores = score("fr", references, ["x y z w u v", "x y z"])
    assert scores["bleu"] < 1
    assert scores["exact"] == 0.0


def test_table_has_a_row_for_each_evaluation():
    scores = {"transcribe": {"wer": 0.021, "exact": 0.9}, "fr": {"bleu": 81.25, "chrf": 90, "exact": 0.5}}
    lines = table({"yours": scores, "shipped one": scores}).splitlines()
    assert lines[0].split() == ["WER", "BLEU", "fr"]
    assert lines[2].split() == ["shipped", "one", "2.1%", "81.2"]
