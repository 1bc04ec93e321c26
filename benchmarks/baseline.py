"""Times PyTorch at the same work: transformers' HuBERT and Llama, and a Q-Former as BLIP-2's; prints JSON.

Towers have sdpa attention and are frozen, in the dtype of the size; what trains is in float32 under autocast,
with fused AdamW. Losses are SparQLe's of both stages (`Aligner`, `SpeechLLM`). With "compiled" every layer
goes through torch.compile.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from benchmarks.sizes import SIZES, Size, prompts, recordings, stage1_batch, stage2_batch, time_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DROPOUT = 0.1
KeysValues = tuple[torch.Tensor, torch.Tensor]
Result = dict[str, Any]


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_encoder(size: Size) -> transformers.HubertModel:
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in size.hubert.items()}
    config = transformers.HubertConfig(**fields, apply_spec_augment=False, layerdrop=0.0)
    dtype = getattr(torch, size.dtype)
    with torch.device(DEVICE):
        model = transformers.HubertModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(DEVICE).eval().requires_grad_(False)


def make_llm(size: Size) -> transformers.LlamaForCausalLM:
    fields = dict(size.llm)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    config = transformers.LlamaConfig(
        **fields, rope_parameters=rope, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    dtype = getattr(torch, size.dtype)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(DEVICE).eval().requires_grad_(False)


def on_device(batch: dict[str, np.ndarray], dtype: str) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(np.array(x)).to(DEVICE) for name, x in batch.items()}
    tensors["waveform"] = tensors["waveform"].to(getattr(torch, dtype))
    return tensors


class Attention(nn.Module):
    """Multi-head attention by sdpa, dropout of its weights included."""

    def __init__(self, width: int, heads: int, source: int):
        super().__init__()
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(source, width), nn.Linear(source, width)
        self.heads = heads

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_values(self, source: torch.Tensor) -> KeysValues:
        return self.split(self.key(source)), self.split(self.value(source))

    def forward(self, x: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None) -> torch.Tensor:
        rate = DROPOUT if self.training else 0.0
        out = F.scaled_dot_product_attention(
            self.split(self.query(x)), *keys_values, attn_mask=mask, dropout_p=rate
        )
        return self.out(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention, dropout, residual, norm."""

    def __init__(self, width: int, heads: int, source: int):
        super().__init__()
        self.attention, self.norm = Attention(width, heads, source), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None) -> torch.Tensor:
        out = self.attention(x, keys_values, mask)
        return self.norm(F.dropout(out, DROPOUT, self.training) + x)


class FeedForward(nn.Module):
    """Up, GELU, down, dropout, residual, norm."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down(F.gelu(self.up(x)))
        return self.norm(F.dropout(out, DROPOUT, self.training) + x)


class Layer(nn.Module):
    """A layer of the Q-Former: queries and text share the self-attention, queries read the frames."""

    def __init__(self, c: dict[str, Any], frames: int | None, text: bool):
        super().__init__()
        width, heads, inner = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
        self.self_attention = Block(width, heads, width)
        self.query_mlp = FeedForward(width, inner)
        self.text_mlp = FeedForward(width, inner) if text else None
        self.cross = None if frames is None else Block(width, heads, frames)

    def forward(self, x, queries, mask, frames, frames_mask, cached):
        keys_values = seen = self.self_attention.attention.keys_values(x)
        if cached is not None:
            seen = tuple(torch.cat([old, new], 2) for old, new in zip(cached, keys_values, strict=True))
        x = self.self_attention(x, seen, mask)
        if not queries:
            return self.text_mlp(x), keys_values
        read = x[:, :queries]
        if self.cross is not None:
            read = self.cross(read, self.cross.attention.keys_values(frames), frames_mask)
        read = self.query_mlp(read)
        if x.shape[1] > queries:
            read = torch.cat([read, self.text_mlp(x[:, queries:])], 1)
        return read, keys_values


class QFormer(nn.Module):
    """BLIP-2's Q-Former (LAVIS' Qformer.py) for frames, with its text half or without."""

    def __init__(self, size: Size, text: bool):
        super().__init__()
        c, self.size = size.qformer, size
        width, frames = c["hidden_size"], size.hubert["hidden_size"]
        self.queries = c["num_queries"]
        self.frames_norm = nn.LayerNorm(frames, eps=1e-5)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, self.queries, width))
        self.embeddings_norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            Layer(c, None if i % c["cross_attention_freq"] else frames, text)
            for i in range(c["num_hidden_layers"])
        )
        if text:
            self.words = nn.Embedding(size.words, width)
            self.positions = nn.Embedding(c["max_position_embeddings"], width)
            self.lm_transform, self.lm_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
            self.lm_bias = nn.Parameter(torch.zeros(size.words))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def run(self, x, queries, mask=None, frames=None, frames_mask=None, cache=None):
        x = F.dropout(self.embeddings_norm(x), DROPOUT, self.training)
        if frames is not None:
            frames, frames_mask = self.frames_norm(frames), frames_mask[:, None, None]
        kept = []
        for i, layer in enumerate(self.layers):
            cached = None if cache is None else cache[i]
            x, keys_values = layer(x, queries, mask, frames, frames_mask, cached)
            kept.append(keys_values)
        return x, kept

    def encode_queries(self, frames, frames_mask):
        queries = self.query_tokens.expand(len(frames), -1, -1)
        return self.run(queries, self.queries, None, frames, frames_mask)

    def embed(self, ids):
        return self.words(ids) + self.positions.weight[: ids.shape[1]]

    def encode_text(self, ids, mask):
        return self.run(self.embed(ids), 0, mask[:, None, None])[0]

    def encode_pairs(self, frames, frames_mask, ids, mask):
        x = torch.cat([self.query_tokens.expand(len(ids), -1, -1), self.embed(ids)], 1)
        mask = F.pad(mask, (self.queries, 0), value=True)[:, None, None]
        return self.run(x, self.queries, mask, frames, frames_mask)[0][:, : self.queries]

    def encode_text_causally(self, ids, mask, cache):
        length = ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril() & mask[:, None]
        seen = F.pad(seen, (self.queries, 0), value=True)[:, None]
        return self.run(self.embed(ids), 0, seen, cache=cache)[0]

    def lm_logits(self, hidden):
        hidden = self.lm_norm(F.gelu(self.lm_transform(hidden)))
        return F.linear(hidden, self.words.weight).float() + self.lm_bias


class Stage1(nn.Module):
    """STC + STM + STG."""

    def __init__(self, size: Size):
        super().__init__()
        self.adapter, width = QFormer(size, text=True), size.qformer["hidden_size"]
        self.speech, self.text = nn.Linear(width, size.embed_dim), nn.Linear(width, size.embed_dim)
        self.matching, self.temperature = nn.Linear(width, 2), nn.Parameter(torch.tensor(0.07))

    def forward(self, encoder, batch):
        frames, frames_mask = frames_of(encoder, batch)
        text, mask, ids = batch["text"], batch["text_mask"], batch["recording_id"]
        queries, cache = self.adapter.encode_queries(frames, frames_mask)
        encoded = self.adapter.encode_text(text, mask)
        speech = F.normalize(self.speech(queries).float(), dim=-1)
        words = F.normalize(self.text(encoded[:, 0]).float(), dim=-1)
        with torch.autocast(DEVICE, enabled=False):
            similarity = torch.einsum("bqe,te->btq", speech, words).amax(-1) / self.temperature
        same = ids[:, None] == ids[None]
        targets = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / len(ids)
        stc = (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.T, targets)) / 2
        with torch.no_grad():
            weights = similarity.masked_fill(same, -torch.inf)
            wrong_text = torch.multinomial(weights.softmax(1), 1)[:, 0]
            wrong_speech = torch.multinomial(weights.T.softmax(1), 1)[:, 0]
        paired = self.adapter.encode_pairs(
            torch.cat([frames, frames[wrong_speech], frames]),
            torch.cat([frames_mask, frames_mask[wrong_speech], frames_mask]),
            torch.cat([text, text, text[wrong_text]]),
            torch.cat([mask, mask, mask[wrong_text]]),
        )
        labels = torch.cat([torch.ones_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)]).long()
        stm = F.cross_entropy(self.matching(paired).float().mean(1), labels)
        begun = torch.cat([torch.full_like(text[:, :1], self.adapter.size.words - 1), text[:, 1:]], 1)
        hidden = self.adapter.encode_text_causally(begun, mask, cache)
        targets = text[:, 1:].masked_fill(~mask[:, 1:], -100).long().flatten()
        logits = self.adapter.lm_logits(hidden[:, :-1]).flatten(0, 1)
        return stc + stm + F.cross_entropy(logits, targets, label_smoothing=0.1)


class Stage2(nn.Module):
    """Cross-entropy of the answer, through the frozen LLM."""

    def __init__(self, size: Size):
        super().__init__()
        self.adapter = QFormer(size, text=False)
        self.projection = nn.Linear(size.qformer["hidden_size"], size.llm["hidden_size"])

    def forward(self, encoder, llm, batch):
        frames, frames_mask = frames_of(encoder, batch)
        speech = self.projection(self.adapter.encode_queries(frames, frames_mask)[0])
        embed, answer = llm.get_input_embeddings(), batch["answer"]
        parts = [embed(batch["before"]), speech.to(llm.dtype), embed(batch["after"]), embed(answer[:, :-1])]
        x = torch.cat(parts, 1)
        real = torch.ones(speech.shape[:2], dtype=torch.bool, device=x.device)
        masks = [batch["before_mask"], real, batch["after_mask"], batch["answer_mask"][:, :-1]]
        mask = torch.cat(masks, 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.autocast(DEVICE, enabled=False):
            hidden = llm.model(
                inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            # The prompt ends in the same column for all.
            logits = llm.lm_head(hidden[:, -answer.shape[1] :]).float()
        targets = answer.masked_fill(~batch["answer_mask"], -100).long()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def frames_of(encoder, batch):
    """Frames and their mask, without gradients."""
    mask = batch["waveform_mask"]
    with torch.no_grad(), torch.autocast(DEVICE, enabled=False):
        frames = encoder(batch["waveform"], attention_mask=mask.long()).last_hidden_state
        lengths = encoder._get_feat_extract_output_lengths(mask.sum(1))
        return frames, torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]


def time_encoder(size: Size, compiled: bool) -> Iterator[Result]:
    encoder, batch = make_encoder(size), on_device(recordings(*size.encoder), size.dtype)
    program = torch.compile(encoder, dynamic=False) if compiled else encoder

    @torch.inference_mode()
    def run() -> None:
        program(batch["waveform"], attention_mask=batch["waveform_mask"].long())

    yield timed("encoder", "{} x {:g} s".format(*size.encoder), run, size)


def time_step(name: str, size: Size, compiled: bool) -> Iterator[Result]:
    """Forward, backward, clipping and AdamW; gradients of what trains alone."""
    towers = [make_encoder(size)]
    model = (Stage1 if name == "stage1" else Stage2)(size).to(DEVICE).train()
    batch = on_device((stage1_batch if name == "stage1" else stage2_batch)(size), size.dtype)
    if name == "stage2":
        towers.append(make_llm(size))
    if compiled:
        stacks = [towers[0].encoder.layers, model.adapter.layers]
        for layer in (*stacks, towers[-1].model.layers) if name == "stage2" else stacks:
            for one in layer:
                one.compile(dynamic=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), fused=True)

    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=size.dtype == "bfloat16"):
            loss = model(*towers, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    shape = size.stage1 if name == "stage1" else size.stage2
    yield timed(name, "{} x {:g} s".format(*shape), run, size)


def timed(work: str, case: str, run: Callable[[], None], size: Size) -> Result:
    began = time.perf_counter()
    run()
    wait()
    first = time.perf_counter() - began
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = time_of(run, wait, size.seconds)
    row = {"work": work, "case": case, "seconds": seconds, "compile_seconds": first - seconds}
    return row | ({"bytes": torch.cuda.max_memory_allocated()} if DEVICE == "cuda" else {})


def time_decoding(size: Size, compiled: bool) -> Iterator[Result]:
    """Greedy answers by `generate`; "compiled" with its static cache."""
    llm = make_llm(size)
    options: dict[str, Any] = dict(do_sample=False, num_beams=1)
    if compiled:
        options["cache_implementation"] = "static"
    for number in size.decoding:
        ids = torch.from_numpy(prompts(size, number)).long().to(DEVICE)

        @torch.no_grad()
        def seconds_of(new: int, ids: torch.Tensor = ids) -> float:
            began = time.perf_counter()
            lengths = dict(max_new_tokens=new, min_new_tokens=new)
            llm.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **options)
            wait()
            return time.perf_counter() - began

        first = seconds_of(size.written)
        seconds_of(1)
        prefill = statistics.median(seconds_of(1) for _ in range(3))
        seconds = statistics.median(seconds_of(size.written) for _ in range(3))
        case = f"batch {number}, {size.read} + {size.written} tokens"
        yield {
            "work": "decoding",
            "case": case,
            "seconds": seconds,
            "compile_seconds": first - seconds,
            "prefill_seconds": prefill,
            "tokens_per_second": number * size.written / seconds,
        }


WORKS: dict[str, Callable[[Size, bool], Iterator[Result]]] = {
    "encoder": time_encoder,
    "stage1": lambda size, compiled: time_step("stage1", size, compiled),
    "stage2": lambda size, compiled: time_step("stage2", size, compiled),
    "decoding": time_decoding,
}


def main(how: str, size: str, *works: str) -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, sdpa, {how}"
    print(json.dumps({"versions": versions}))
    for work in works:
        for row in WORKS[work](SIZES[size], how == "compiled"):
            print(json.dumps(row), flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
