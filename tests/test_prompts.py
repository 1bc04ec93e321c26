import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparqle_jax import prompts

# The structure of the public templates, without their long texts.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = [
    "<bos>",
    "<eos>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
ASK = prompts.instruction(prompts.TRANSCRIBE[1])


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Characters, but for words that Llama 3 has as one token: reversible and easy to read."""
    words = ["None", "assistant", "\n\n", *map(chr, range(32, 127)), "\n"]
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="~"))
    backend.pre_tokenizer = pre_tokenizers.Split(
        pattern=Regex(r"None|assistant|\n\n|[\s\S]"), behavior="isolated"
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = template
    return result


def prompter(template, **kwargs) -> prompts.Prompter:
    return prompts.Prompter(tokenizer(template), vocab_size=200, **kwargs)


def text_of(ids, p) -> str:
    return "".join(p.tokenizer.convert_ids_to_tokens(ids))


class TestInstruction:
    def test_language(self):
        assert prompts.instruction(prompts.TRANSLATE[0], "German") == (
            "<Speech><SpeechHere></Speech> Can you translate the speech into German?"
        )
        with pytest.raises(ValueError, match="asks for a language"):
            prompts.instruction(prompts.TRANSLATE[0])
        with pytest.raises(ValueError, match=r"no place .* for the language 'German'"):
            prompts.instruction(prompts.TRANSCRIBE[0], "German")

    @pytest.mark.parametrize("template", ["Transcribe.", "<SpeechHere> and <SpeechHere>"])
    def test_a_place_for_the_speech(self, template):
        with pytest.raises(ValueError, match=r"has \d places for the speech; write <SpeechHere> in it, once"):
            prompter(None).prompt(template)


class TestPrompt:
    def test_llama3(self):
        p = prompter(LLAMA3, system="Be brief.")
        before, after = p.prompt(ASK)
        assert text_of(before, p) == (
            "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<Speech>"
        )
        assert text_of(after, p) == (
            "</Speech> Listen to the speech and write down its content.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        assert text_of(p.answer("yes"), p) == "yes<|eot_id|>"

    def test_chatml_without_thinking(self):
        p = prompter(CHATML)
        before, after = p.prompt(ASK)
        assert text_of(before, p) == "<|im_start|>user\n<Speech>"
        assert text_of(after, p).endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert text_of(p.answer("yes"), p) == "yes<|im_end|>"

    def test_end_of_turn_is_the_first_special_token(self):
        p = prompter(LLAMA2)
        assert text_of(p.answer("yes"), p) == "yes<eos>"

    def test_base_model_without_template(self):
        p = prompter(None)
        before, after = p.prompt(ASK)
        assert text_of(before, p) == "<bos><Speech>"
        assert text_of(after, p) == "</Speech> Listen to the speech and write down its content."
        assert text_of(p.answer("yes"), p) == "yes<eos>"

    def test_published(self):
        """BOS twice; the template around a turn of "None", whose token is cut out; a newline as the end."""
        p = prompter(LLAMA3, system="Be brief.", compat="published")
        before, after = p.prompt(ASK)
        assert text_of(before, p) == (
            "<bos><bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<Speech>"
        )
        assert text_of(after, p) == (
            "</Speech> Listen to the speech and write down its content.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        assert text_of(p.answer("yes"), p) == "yes\n"
        with pytest.raises(ValueError, match="needs a tokenizer with a chat template and BOS"):
            prompter(None, compat="published")

    def test_decode_stops_at_the_end(self):
        p = prompter(LLAMA3)
        ids = [*p.answer("yes"), *p.answer("no")]
        assert p.decode(ids).replace(" ", "") == "yes"


def test_tokenizer_of_another_llm():
    with pytest.raises(ValueError, match="token ids up to 105 but the LLM's vocabulary has 100"):
        prompts.Prompter(tokenizer(None), vocab_size=100)


class TestCollate:
    def test_prompts_end_and_answers_begin_in_one_column(self):
        batch = prompts.collate(
            [([1, 2], [3]), ([4], [5, 6])], [[7], [8, 9]], vocab_size=10, before_length=3, answer_length=4
        )
        assert batch["before"].tolist() == [[0, 1, 2], [0, 0, 4]]
        assert batch["before_mask"].tolist() == [[False, True, True], [False, False, True]]
        assert batch["after"].tolist() == [[0, 3], [5, 6]]
        assert batch["answer"].tolist() == [[7, 0, 0, 0], [8, 9, 0, 0]]
        assert batch["answer_mask"].sum(1).tolist() == [1, 2]
        assert batch["answer"].dtype == np.int32

    def test_nothing_is_cut(self):
        with pytest.raises(ValueError, match="answer of example 1 has 3 tokens, more than answer_length=2"):
            prompts.collate([([], [])] * 2, [[1], [1, 2, 3]], vocab_size=10, answer_length=2)

    @pytest.mark.parametrize("token", [10, -1, 2**40])
    def test_ids_outside_the_vocabulary(self, token):
        with pytest.raises(ValueError, match=rf"after of example 0 has the token id {token}, outside"):
            prompts.collate([([1], [token])], vocab_size=10)

    def test_texts_for_stage_1(self):
        bert = tokenizer(None)
        batch = prompts.collate_texts(bert, ["yes", "no"], vocab_size=200, length=4)
        assert batch["text"].tolist() == [[*bert("yes").input_ids, 0], [*bert("no").input_ids, 0, 0]]
        assert batch["text_mask"].sum(1).tolist() == [3, 2]
        with pytest.raises(ValueError, match="text of example 0 has 3 tokens, more than text_length=2"):
            prompts.collate_texts(bert, ["yes"], vocab_size=200, length=2)
        with pytest.raises(ValueError, match=r"text of example 0 has the token id \d+, outside"):
            prompts.collate_texts(bert, ["yes"], vocab_size=9)


@pytest.mark.parametrize("compat", ["publised", "transformers"])
def test_compat_is_spelt_right(compat):
    with pytest.raises(ValueError, match=r"compat must be one of \[None, 'published'\], got"):
        prompter(LLAMA3, compat=compat)


def byte_level(special: list[str], others: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen have it: bytes, with control tokens beside them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in others])
    names = dict(eos_token=special[0], additional_special_tokens=special[1:])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def sentencepiece(special: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: characters with a mark for spaces, and bytes for those it lacks."""
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


FAMILIES = {
    "llama3": byte_level(["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "qwen2": byte_level(["<|im_end|>", "<|im_start|>", "<|endoftext|>"]),
    "qwen3": byte_level(["<|im_end|>", "<|im_start|>"], ("<think>", "</think>")),
    "mistral": sentencepiece(["<unk>", "<s>", "</s>"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_in_a_text_is_characters(family):
    """Whoever says "eot id" does not end the turn: the text comes back as it was, and none of its tokens is
    a control token but the one that ends the answer."""
    own = FAMILIES[family]
    control = [token.content for token in own.added_tokens_decoder.values()]
    p = prompts.Prompter(own, vocab_size=len(own))
    text = "and then " + " and ".join(control) + " were read"
    assert set(own(text, add_special_tokens=False).input_ids) & own.added_tokens_decoder.keys()
    *tokens, end = p.answer(text)
    assert end == own.eos_token_id
    assert not set(tokens) & own.added_tokens_decoder.keys()
    assert p.decode([*tokens, end]) == text


def test_a_control_token_in_an_instruction_is_an_error():
    with pytest.raises(ValueError, match=r"has control tokens of the LLM: \['<\|eot_id\|>'\]"):
        prompter(LLAMA3).prompt(f"Say <|eot_id|> to {prompts.SPEECH}")


def test_a_control_token_in_a_transcript_of_the_text_half_is_characters():
    bert = tokenizer(None)
    ids = prompts.collate_texts(bert, ["a <eos> b"], vocab_size=200)["text"][0]
    assert "".join(bert.convert_ids_to_tokens(ids)) == "a <eos> b"
    assert bert.eos_token_id not in ids
