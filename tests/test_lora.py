"""LoRA on the language model: what trains, what it costs, and that it is saved, merged and split."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from sparqle_jax import assemble, flops
from sparqle_jax.adapters import qformer
from sparqle_jax.encoders import hubert
from sparqle_jax.generate import GenerationConfig, generate
from sparqle_jax.llms import decoder, lora
from sparqle_jax.model import partition
from sparqle_jax.published.peft import load_lora, read_config, save_lora
from sparqle_jax.sharding import make_mesh, state_sharding
from tests.batches import stage2_batch

NAMES = ("down", "gate", "key", "out", "query", "up", "value")
ALL = lora.Config(rank=2, alpha=6.0, targets=NAMES)
GREEDY = GenerationConfig(8, eos_token_ids=(97,))
LLM = decoder.Config(
    vocab_size=98,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    qkv_bias=True,
)
HUBERT = hubert.Config.from_dict(
    dict(
        model_type="hubert",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
)
ADAPTER = qformer.Config(
    num_queries=4,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def make_llm(dtype=jnp.float32, **options) -> decoder.LLM:
    return decoder.LLM(LLM, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(1), **options)


def with_lora(config: lora.Config, dtype=jnp.float32, **options) -> decoder.LLM:
    """LoRA whose B is not zero, as after training."""
    llm = lora.add(make_llm(dtype, **options), config, nnx.Rngs(2))
    for number, linear in enumerate(lora.linears(llm).values()):
        if isinstance(linear, lora.Linear):
            b = linear.lora_b
            b[...] = 0.3 * jax.random.normal(jax.random.key(number), b.shape)
    return llm


def make_model(config: lora.Config | None, **options):
    encoder, parts = hubert.Encoder(HUBERT, rngs=nnx.Rngs(0)), assemble.Parts(adapter=ADAPTER)
    llm = make_llm(**options) if config is None else with_lora(config, **options)
    return assemble.make_speech_llm(encoder, parts, llm, dtype=jnp.float32, rngs=nnx.Rngs(3))


def states(llm, *, key=None) -> np.ndarray:
    """Hidden states of an answer after a padded prompt."""
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(2, 5, 16)).astype(np.float32)
    mask = np.arange(5) >= np.array([[0], [2]])
    answer = rng.integers(0, 98, (2, 4))
    return np.asarray(_states(*nnx.split(llm), key, prompt, mask, answer), np.float32)


@partial(jax.jit, static_argnums=0)
def _states(graph, state, key, prompt, mask, answer):
    llm = nnx.merge(graph, state)
    llm = llm if key is None else lora.with_dropout(llm, key)
    return llm.answer_states(prompt, mask, answer, jnp.ones(answer.shape, bool))


def gradients(model, batch):
    """The loss, and the gradients of what trains, by name."""
    graph, trained, frozen = partition(model)
    loss, of_trained = _gradients(graph, trained, frozen, batch, jax.random.key(0))
    return loss, {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(of_trained)}


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1)
def _gradients(graph, trained, frozen, batch, key):
    return nnx.merge(graph, trained, frozen).loss(batch, key)[0]


@partial(jax.jit, static_argnums=(0, 4))
def _loss(graph, state, batch, key, train):
    return nnx.merge(graph, state).loss(batch, key, train=train)[0]


def by_hand(llm: decoder.LLM) -> decoder.LLM:
    """The bare LLM with W + s A B as its kernels, layer by layer, in NumPy."""
    bare = make_llm()
    for name in llm.lora.targets:
        rank = llm.lora.ranks.get(name, llm.lora.rank)
        alpha = llm.lora.alphas.get(name, llm.lora.alpha)
        scale = alpha / rank**0.5 if llm.lora.rslora else alpha / rank
        theirs, ours = getattr(llm.layers, name), getattr(bare.layers, name)
        a, b = np.asarray(theirs.lora_a[...]), np.asarray(theirs.lora_b[...])
        assert a.shape[-1] == b.shape[-2] == rank
        kernel = np.stack([w + scale * a[i] @ b[i] for i, w in enumerate(np.asarray(ours.kernel[...]))])
        ours.kernel[...] = jnp.asarray(kernel)
    return bare


CONFIGS = {
    "default": lora.Config(),
    "all": ALL,
    "rslora": ALL.model_copy(update={"rslora": True}),
    "each its own": lora.Config(rank=2, targets=NAMES, ranks={"key": 5, "up": 1}, alphas={"key": 2.0}),
}


def test_new_lora_changes_nothing_and_shares_the_frozen_arrays():
    llm = make_llm()
    new = lora.add(llm, ALL, nnx.Rngs(0))
    np.testing.assert_array_equal(states(new), states(llm))
    assert llm.lora is None
    before, after = (dict(nnx.to_flat_state(nnx.state(x))) for x in (llm, new))
    assert len(after) == len(before) + 2 * len(NAMES)
    assert all(after[path].get_value() is value.get_value() for path, value in before.items())
    a = np.asarray(new.layers.down.lora_a[...])
    assert a.shape == (3, 24, 2)
    # Uniform up to 1 / sqrt(in), as torch's kaiming_uniform_(a=sqrt(5)), and another in each layer.
    assert 0.9 / 24**0.5 < np.abs(a).max() <= 1 / 24**0.5
    assert len(np.unique(a)) == a.size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lora_is_the_low_rank_change_of_the_kernels(config):
    llm = with_lora(config)
    expected = states(by_hand(llm))
    assert np.abs(expected - states(make_llm())).max() > 0.1
    np.testing.assert_allclose(states(llm), expected, atol=1e-5)
    np.testing.assert_allclose(states(lora.merge(llm)), expected, atol=1e-5)


def test_a_merged_llm_is_an_ordinary_one():
    llm = make_llm()
    merged = lora.merge(with_lora(ALL))
    assert nnx.graphdef(merged) == nnx.graphdef(llm)
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(llm))
    assert lora.merge(llm) is llm


def test_bfloat16_towers_have_float32_lora():
    llm = with_lora(ALL, jnp.bfloat16)
    assert llm.layers.query.lora_a.dtype == llm.layers.query.lora_b.dtype == jnp.float32
    assert llm.layers.query(jnp.ones((3, 1, 16))).dtype == jnp.bfloat16
    merged = lora.merge(llm)
    assert merged.layers.query.kernel.dtype == jnp.bfloat16
    assert nnx.graphdef(merged) == nnx.graphdef(make_llm(jnp.bfloat16))
    np.testing.assert_allclose(states(llm), states(merged), atol=0.1)  # states are about 1


@pytest.mark.slow
@pytest.mark.parametrize("remat", [None, "dots", "full"])
def test_nothing_but_adapter_projection_and_lora_trains(remat):
    model = make_model(ALL, remat=remat)
    batch = stage2_batch(np.random.default_rng(0))
    graph, trained, frozen = partition(model)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)}
    of_llm = {name for name in names if name.startswith("llm.")}
    assert of_llm == {f"llm.layers.{name}.lora_{ab}" for name in NAMES for ab in "ab"}
    before = dict(nnx.to_flat_state(nnx.state(model)))

    _, of_trained = gradients(model, batch)
    assert of_trained.keys() == names
    for name in of_llm:
        norms = np.linalg.norm(np.asarray(of_trained[name]).reshape(3, -1), axis=1)
        assert (norms > 1e-6).all(), name  # in every layer
    _, expected = gradients(make_model(ALL), batch)
    for name in of_llm:
        np.testing.assert_allclose(of_trained[name], expected[name], rtol=1e-4, atol=1e-7)

    optimizer = optax.sgd(0.1)
    flat = [(path, v.replace(of_trained[".".join(map(str, path))])) for path, v in nnx.to_flat_state(trained)]
    updates, _ = optimizer.update(nnx.from_flat_state(flat), optimizer.init(trained))
    after = nnx.merge(graph, optax.apply_updates(trained, updates), frozen)
    for path, value in nnx.to_flat_state(nnx.state(after)):
        same = np.array_equal(value.get_value(), before[path].get_value())
        name = ".".join(map(str, path))
        assert same or name in names
        assert not (same and name in of_llm)


def test_gradients_are_those_of_finite_differences():
    model, batch = make_model(ALL), stage2_batch(np.random.default_rng(0))
    _, found = gradients(model, batch)
    for name, at in (("gate", (2, 3, 1)), ("query", (0, 5, 0))):
        slope = []
        for step in (1e-2, -1e-2):
            other = nnx.clone(model)
            a = getattr(other.llm.layers, name).lora_a
            a[...] = a[...].at[at].add(step)
            slope.append(float(_loss(*nnx.split(other), batch, jax.random.key(0), True)))
        np.testing.assert_allclose(
            (slope[0] - slope[1]) / 2e-2, found[f"llm.layers.{name}.lora_a"][at], rtol=0.02, atol=1e-5
        )


def test_dropout_acts_on_the_input_of_a_in_training_alone():
    linear = with_lora(ALL.model_copy(update={"dropout": 0.5})).layers.up
    graph, state = nnx.split(linear)
    linear = nnx.merge(graph, jax.tree.map(lambda x: x[1], state))  # of one layer
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    kernel, a, b = (np.asarray(v[...]) for v in (linear.kernel, linear.lora_a, linear.lora_b))
    np.testing.assert_allclose(linear(x), x @ kernel + 3 * x @ a @ b, atol=1e-5)
    key = jax.random.key(5)
    linear.dropout_key = nnx.Variable(key)
    dropped = np.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0)
    np.testing.assert_allclose(linear(x), x @ kernel + 3 * dropped @ a @ b, atol=1e-5)


def test_dropout_is_a_function_of_the_key_and_another_in_each_layer():
    config = ALL.model_copy(update={"dropout": 0.5})
    llm, plain = with_lora(config), states(with_lora(ALL))
    one, two = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(states(llm), plain)
    first = states(llm, key=one)
    np.testing.assert_array_equal(first, states(llm, key=one))
    np.testing.assert_array_equal(first, states(with_lora(config, remat="full"), key=one))
    assert np.abs(first - plain).max() > 0.05
    assert np.abs(first - states(llm, key=two)).max() > 0.05
    keys = [
        jax.random.key_data(x.dropout_key[...]) for x in lora.linears(lora.with_dropout(llm, one)).values()
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * len(NAMES)
    assert llm.layers.query.dropout_key is None

    model, batch = make_model(config), stage2_batch(np.random.default_rng(0))
    losses = {
        (seed, train): float(_loss(*nnx.split(model), batch, jax.random.key(seed), train))
        for seed in (1, 2)
        for train in (True, False)
    }
    assert losses[1, False] == losses[2, False]
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("config", [None, *CONFIGS.values()], ids=["without", *CONFIGS])
@pytest.mark.parametrize("remat", [None, "dots"])
def test_flops_are_those_of_the_program(config, remat):
    if config is not None:
        config = config.model_copy(update={"dropout": 0.1})
    model, batch = make_model(config, remat=remat), stage2_batch(np.random.default_rng(0))
    graph, trained, frozen = partition(model)

    def step(trained):
        def loss_of(trained):
            return nnx.merge(graph, trained, frozen).loss(batch, jax.random.key(0))

        return jax.value_and_grad(loss_of, has_aux=True)(trained)

    counted = flops.count(jax.jit(step).trace(trained).jaxpr)
    assert counted.model == sum(model.flops(batch).values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_is_loaded_again(config, tmp_path):
    model = make_model(config)
    assemble.save(model, tmp_path / "adapter.safetensors")
    assert assemble.read_parts(tmp_path / "adapter.safetensors").lora == config
    again = assemble.load_speech_llm(tmp_path / "adapter.safetensors", model.encoder, make_llm())
    assert nnx.graphdef(again) == nnx.graphdef(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_a_model_without_lora_is_saved_without(tmp_path):
    file, model = tmp_path / "adapter.safetensors", make_model(None)
    assemble.save(model, file)
    assert assemble.read_parts(file).lora is None
    assert assemble.load_speech_llm(file, model.encoder, model.llm).llm.lora is None


def test_parts_with_lora_make_a_model_with_lora():
    encoder = hubert.Encoder(HUBERT, rngs=nnx.Rngs(0))
    parts = assemble.Parts(adapter=ADAPTER, lora=ALL)

    def make():
        return assemble.make_speech_llm(encoder, parts, make_llm(), dtype=jnp.float32, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)  # as the planner has it
    assert model.llm.lora == ALL
    assert model.llm.layers.up.lora_b.shape == (3, 2, 24)
    assert assemble.parts_in(model) == parts


def test_generation_with_lora_is_that_of_the_merged_llm():
    model = make_model(ALL)
    merged, bare = nnx.clone(model), make_model(None)
    merged.llm = lora.merge(model.llm)
    batch = prompts_of(stage2_batch(np.random.default_rng(0)))
    answers = generate(model, batch, GREEDY)
    np.testing.assert_array_equal(answers, generate(merged, batch, GREEDY))
    assert not np.array_equal(answers, generate(bare, batch, GREEDY))


def prompts_of(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if not name.startswith("answer")}


@partial(jax.jit, static_argnums=0)
def _stepwise(graph, state, prompt, answer):
    """The states of `answer_states`, token by token."""
    llm = nnx.merge(graph, state)
    hidden, cache = llm.prefill(prompt, jnp.ones(prompt.shape[:2], bool), 9)
    found = [hidden]
    for i in range(3):
        hidden, cache = llm.step(answer[:, i], cache)
        found.append(hidden)
    return jnp.stack(found, 1)


def test_prefill_and_steps_give_what_a_whole_answer_gives():
    llm, rng = with_lora(ALL), np.random.default_rng(0)
    prompt, answer = rng.normal(size=(2, 5, 16)).astype(np.float32), rng.integers(0, 98, (2, 4))
    expected = _states(*nnx.split(by_hand(llm)), None, prompt, np.ones((2, 5), bool), answer)
    for model in (llm, lora.merge(llm)):
        np.testing.assert_allclose(_stepwise(*nnx.split(model), prompt, answer), expected, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_same(tmp_path):
    mesh = make_mesh((2, 2, 2))
    model, batch = make_model(ALL), stage2_batch(np.random.default_rng(0), 4)
    assemble.save(model, tmp_path / "adapter.safetensors")
    towers = []
    for tower in (model.encoder, make_llm()):
        graph, state = nnx.split(tower)
        towers.append(nnx.merge(graph, jax.device_put(state, state_sharding(state, mesh))))
    split = assemble.load_speech_llm(tmp_path / "adapter.safetensors", *towers, mesh=mesh)
    up = split.llm.layers.up
    assert up.lora_a.sharding.spec == PartitionSpec(None, "fsdp", None)
    assert up.lora_b.sharding.spec == PartitionSpec(None, None, "model")
    assert up.kernel.sharding == lora.merge(split.llm).layers.up.kernel.sharding

    loss, found = gradients(model, batch)
    with jax.set_mesh(mesh):
        split_loss, split_found = gradients(split, batch)
        merged = states(lora.merge(split.llm))
        np.testing.assert_allclose(states(split.llm), merged, atol=1e-5)
    np.testing.assert_allclose(merged, states(by_hand(model.llm)), atol=1e-5)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for name in (name for name in found if name.startswith("llm.")):
        error = np.linalg.norm(split_found[name] - found[name]) / np.linalg.norm(found[name])
        assert error < 1e-3, name
    prompts = prompts_of(batch)
    np.testing.assert_array_equal(generate(split, prompts, GREEDY), generate(model, prompts, GREEDY))


def test_equal_configurations_are_one_key():
    """They are static in compiled programs."""
    one, two = (
        lora.Config(targets=NAMES, ranks=dict(x)) for x in ([("up", 2), ("key", 3)], [("key", 3), ("up", 2)])
    )
    assert one == two
    assert hash(one) == hash(two) != hash(lora.Config(targets=NAMES))


def test_mistakes_are_named():
    with pytest.raises(
        ValueError, match=r"\['q_proj'\] match no .*'down', 'gate', 'key', 'out', 'query', 'up'"
    ):
        lora.add(make_llm(), lora.Config(targets=("q_proj", "value")), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\['lm_head'\] match no"):
        lora.add(make_llm(), lora.Config(targets=("lm_head",)), nnx.Rngs(0))
    with pytest.raises(ValueError, match="LoRA already"):
        lora.add(with_lora(ALL), ALL, nnx.Rngs(0))
    for wrong in (
        dict(rank=0),
        dict(alpha=0.0),
        dict(dropout=1.0),
        dict(targets=()),
        dict(ranks={"query": 0}),
        dict(rsLora=True),
        dict(ranks={"up": 3}),  # no target
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lora.Config(**wrong)


# --- peft's folders, without peft ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_peft_folder_is_read_as_it_was_written(config, tmp_path):
    llm = with_lora(config.model_copy(update={"dropout": 0.25}))
    save_lora(llm, tmp_path, base="some/llm")
    again = load_lora(tmp_path, make_llm())
    assert fields(again.lora) == fields(llm.lora)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(llm))


def fields(config: lora.Config) -> dict:
    """Without the order of targets, which peft does not keep."""
    return config.model_dump() | {"targets": set(config.targets)}


def test_the_tensors_have_pefts_names_and_shapes(tmp_path):
    llm = with_lora(lora.Config(rank=2, targets=("query", "down")))
    save_lora(llm, tmp_path, base="some/llm")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers."
    assert tensors.keys() == {
        f"{prefix}{i}.{module}.lora_{ab}.weight"
        for i in range(3)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for ab in "AB"
    }
    a, b = (tensors[f"{prefix}2.mlp.down_proj.lora_{ab}.weight"] for ab in "AB")
    assert (a.shape, b.shape) == ((2, 24), (16, 2))
    np.testing.assert_array_equal(a, llm.layers.down.lora_a[2].T)
    np.testing.assert_array_equal(b, llm.layers.down.lora_b[2].T)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"]) == (2, 16)
    assert values["target_modules"] == ["down_proj", "q_proj"]


def write(folder, **values):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4} | values))


@pytest.mark.parametrize(
    ("values", "targets", "ranks"),
    [
        (dict(target_modules=None), {"query", "value"}, {}),
        (dict(), {"query", "value"}, {}),
        (dict(target_modules="all-linear"), set(NAMES), {}),
        (dict(target_modules=r".*\.(up|down)_proj"), {"up", "down"}, {}),
        (dict(target_modules=["self_attn.k_proj", "o_proj"]), {"key", "out"}, {}),
        (dict(target_modules=[f"model.layers.{i}.mlp.gate_proj" for i in range(3)]), {"gate"}, {}),
        (dict(target_modules="all-linear", exclude_modules=["q_proj"]), set(NAMES) - {"query"}, {}),
        # The first pattern that matches wins.
        (dict(rank_pattern={"v_proj": 7, ".*_proj": 4}), {"query", "value"}, {"value": 7}),
        (dict(rank_pattern={r"layers\.\d+\.self_attn\.q_proj": 2}), {"query", "value"}, {"query": 2}),
    ],
)
def test_peft_targets_and_patterns(values, targets, ranks, tmp_path):
    write(tmp_path, **values)
    config = read_config(tmp_path, make_llm())
    assert set(config.targets) == targets
    assert (config.rank, config.ranks, config.alpha) == (4, ranks, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(use_dora=True), "use_dora=True"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication="),
        (dict(bias="all"), "bias='all'"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(layers_to_transform=0), "layers_to_transform=0"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (dict(new_kind_of_lora={"a": 1}), "new_kind_of_lora="),
        (
            dict(rank_pattern={"layers.1.self_attn.q_proj": 2}),
            r"q_proj is not the same .*\(2, 8.0\), \(4",
        ),
        (
            dict(alpha_pattern={"layers.1.self_attn.q_proj": 2}),
            r"q_proj is not the same .*\(4, 2.0\), \(4",
        ),
        (dict(target_modules=["layers.0.mlp.up_proj"]), r"up_proj is not the same .*None"),
        (dict(target_modules=["c_attn"]), r"\['c_attn'\] match no .*'down_proj', .*'v_proj'"),
        (dict(r=0), "rank"),
    ],
)
def test_peft_folders_that_are_refused(values, message, tmp_path):
    write(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path, make_llm())


def test_peft_folders_that_are_incomplete_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_lora(tmp_path, make_llm())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no peft_type"):
        load_lora(tmp_path, make_llm())
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist"):
        load_lora(tmp_path, make_llm())
    save_lora(with_lora(lora.Config(rank=4, targets=("query", "key"))), tmp_path, base="some/llm")
    write(tmp_path, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"(?s)v_proj.lora_A.weight is missing.*k_proj.* is unexpected"):
        load_lora(tmp_path, make_llm())
    write(tmp_path, target_modules=["q_proj", "k_proj"], r=3)
    with pytest.raises(ValueError, match=r"has shape \(4, 16\), needed is \(3, 16\)"):
        load_lora(tmp_path, make_llm())
    with pytest.raises(ValueError, match="no LoRA"):
        save_lora(make_llm(), tmp_path, base="some/llm")
