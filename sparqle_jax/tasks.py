"""Tasks: a transcript, or a translation, named by its language's code; instructions and right answers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from babel import Locale, UnknownLocaleError

from sparqle_jax import prompts

if TYPE_CHECKING:  # who only asks a model needs no data sets
    from sparqle_jax.data.dataset import DataSet, Utterance

TRANSCRIBE = "transcribe"


def have_any(data_set: "DataSet", tasks: Iterable[str]) -> np.ndarray:
    """bool [N]: which utterances of a data set have an answer to any of the tasks."""
    return np.any([data_set.has(task) for task in tasks], axis=0)


def check_tasks(data_set: "DataSet", tasks: Iterable[str]) -> None:
    """Raises ValueError for a task that is no language, or to which no utterance here has an answer."""
    for task in tasks:
        instructions(task)
        if task != TRANSCRIBE and task not in data_set.languages:
            raise ValueError(
                f"{data_set.folder} has no translations into {task!r}; it has {list(data_set.languages)}: "
                "prepare it with them, or leave out the task."
            )


def instructions(task: str) -> list[str]:
    """All ways to ask for a task, with a place for the speech."""
    if task == TRANSCRIBE:
        return [prompts.instruction(template) for template in prompts.TRANSCRIBE]
    return [prompts.instruction(template, language_name(task)) for template in prompts.TRANSLATE]


def language_name(language: str) -> str:
    """The English name of a language, "French" for "fr" or "french". Raises ValueError for what is none."""
    # Codes first: "ga" is Irish, and also the name of another language.
    try:
        return Locale.parse(language.replace("-", "_")).english_name
    except (UnknownLocaleError, ValueError) as error:
        if language.title() in Locale("en").languages.values():
            return language.title()
        raise ValueError(f"{language!r} is neither a language's name nor its code (German, de).") from error


def has_answer(utterance: "Utterance", task: str) -> bool:
    """Whether there is a right answer to a task: an empty one, to "transcribe", where nobody speaks."""
    return task == TRANSCRIBE or task in utterance.translations


def answer_of(utterance: "Utterance", task: str) -> str:
    """The right answer to a task that the utterance has."""
    return utterance.text if task == TRANSCRIBE else utterance.translations[task]
