"""The text around the speech: instructions, chat templates, tokens, and batches of them.

An instruction is a text with a place for the speech, `<SpeechHere>`. In the LLM's own chat template it
becomes the user's turn; what stands before the place and what stands after it are tokenised apart. The same
tokens are used in training and in inference, and an answer ends with the template's end-of-turn token.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from sparqle_jax.compat import Compat, check_compat

SPEECH = "<SpeechHere>"
LANGUAGE = "TARGETLANG"

# The instructions that the published weights were trained on.
TRANSCRIBE = tuple(
    f"<Speech>{SPEECH}</Speech> {text}"
    for text in (
        "Can you transcribe the speech into a written format?",
        "Listen to the speech and write down its content.",
        "What is the content of the speech you heard?",
        "Please write down the transcription of the speech.",
        "Please transcribe the speech into a written format.",
        "Write down the content of the speech you heard.",
        "Can you write down the transcription of the speech?",
    )
)
TRANSLATE = tuple(
    f"<Speech>{SPEECH}</Speech> {text}"
    for text in (
        f"Can you translate the speech into {LANGUAGE}?",
        f"Please translate the speech you heard into {LANGUAGE}.",
        f"Listen to the speech and translate it into {LANGUAGE}.",
        f"Give me the {LANGUAGE} translation of this speech.",
    )
)


def instruction(template: str, language: str | None = None) -> str:
    """A template with its language filled in, such as "German".

    Raises ValueError when just one of template and caller has a language.
    """
    if (LANGUAGE in template) != (language is not None):
        raise ValueError(
            f"the instruction {template!r} asks for a language ({LANGUAGE}), but none is given."
            if language is None
            else f"the instruction {template!r} has no place ({LANGUAGE}) for the language {language!r}."
        )
    return template if language is None else template.replace(LANGUAGE, language)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a transformers folder; nothing is downloaded.

    Raises FileNotFoundError for no folder, ValueError for one without a tokenizer.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one with a tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what transformers raises depends on what is not there
        raise ValueError(
            f"{folder} has no tokenizer that transformers can load: {type(error).__name__}: {error}"
        ) from error


def fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer: its vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(json.dumps([rules, tokenizer.chat_template]).encode()).hexdigest()[:16]


def tokenize_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of transcripts for the text half, from [CLS] to [SEP]; "[SEP]" in a text is characters."""
    return tokenizer(list(texts), split_special_tokens=True).input_ids


class Prompter:
    """Turns instructions and answers into tokens of one LLM.

    tokenizer: a transformers tokenizer. vocab_size: of the LLM, which must know all its tokens.
    system: a system prompt, for chat templates that take one. compat="published" gives the token sequence of
    the published generation code: BOS twice, its cuts out of Llama 3's template, a newline as the end.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        system: str | None = None,
        compat: Compat = None,
    ):
        check_compat(compat)
        largest = max(tokenizer.get_vocab().values())
        if largest >= vocab_size:
            raise ValueError(
                f"the tokenizer has token ids up to {largest} but the LLM's vocabulary has {vocab_size} "
                "entries: they do not belong together, or tokens were added to the tokenizer alone."
            )
        if compat == "published" and not (tokenizer.chat_template and tokenizer.bos_token_id is not None):
            raise ValueError("compat='published' needs a tokenizer with a chat template and BOS: Llama 3's.")
        self.tokenizer, self.system, self.compat = tokenizer, system, compat

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int, **kwargs) -> "Prompter":
        """With the tokenizer of a transformers folder. Raises as `load_tokenizer` does."""
        return cls(load_tokenizer(folder), vocab_size, **kwargs)

    def prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        """The tokens before and after the speech. Raises ValueError when there is no one place for it."""
        if instruction.count(SPEECH) != 1:
            raise ValueError(
                f"the instruction {instruction!r} has {instruction.count(SPEECH)} places for the speech; "
                f"write {SPEECH} in it, once."
            )
        if control := [name for name in self._control_tokens if name in instruction]:
            raise ValueError(f"the instruction {instruction!r} has control tokens of the LLM: {control}.")
        if self.compat == "published":
            return self._published_prompt(instruction)
        if not self.tokenizer.chat_template:
            before, after = instruction.split(SPEECH)
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None else [bos]) + self._tokens(before), self._tokens(after)
        turns = [{"role": "user", "content": instruction}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        text = self._render(turns, add_generation_prompt=True)
        if text.count(SPEECH) != 1:
            raise ValueError(
                f"the chat template shows the instruction {text.count(SPEECH)} times, not once: {text!r}"
            )
        before, after = text.split(SPEECH)
        return self._tokens(before), self._tokens(after)

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer, with the one that ends the turn. Control tokens that are written in it are
        the characters that they are."""
        return [*self._characters(text), self.end_id]

    @functools.cached_property
    def _control_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @functools.cached_property
    def end_id(self) -> int:
        """The token with which an answer ends: what the chat template puts there, or else EOS."""
        if self.compat == "published":
            return self._tokens("\n")[0]
        if self.tokenizer.chat_template:
            content = "answer"
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
            ending = self._render(turns).rpartition(content)[2]
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            for token in self._tokens(ending):
                if token in special:
                    return token
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither a chat template that ends a turn nor an EOS token.")
        return self.tokenizer.eos_token_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens int [L], up to the first that ends the answer."""
        ids = np.asarray(ids).tolist()
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _characters(self, text: str) -> list[int]:
        """The tokens of a text that somebody wrote or said."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        added = self.tokenizer.added_tokens_decoder
        for token in set(ids) & added.keys():
            # Some control tokens are not called special by their tokenizer: Qwen 3's <think>.
            if (place := text.find(added[token].content)) >= 0:
                return self._characters(text[: place + 1]) + self._characters(text[place + 1 :])
        return ids

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, turns: list[dict[str, str]], **kwargs) -> str:
        # Llama 3's templates else write today's date, Qwen 3's let the model think first: a prompt that
        # changes from day to day, or between training and inference, is not the one trained on.
        kwargs.update(date_string="26 Jul 2024", enable_thinking=False)
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)

    def _published_prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        """The prompt of the reference's generation.py: around a turn in the template, cut by position."""
        turns = [{"role": "user", "content": "None"}]  # its None, as transformers 4 wrote it out
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        template = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        head, tail = template[:-6], template[-5:]  # drops one token, that of "None"
        before, after = instruction.split(SPEECH)
        return [self.tokenizer.bos_token_id, *head, *self._tokens(before)], [*self._tokens(after), *tail]


def collate(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    vocab_size: int,
    before_length: int | None = None,
    after_length: int | None = None,
    answer_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Stage 2: token lists to before, after and answer int32 [B, L], each with its mask.

    prompts: from `Prompter.prompt`; answers: from `Prompter.answer`; vocab_size: of the LLM. Prompts are
    padded on the left, answers on the right, to the lengths given or the longest of each. Raises
    ValueError as `pad_tokens` does.
    """
    batch = {}
    for name, rows, length in (
        ("before", [before for before, _ in prompts], before_length),
        ("after", [after for _, after in prompts], after_length),
        ("answer", answers, answer_length),
    ):
        if rows is not None:
            left = name != "answer"
            batch[name], batch[f"{name}_mask"] = pad_tokens(
                rows, length, name=name, vocab_size=vocab_size, left=left
            )
    return batch


def collate_texts(
    tokenizer: Any, texts: Sequence[str], *, vocab_size: int, length: int | None = None
) -> dict[str, np.ndarray]:
    """Stage 1: transcripts to text int32 [B, L] and text_mask, from [CLS] to [SEP].

    tokenizer: that of the BERT which the Q-Former starts from; vocab_size: of the Q-Former. Raises
    ValueError as `pad_tokens` does.
    """
    rows = tokenize_texts(tokenizer, texts)
    ids, mask = pad_tokens(rows, length, name="text", vocab_size=vocab_size)
    return {"text": ids, "text_mask": mask}


def pad_tokens(
    rows: Sequence[Sequence[int]],
    length: int | None = None,
    *,
    name: str,
    vocab_size: int,
    left: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists to (int32 [B, L], mask bool [B, L]); L is `length`, or the longest list's.

    Raises ValueError, naming the example, for a token outside the vocabulary and for a list longer than
    `length`: nothing is ever cut.
    """
    longest = max(map(len, rows))
    length = longest if length is None else length
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(
                f"{name} of example {i} has {len(row)} tokens, more than {name}_length={length}: make "
                f"{name}_length longer, or leave the example out."
            )
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} of example {i} has the token id {token}, outside the vocabulary (0 to "
                    f"{vocab_size - 1}): the tokenizer is not the model's."
                )
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, where] = row
        mask[i, where] = True
    return ids, mask
