"""What holds for every adapter, in each of its published forms; and how each counts its tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax import flops, layers
from sparqle_jax.adapters import (
    KINDS,
    Config,
    conv1d,
    cross_attention,
    fully_connected,
    linear,
    pooling,
    qformer,
    windowed_qformer,
)
from sparqle_jax.model import Projection

WIDTH = 12
BERT = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)
ULTRAVOX = dict(remainder="pad", activation="swiglu", bias=False, pre_norm=True, mid_norm=True)
CONFIGS = {
    "linear, SLAM-ASR": linear.Config(k=5, hidden=8),
    "linear, Ultravox": linear.Config(k=4, hidden=16, **ULTRAVOX),
    "linear, Voxtral": linear.Config(k=4, hidden=8, activation="gelu", bias=False, projection_bias=False),
    "conv1d, SLAM-ASR": conv1d.Config(kernel=5, stride=5, hidden=8),
    "conv1d, SpeechVerse": conv1d.Config(kernel=3, stride=2, num_layers=2, channels=8, hidden=None),
    "windowed_qformer, SALMONN": windowed_qformer.Config(window=7, stride=7, **BERT),
    "windowed_qformer, overlapping": windowed_qformer.Config(window=6, stride=4, num_queries=2, **BERT),
    "windowed_qformer, Granite": windowed_qformer.Config(
        window=6, stride=6, num_queries=2, remainder="pad", frames_norm=False, **BERT
    ),
    "cross_attention": cross_attention.Config(num_queries=4, span_frames=20, num_hidden_layers=2, **BERT),
    "fully_connected": fully_connected.Config(k=3, hidden=(10, 8)),
    "pooling": pooling.Config(k=2, width=WIDTH),
    "qformer": qformer.Config(num_queries=4, num_hidden_layers=3, **BERT),
    "qformer, SLAM-ASR": qformer.Config(
        num_queries=4, num_hidden_layers=3, frames_norm=False, projection_norm="layer", **BERT
    ),
}
every_adapter = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def make(name: str, dtype=jnp.float32) -> nnx.Module:
    """An adapter of which every parameter matters: norms and biases are not 1 and 0."""
    config = CONFIGS[name]
    adapter = KINDS[config.kind].Adapter(config, WIDTH, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(adapter)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), max(1, len(leaves)))
    moved = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=False)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(name, dtype, method, state, *args):
    graph = nnx.graphdef(make(name, dtype))
    return getattr(nnx.merge(graph, state), method)(*args)


def call(name: str, *args, method: str = "__call__", dtype=jnp.float32):
    return _call(name, dtype, method, nnx.state(make(name, dtype)), *args)


def frames_of(*lengths: int, total: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random frames, padding too (and larger), and the mask of the real ones."""
    total = total or max(lengths)
    mask = np.arange(total) < np.array(lengths)[:, None]
    frames = np.random.default_rng(seed).normal(size=(len(lengths), total, WIDTH)).astype(np.float32)
    return np.where(mask[..., None], frames, 100 * frames), mask


def test_every_kind_is_tested():
    assert {config.kind for config in CONFIGS.values()} == set(KINDS)


@every_adapter
@given(
    lengths=st.tuples(*[st.sampled_from([1, 4, 9, 17, 20])] * 3),  # few, since each is compiled
    seed=st.integers(0, 10),
)
@settings(max_examples=6, deadline=None)
def test_a_padded_batch_gives_each_example_the_tokens_that_it_has_alone(name, lengths, seed):
    frames, mask = frames_of(*lengths, total=23, seed=seed)
    tokens, real = call(name, frames, mask)
    config = CONFIGS[name]
    assert tokens.shape == (3, config.num_tokens(23), config.width)
    for row, length in enumerate(lengths):
        alone, real_alone = call(name, frames[row, None, :length], mask[row, None, :length])
        count = config.num_tokens(length)
        assert alone.shape[1] == count
        assert real_alone.all()
        np.testing.assert_array_equal(real[row], np.arange(real.shape[1]) < count)
        np.testing.assert_allclose(tokens[row, :count], alone[0], atol=2e-5)


@every_adapter
def test_counts_of_tokens(name):
    config = CONFIGS[name]
    assert config.num_tokens(config.min_frames) >= 1
    if config.min_frames > 1:
        assert config.num_tokens(config.min_frames - 1) == 0
        assert config.num_tokens(0) == 0
    counts = np.arange(40)
    by_array = jax.jit(config.num_tokens)(counts)
    np.testing.assert_array_equal(by_array, [config.num_tokens(int(count)) for count in counts])


@pytest.mark.parametrize(
    ("config", "frames", "tokens"),
    [
        (linear.Config(k=5), 1499, 299),  # SLAM-ASR: T // 5
        (linear.Config(k=8, remainder="pad"), 1500, 188),  # Ultravox: ceil
        (linear.Config(k=4), 1500, 375),  # Voxtral: 375 for 30 s
        (conv1d.Config(), 1499, 299),
        (conv1d.Config(kernel=3, stride=2, num_layers=2), 1499, 374),  # 12.5 Hz
        (windowed_qformer.Config(), 1500, 88),  # SALMONN: 88 for 30 s
        (windowed_qformer.Config(), 16, 0),
        (windowed_qformer.Config(window=15, stride=15, num_queries=3, remainder="pad"), 100, 21),  # Granite
        (pooling.Config(), 1500, 750),  # Qwen2-Audio: 750 for 30 s
        (pooling.Config(), 25, 12),
        (pooling.Config(), 1, 0),
    ],
)
def test_published_counts_of_tokens(config, frames, tokens):
    assert config.num_tokens(frames) == tokens


@every_adapter
def test_too_few_frames_give_no_token(name):
    config = CONFIGS[name]
    if config.min_frames == 1:
        return
    frames, mask = frames_of(config.min_frames - 1, 0, total=config.min_frames)
    tokens, real = call(name, frames, mask)
    assert tokens.shape[1] == config.num_tokens(config.min_frames)
    assert not real.any()
    assert np.isfinite(tokens).all()
    short = config.min_frames - 1
    tokens, real = call(name, frames[:, :short], mask[:, :short])
    assert tokens.shape == (2, 0, config.width)
    assert real.shape == (2, 0)


@every_adapter
@pytest.mark.parametrize("frames_gradient", [False, True])
def test_flops_are_those_of_the_program(name, frames_gradient):
    config = CONFIGS[name]
    graph, state = nnx.split(make(name))
    frames, mask = frames_of(23, 20, 7)

    def loss(state, frames):
        tokens, real = nnx.merge(graph, state)(frames, mask)
        return jnp.sum(jnp.sin(tokens), where=real[..., None])

    wanted = (0, 1) if frames_gradient else 0
    counted = flops.count(jax.jit(jax.grad(loss, argnums=wanted)).trace(state, frames).jaxpr)
    assert counted.rematerialised == 0
    assert config.flops(3, 23, WIDTH, frames_gradient) == counted.model
    assert counted.model > 0 or config.kind == "pooling"


@every_adapter
def test_every_parameter_has_axes(name):
    for path, variable in nnx.to_flat_state(nnx.state(make(name))):
        axes = variable.get_metadata("axes")
        stacked = path[0] in ("layers", "cross_attentions") and CONFIGS[name].kind != "fully_connected"
        assert len(axes) + stacked == variable.get_value().ndim, path


@every_adapter
def test_every_parameter_matters(name):
    graph, state = nnx.split(make(name))
    frames, mask = frames_of(23, 20)

    def loss(state):
        return jnp.sin(nnx.merge(graph, state)(frames, mask)[0]).sum()

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        alone = CONFIGS[name].kind == "windowed_qformer" and CONFIGS[name].num_queries == 1
        softmax_of_one = alone and "self_attention" in path and ("query" in path or "key" in path)
        key_bias = path[-2:] == ("key", "bias")  # softmax ignores what is added to all its scores
        if not (softmax_of_one or key_bias):
            assert np.abs(gradient.get_value()).max() > 1e-5, path


@every_adapter
def test_bfloat16(name):
    frames, mask = frames_of(23, 12)
    expected, real = call(name, frames, mask)
    tokens, _ = call(name, frames.astype(jnp.bfloat16), mask, dtype=jnp.bfloat16)
    expected, tokens = np.asarray(expected)[real], np.asarray(tokens, np.float32)[real]
    assert np.abs(tokens - expected).max() < 0.05 * np.abs(expected).max()
    for _, variable in nnx.to_flat_state(nnx.state(make(name, jnp.bfloat16))):
        assert variable.get_value().dtype == jnp.float32


@every_adapter
def test_a_key_turns_dropout_on(name):
    frames, mask = frames_of(23)
    without, _ = call(name, frames, mask)
    drawn, again, other = (call(name, frames, mask, jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(drawn, again)
    has_dropout = hasattr(CONFIGS[name], "hidden_dropout_prob")
    assert np.array_equal(drawn, without) != has_dropout
    assert np.array_equal(drawn, other) != has_dropout


@pytest.mark.parametrize("name", [name for name in CONFIGS if hasattr(make(name), "attention")])
class TestAttention:
    def test_rows_sum_to_one_over_real_frames(self, name):
        frames, mask = frames_of(23, 17, 9)
        _, real = call(name, frames, mask)
        maps = call(name, frames, mask, method="attention")
        assert maps.dtype == jnp.float32
        assert maps.shape[1:] == (*real.shape, 23)
        np.testing.assert_allclose(maps.sum(-1), np.broadcast_to(real, maps.shape[:-1]), atol=1e-5)
        assert (np.asarray(maps) >= 0).all()
        assert not np.asarray(maps)[:, ~mask[:, None] & np.ones_like(real)[..., None]].any()

    def test_a_padded_batch_gives_each_example_what_it_has_alone(self, name):
        frames, mask = frames_of(17, 9, total=23)
        maps = call(name, frames, mask, method="attention")
        for row, length in enumerate([17, 9]):
            alone = call(name, frames[row, None, :length], mask[row, None, :length], method="attention")
            count = alone.shape[2]
            np.testing.assert_allclose(maps[:, row, :count, :length], alone[:, 0], atol=1e-5)

    def test_frames_without_weight_change_no_token(self, name):
        frames, mask = frames_of(20)
        maps = call(name, frames, mask, method="attention")
        tokens, _ = call(name, frames, mask)
        others = frames.copy()
        others[:, 7] = -frames[:, 3]
        changed = np.abs(call(name, others, mask)[0] - tokens).max((0, 2)) > 1e-6
        np.testing.assert_array_equal(changed, np.asarray(maps)[..., 7].max((0, 1)) > 0)


def test_windowed_attention_by_hand():
    """One layer, head and query: each window's softmax of products; frames that pad the last have no part."""
    sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    config = windowed_qformer.Config(window=3, stride=3, remainder="pad", frames_norm=False, **sizes)
    adapter = windowed_qformer.Adapter(config, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(adapter.layers)
    layer = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    frames = 50 * np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)

    x = adapter.embeddings_norm(adapter.query_tokens[...])
    x = layer.self_attention(x, layer.self_attention.attention.keys_values(x), None, None)
    query = np.asarray(layer.cross_attention.attention.query(x))[0, 0]
    keys = frames[0] @ np.asarray(layer.cross_attention.attention.key.kernel[...])
    expected = np.zeros((2, 5))
    for row, window in enumerate((slice(0, 3), slice(3, 5))):
        scores = np.exp(keys[window] @ query / np.sqrt(4))
        expected[row, window] = scores / scores.sum()
    assert expected[0, :3].std() > 0.01  # it does not look everywhere alike
    maps = adapter.attention(frames, np.ones((1, 5), bool))
    np.testing.assert_allclose(maps, expected[None, None], atol=1e-5)


def test_queries_with_positions_begin_from_left_to_right():
    """With span_frames, a query begins nearest to the frame that is its share of them."""
    config = cross_attention.Config(num_queries=4, span_frames=40, **BERT)
    queries = cross_attention.Adapter(config, 16, rngs=nnx.Rngs(0)).query_tokens[...][0]
    places = layers.sinusoids(jnp.arange(40), 16)
    assert np.asarray(queries @ places.T).argmax(1).tolist() == [5, 15, 25, 35]


class TestProjection:
    def test_bias(self):
        with_bias = Projection(linear.Config(hidden=8), 6, rngs=nnx.Rngs(0))
        without = Projection(linear.Config(hidden=8, projection_bias=False), 6, rngs=nnx.Rngs(0))
        assert with_bias.bias is not None
        assert [path for path, _ in nnx.to_flat_state(nnx.state(without))] == [("kernel",)]

    def test_norms(self):
        tokens = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
        for norm in ("layer", "rms"):
            config = linear.Config(hidden=8, projection_norm=norm)
            out = np.asarray(Projection(config, 64, rngs=nnx.Rngs(0))(tokens))
            np.testing.assert_allclose(np.square(out).mean(-1), 1, atol=1e-2)
            assert (np.abs(out.mean(-1)).max() < 1e-5) == (norm == "layer")


class TestConfigs:
    def test_an_unknown_kind_lists_the_kinds(self):
        with pytest.raises(pydantic.ValidationError) as error:
            pydantic.TypeAdapter(Config).validate_json('{"kind": "linaer"}')
        assert all(kind in str(error.value) for kind in KINDS)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_as_json_and_back(self, name):
        adapter = pydantic.TypeAdapter(Config)
        assert adapter.validate_json(CONFIGS[name].model_dump_json()) == CONFIGS[name]

    def test_a_field_of_another_kind_is_unknown(self):
        with pytest.raises(pydantic.ValidationError, match="num_queries"):
            pydantic.TypeAdapter(Config).validate_json('{"kind": "linear", "num_queries": 3}')

    def test_what_does_not_fit_together(self):
        with pytest.raises(ValueError, match="must be even"):
            linear.Config(hidden=9, activation="swiglu")
        with pytest.raises(ValueError, match="give their channels"):
            conv1d.Config(hidden=None)
        with pytest.raises(ValueError, match="stride=17"):
            windowed_qformer.Config(remainder="pad", stride=10)
        with pytest.raises(ValueError, match=r"adapter\.width=12"):
            pooling.Adapter(pooling.Config(), 12, rngs=nnx.Rngs(0))
