"""Trains the miniature's LLM: a small Llama that follows the project's instructions, on text alone.

    python -m sparqle_jax.demo.language_model FOLDER

It reads an English sentence where the speech will stand, and repeats it or translates it. The sentence
comes as its tokens' embeddings, or blurred as if spoken: spread over a number of places by the tokens'
lengths, each place a mixture of its neighbours, with noise. Large language models read such inputs untaught.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sparqle_jax import llms, pretrained, prompts
from sparqle_jax.demo import grammar
from sparqle_jax.model import answer_loss, join_prompt

decoder = llms.FAMILIES["llama"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|blank|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 1024
SENTENCES = 20_000
PLACES = 32  # for the sentence, where the speech will stand
BLANKED = 0.08  # share of places in blurred sentences that hold nothing


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens that there are places for, so that all batches have one shape."""

    before: int
    after: int
    answer: int


def make_tokenizer(sentences: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of all four languages and of the instructions, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for sentence in sentences for text in sentence.values()]
    # As often as the sentences, or each instruction would be spelt out in dozens of tokens.
    instructions = [text.replace(prompts.SPEECH, "") for text in all_instructions()]
    texts += instructions * (len(texts) // len(instructions))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|blank|>",
        chat_template=CHAT_TEMPLATE,
    )


def instructions_for(code: str) -> list[str]:
    """All ways to ask for the sentence in this language: English is to repeat it."""
    if code == "en":
        return [prompts.instruction(template) for template in prompts.TRANSCRIBE]
    return [prompts.instruction(template, grammar.LANGUAGES[code]) for template in prompts.TRANSLATE]


def all_instructions() -> list[str]:
    return [text for code in grammar.LANGUAGES for text in instructions_for(code)]


def spread(lengths: list[int], places: int, rng: np.random.Generator) -> np.ndarray:
    """Weights float32 [places, tokens] that blur a sentence as if it were spoken.

    lengths: of its tokens, in letters. It takes up a random share of the places, each token about as much as
    its length; a place holds the tokens near it. Weights of a place sum to at most 1; the rest is blank.
    """
    durations = np.array(lengths) * rng.gamma(8.0, 1 / 8.0, len(lengths)) + 0.5
    ends = np.cumsum(durations) / durations.sum()
    centres = ends - durations / durations.sum() / 2
    first = rng.uniform(0, 2)
    used = rng.uniform(min(len(lengths) + 2.0, places - 3), places - 1)
    distance = np.arange(places)[:, None] - (first + (used - first) * centres)
    width = rng.uniform(0.4, 1.5)
    weights = np.exp(-0.5 * np.square(distance / width)) * (rng.random((places, 1)) > BLANKED)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1.0)).astype(np.float32)


class Texts:
    """The sentences as tokens, and batches of them; a batch is a function of its step alone."""

    def __init__(self, sentences: list[dict[str, str]], prompter: prompts.Prompter, vocab_size: int):
        self.vocab_size = vocab_size
        self.asked = {
            code: [prompter.prompt(text) for text in instructions_for(code)] for code in grammar.LANGUAGES
        }
        self.answers = [
            {code: prompter.answer(text) for code, text in sentence.items()} for sentence in sentences
        ]
        convert = prompter.tokenizer.convert_ids_to_tokens
        self.letters = [[len(token) for token in convert(answer["en"][:-1])] for answer in self.answers]
        both = [pair for pairs in self.asked.values() for pair in pairs]
        self.lengths = Lengths(
            before=max(len(before) for before, _ in both),
            after=max(len(after) for _, after in both),
            answer=max(len(answer) for answers in self.answers for answer in answers.values()),
        )
        longest = max(map(len, self.letters))
        if longest > PLACES:
            raise ValueError(f"a sentence has {longest} tokens, more than the {PLACES} places for them.")

    def batch(self, chosen: np.ndarray, codes: list[str], rng: np.random.Generator, blur: float) -> dict:
        """Sentences `chosen` int [B] with answers in the languages `codes`; a share `blur` is blurred.

        As of `prompts.collate`, and middle int [B, PLACES], weights float [B, PLACES, PLACES], middle_mask,
        noise float [B].
        """
        size = len(chosen)
        asked = [self.asked[code][rng.integers(len(self.asked[code]))] for code in codes]
        answers = [self.answers[i][code] for i, code in zip(chosen, codes, strict=True)]
        batch = prompts.collate(
            asked,
            answers,
            vocab_size=self.vocab_size,
            before_length=self.lengths.before,
            after_length=self.lengths.after,
            answer_length=self.lengths.answer,
        )
        middle = np.zeros((size, PLACES), np.int32)
        weights = np.zeros((size, PLACES, PLACES), np.float32)
        mask = np.ones((size, PLACES), bool)
        noise = np.zeros(size, np.float32)
        for row, i in enumerate(chosen):
            tokens = self.answers[i]["en"][:-1]
            middle[row, : len(tokens)] = tokens
            if rng.random() < blur:
                places = int(rng.integers(max(20, len(tokens)), PLACES + 1))
                weights[row, :places, : len(tokens)] = spread(self.letters[i], places, rng)
                noise[row] = rng.uniform(0, 2)
            else:
                places = len(tokens)
                weights[row] = np.eye(PLACES)
            mask[row, places:] = False
        return batch | {"middle": middle, "weights": weights, "middle_mask": mask, "noise": noise}

    def training_batch(self, step: int, size: int, seed: int) -> dict:
        rng = np.random.default_rng([seed, step])
        codes = [str(code) for code in rng.choice(list(grammar.LANGUAGES), size)]
        return self.batch(rng.integers(len(self.answers), size=size), codes, rng, blur=0.7)


def embed(llm: nnx.Module, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The whole prompt with the sentence in it, blurred as the batch says: as `SpeechLLM.embed_prompt`."""
    table = llm.embeddings.embedding[...]
    tokens = jnp.einsum("BQL,BLM->BQM", batch["weights"], llm.embed(batch["middle"]))
    blank = 1.0 - batch["weights"].sum(-1, keepdims=True)
    noise = batch["noise"][:, None, None] * jax.random.normal(key, tokens.shape) * jnp.std(table)
    return join_prompt(llm, batch, tokens + blank * table[0] + noise, batch["middle_mask"])


def train(texts: Texts, config: Any, *, steps: int, batch_size: int, lr: float, seed: int) -> nnx.Module:
    """An LLM trained from scratch."""
    graph, state = nnx.split(decoder.LLM(config, rngs=nnx.Rngs(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 10), steps, lr / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(state, optimizer_state, batch, key):
        def loss_of(state):
            llm = nnx.merge(graph, state)
            return answer_loss(llm, *embed(llm, batch, key), batch["answer"], batch["answer_mask"])

        loss, gradients = jax.value_and_grad(loss_of)(state)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, loss

    optimizer_state = optimizer.init(state)
    key = jax.random.key(seed)
    progress = tqdm.trange(steps, desc="LLM", unit="step", mininterval=1.0)
    for step in progress:
        batch = texts.training_batch(step, batch_size, seed)
        state, optimizer_state, loss = update(state, optimizer_state, batch, jax.random.fold_in(key, step))
        if step % 50 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss:.4f}")
    return nnx.merge(graph, state)


def token_accuracy(llm: nnx.Module, texts: Texts, *, blur: float) -> dict[str, float]:
    """The share of answers, by language, of which every token is the likeliest after the right ones."""
    graph, state = nnx.split(llm)

    @jax.jit
    def right(state, batch):
        llm = nnx.merge(graph, state)
        prompt, mask = embed(llm, batch, jax.random.key(0))
        answer, answer_mask = batch["answer"], batch["answer_mask"]
        inputs = jnp.concatenate([prompt, llm.embed(answer)], 1)
        hidden, _ = llm(inputs, jnp.concatenate([mask, answer_mask], 1))
        guess = llm.logits(hidden[:, prompt.shape[1] - 1 : -1]).argmax(-1)
        return ((guess == answer) | ~answer_mask).all(1)

    shares = {}
    for code in grammar.LANGUAGES:
        rng = np.random.default_rng(0)
        chosen = np.arange(len(texts.answers))
        shares[code] = float(np.mean(right(state, texts.batch(chosen, [code] * len(chosen), rng, blur))))
    return shares


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m sparqle_jax.demo.language_model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where the model is written, as a transformers folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    sentences = grammar.sentences(SENTENCES, args.seed, test=False)
    tokenizer = make_tokenizer(sentences)
    settings = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    prompter = prompts.Prompter(tokenizer, VOCAB_SIZE)
    texts = Texts(sentences, prompter, VOCAB_SIZE)
    llm = train(
        texts,
        decoder.Config.from_dict(settings.to_dict()),
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    pretrained.save_folder(llm, args.folder, settings, dtype=np.float16)
    tokenizer.save_pretrained(args.folder)
    unseen = Texts(grammar.sentences(256, args.seed, test=True), prompter, VOCAB_SIZE)
    for blur in (0.0, 1.0):
        print(f"held-out answers right (blurred: {blur:.0%}):", token_accuracy(llm, unseen, blur=blur))


if __name__ == "__main__":
    main()
