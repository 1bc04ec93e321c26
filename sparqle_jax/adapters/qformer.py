"""The Q-Former: frames -> queries. Learned query tokens read the frames by cross-attention.

A BERT whose every n-th layer has a cross-attention to the frames, for the queries only. In stage 1 it has a
text half as well (word and position embeddings, a feed-forward of its own in every layer, an LM head);
queries and text share the self-attention, and who may look at whom tells the three uses apart. Stage 2
and inference need the query half alone. After Qformer.py of the reference (BLIP-2's, from LAVIS).
"""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.adapters.bert import (
    AttentionBlock,
    FeedForward,
    KeysValues,
    Sizes,
    expanded,
    query_tokens,
    with_positions,
)
from sparqle_jax.sharding import split_batch


class Config(Sizes):
    """Sizes of a Q-Former; names and defaults as in BERT's configuration where it has them.

    span_frames: 0 is the paper's: nothing but the encoder tells a frame's position. Otherwise sinusoids of it
    are added to each frame, and the queries start as those of positions evenly over so many frames: they
    begin by reading from left to right, without which a small model takes very long to learn.
    frames_norm: the paper's layer norm of the frames, which trains; SLAM-ASR's q-former has none.
    """

    kind: Literal["qformer"] = "qformer"
    num_queries: pydantic.PositiveInt = 100
    span_frames: Annotated[int, pydantic.Field(ge=0)] = 0
    frames_norm: bool = True
    cross_attention_freq: pydantic.PositiveInt = 2
    max_position_embeddings: pydantic.PositiveInt = 512  # of its text half

    @property
    def min_frames(self) -> int:
        return 1

    @property
    def num_cross_attentions(self) -> int:
        return -(-self.num_hidden_layers // self.cross_attention_freq)

    def num_tokens(self, frames):
        """The number of queries, whatever the frames (int or array)."""
        return frames * 0 + self.num_queries

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """Forward and backward."""
        reading = dict(queries=self.num_queries, frames=frames, frames_width=frames_width)
        total = flops.TRAINED * self.forward_flops(size, **reading)
        return total if frames_gradient else total - self.frames_gradient_flops(size, frames, frames_width)

    def forward_flops(
        self,
        size: int,
        *,
        queries: int = 0,
        text: int = 0,
        frames: int = 0,
        frames_width: int = 0,
        cached: int = 0,
    ) -> int:
        """Forward: `size` examples of `queries` and `text` tokens, which see `cached` tokens as well."""
        width, tokens, layers = self.hidden_size, queries + text, self.num_hidden_layers
        total = layers * 4 * flops.linear(size * tokens, width, width)
        total += layers * flops.attention(size, tokens, tokens + cached, width)
        total += layers * 2 * flops.linear(size * tokens, width, self.intermediate_size)
        if not queries:
            return total
        reading = 2 * flops.linear(size * queries, width, width)
        reading += 2 * flops.linear(size * frames, frames_width, width)
        reading += flops.attention(size, queries, frames, width)
        return total + self.num_cross_attentions * reading

    def frames_gradient_flops(self, size: int, frames: int, frames_width: int) -> int:
        """The gradient of the frames, which a step leaves out where nothing before them trains: neither their
        norm (then 0) nor the encoder."""
        keys_values = 2 * flops.linear(size * frames, frames_width, self.hidden_size)
        return 0 if self.frames_norm else self.num_cross_attentions * keys_values


class QFormerLayer(nnx.Module):
    """Self-attention over queries and text; a feed-forward for each half; for queries also a cross-attention,
    which only some layers have: it is given."""

    def __init__(
        self, config: Config, text: bool, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.self_attention = AttentionBlock(config, config.hidden_size, **kwargs)
        self.query_mlp = FeedForward(config, **kwargs)
        self.text_mlp = FeedForward(config, **kwargs) if text else None

    def __call__(
        self,
        x: jax.Array,
        num_queries: int,
        mask: jax.Array | None,
        cross_attention: AttentionBlock | None,
        frames: jax.Array | None,
        frames_mask: jax.Array | None,
        cached: KeysValues | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, num_queries + L, A] -> the same, and the layer's own keys and values.

        `cached` keys and values stand before the layer's own; mask bool [B|1, 1, T|1, C] over both.
        """
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        keys_values = self.self_attention.attention.keys_values(x)
        if cached is None:
            seen = keys_values
        else:
            seen = tuple(jnp.concatenate([old, new], 1) for old, new in zip(cached, keys_values, strict=True))
        x = self.self_attention(x, seen, mask, keys[0])
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if num_queries:
            if cross_attention is not None:
                source = cross_attention.attention.keys_values(frames)
                queries = cross_attention(queries, source, frames_mask, keys[1])
            queries = self.query_mlp(queries, keys[2])
        if text.shape[1]:
            text = self.text_mlp(text, keys[3])
        return jnp.concatenate([queries, text], 1), keys_values


class Adapter(nnx.Module):
    """Frames [B, T, D] -> queries [B, Q, A]; with the text half also text features, matching and an LM.

    vocab_size: of the text half (stage 1), whose last token, [DEC], begins a text to generate; None: there is
    no text half. Every method takes `key`: with one, dropout is on (training); without, off. Masks are bool,
    1 = real. Frames are the encoder's own: their layer norm (`ln_speech` in the reference) is part of the
    adapter.
    """

    def __init__(
        self,
        config: Config,
        frames_width: int,
        *,
        vocab_size: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = dict(param_dtype=param_dtype, rngs=rngs)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config, self.dtype, self.vocab_size = config, dtype, vocab_size
        self.frames_norm = layers.LayerNorm(frames_width, 1e-5, **norm) if config.frames_norm else None
        self.query_tokens = query_tokens(config, config.num_queries, config.span_frames, **norm)
        self.embeddings_norm = layers.LayerNorm(width, eps, **norm)
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        self.layers = layers.stack(
            lambda rngs: QFormerLayer(config, vocab_size is not None, **kinds, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.cross_attentions = layers.stack(
            lambda rngs: AttentionBlock(config, frames_width, **kinds, rngs=rngs),
            config.num_cross_attentions,
            rngs,
        )
        if vocab_size is not None:
            # Embeddings are looked up in float32: the residual stream starts here.
            table = dict(dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)
            # Not split by vocabulary: 30,523 divides by no mesh.
            axes = (None, "embed")
            self.word_embeddings = layers.Embedding(vocab_size, width, axes, **table)
            self.position_embeddings = layers.Embedding(config.max_position_embeddings, width, axes, **table)
            self.lm_transform = layers.linear(width, width, ("embed", None), **kwargs)
            self.lm_norm = layers.LayerNorm(width, eps, **norm)
            self.lm_bias = nnx.Param(jnp.zeros(vocab_size, param_dtype), axes=(None,))

    def __call__(
        self, frames: jax.Array, frames_mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, D] -> queries float32 [B, Q, A], all of them real: mask bool [B, Q]."""
        queries = self.encode_queries(frames, frames_mask, key)[0]
        return queries, jnp.ones(queries.shape[:2], bool)

    @property
    def bos_token_id(self) -> int:
        """[DEC], which begins a text to generate."""
        return self.vocab_size - 1

    def encode_queries(
        self, frames: jax.Array, frames_mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Queries alone -> (queries [B, Q, A], the layers' keys and values for `encode_text_causally`).

                 q1 q2 q3   frames
        query 1   x  x  x     x
        query 2   x  x  x     x
        query 3   x  x  x     x
        """
        batch = frames.shape[0]
        embed_key, layers_key = _split(key)
        x = self._start(expanded(self.query_tokens, batch), embed_key)
        return self._run(x, self.config.num_queries, None, frames, frames_mask, None, layers_key)

    def attention(self, frames: jax.Array, frames_mask: jax.Array | None = None) -> jax.Array:
        """Attention weights of each query to each frame, in every cross-attention: the mean of its heads.

        frames [B, T, D] -> float32 [layers with cross-attention, B, Q, T], each row of sum 1.
        """
        x = self._start(expanded(self.query_tokens, frames.shape[0]), None)
        placed = self._place(frames)
        mask = None if frames_mask is None else frames_mask.astype(bool)[:, None, None, :]
        maps = []
        for number in range(self.config.num_hidden_layers):
            layer, cross_attention = self.layer(number)
            if cross_attention is not None:
                attention = layer.self_attention.attention
                attended = layer.self_attention(x, attention.keys_values(x), None, None)
                maps.append(cross_attention.attention.weights(attended, placed, mask).mean(1))
            x, _ = layer(x, self.config.num_queries, None, cross_attention, placed, mask, None, None)
        return jnp.stack(maps)

    def encode_text(self, ids: jax.Array, mask: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Text alone, as in BERT: ids int [B, L], mask bool [B, L] -> [B, L, A].

                t1 t2 pad
        text 1   x  x  .
        text 2   x  x  .
        """
        embed_key, layers_key = _split(key)
        x = self._start(self._embed_text(ids, mask), embed_key)
        return self._run(x, 0, mask[:, None, None, :], None, None, None, layers_key)[0]

    def encode_pairs(
        self,
        frames: jax.Array,
        frames_mask: jax.Array | None,
        ids: jax.Array,
        mask: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Queries and text both ways -> queries [B, Q, A] that have read frames and text.

                 q1 q2  t1 t2 pad   frames
        query 1   x  x   x  x  .      x
        query 2   x  x   x  x  .      x
        text 1    x  x   x  x  .      .
        text 2    x  x   x  x  .      .
        """
        num_queries = self.config.num_queries
        queries = expanded(self.query_tokens, frames.shape[0])
        embed_key, layers_key = _split(key)
        x = self._start(jnp.concatenate([queries, self._embed_text(ids, mask)], 1), embed_key)
        mask = jnp.pad(mask.astype(bool), ((0, 0), (num_queries, 0)), constant_values=True)
        x, _ = self._run(x, num_queries, mask[:, None, None, :], frames, frames_mask, None, layers_key)
        return x[:, :num_queries]

    def encode_text_causally(
        self, ids: jax.Array, mask: jax.Array, cache: KeysValues, key: jax.Array | None = None
    ) -> jax.Array:
        """Text from left to right on the queries' cached keys and values -> [B, L, A], for `lm_logits`.

                q1 q2  t1 t2 t3 pad
        text 1   x  x   x  .  .  .
        text 2   x  x   x  x  .  .
        text 3   x  x   x  x  x  .
        """
        length = ids.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool)) & mask.astype(bool)[:, None, :]
        causal = jnp.pad(causal, ((0, 0), (0, 0), (self.config.num_queries, 0)), constant_values=True)
        embed_key, layers_key = _split(key)
        x = self._start(self._embed_text(ids, mask), embed_key)
        return self._run(x, 0, causal[:, None], None, None, cache, layers_key)[0]

    def lm_logits(self, hidden: jax.Array) -> jax.Array:
        """The LM head, its output matrix shared with the word embeddings: [..., A] -> float32 [..., V]."""
        hidden = layers.activation(self.config.hidden_act)(self.lm_transform(hidden))
        hidden = self.lm_norm(hidden.astype(jnp.float32))
        table = self.word_embeddings.embedding[...].astype(self.lm_transform.dtype)
        logits = jnp.einsum(
            "...A,VA->...V", hidden.astype(table.dtype), table, preferred_element_type=jnp.float32
        )
        return logits + self.lm_bias[...].astype(jnp.float32)

    def _embed_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        if self.vocab_size is None:
            raise ValueError("this Q-Former has no text half: build it with vocab_size=.")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"texts are padded to {ids.shape[1]} tokens but the Q-Former has "
                f"{self.config.max_position_embeddings} position embeddings: shorten the texts, or make "
                "max_position_embeddings larger."
            )
        text = self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1]))
        return jnp.where(mask[..., None], text, 0)  # a NaN in padding would come through attention's zeros

    def _start(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return layers.dropout(self.embeddings_norm(x), self.config.hidden_dropout_prob, key)

    def _place(self, frames: jax.Array) -> jax.Array:
        """Frames [B, T, D] as the cross-attentions read them: normed, with their positions."""
        if self.frames_norm is not None:
            frames = self.frames_norm(frames)
        return with_positions(frames) if self.config.span_frames else frames

    def _run(
        self,
        x: jax.Array,
        num_queries: int,
        mask: jax.Array | None,
        frames: jax.Array | None,
        frames_mask: jax.Array | None,
        cache: KeysValues | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues]:
        """The layers: x [B, num_queries + L, A] -> the same, and their keys and values."""
        if frames is not None:
            frames = self._place(frames)
        if frames_mask is not None:
            frames_mask = frames_mask.astype(bool)[:, None, None, :]
        if mask is not None:
            mask = mask.astype(bool)
        graph, state = nnx.split(self.layers)
        cross_graph, cross_state = nnx.split(self.cross_attentions)

        def block(x, part):
            """A layer with cross-attention, and those without up to the next."""
            of_layers, of_cross = part
            cross_attention = nnx.merge(cross_graph, of_cross)
            all_keys_values = []
            for i in range(len(of_layers[0])):
                number, state, cached = _at(of_layers, i)
                layer_key = None if key is None else jax.random.fold_in(key, number)
                layer = nnx.merge(graph, state)
                x, keys_values = layer(
                    x, num_queries, mask, cross_attention, frames, frames_mask, cached, layer_key
                )
                x, cross_attention = split_batch(x), None
                all_keys_values.append(keys_values)
            return x, jax.tree.map(lambda *layers: jnp.stack(layers), *all_keys_values)

        freq = self.config.cross_attention_freq
        of_layers = (jnp.arange(self.config.num_hidden_layers), state, cache)
        whole, rest = divmod(self.config.num_hidden_layers, freq)
        blocks = jax.tree.map(lambda x: x[: whole * freq].reshape(whole, freq, *x.shape[1:]), of_layers)
        with jax.named_scope("layers"):
            x, keys_values = jax.lax.scan(block, x, (blocks, _at(cross_state, slice(whole))))
            keys_values = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), keys_values)
            if rest:
                x, last = block(x, (_at(of_layers, slice(-rest, None)), _at(cross_state, whole)))
                keys_values = jax.tree.map(lambda *x: jnp.concatenate(x), keys_values, last)
        return x, keys_values

    def layer(self, number: int) -> tuple[QFormerLayer, AttentionBlock | None]:
        """A layer, and its cross-attention if it has one."""
        graph, state = nnx.split(self.layers)
        layer = nnx.merge(graph, _at(state, number))
        block, place = divmod(number, self.config.cross_attention_freq)
        if place:
            return layer, None
        graph, state = nnx.split(self.cross_attentions)
        return layer, nnx.merge(graph, _at(state, block))


def _at(stacked: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda x: x[index], stacked)


def _split(key: jax.Array | None):
    return (None, None) if key is None else jax.random.split(key)
