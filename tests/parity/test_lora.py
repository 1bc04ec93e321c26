"""LoRA against peft in PyTorch: its folders here, this project's folders there, and gradients."""

from functools import partial

import jax
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from sparqle_jax import pretrained
from sparqle_jax.llms import lora
from sparqle_jax.published.peft import load_lora, save_lora

SIZES = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
# As peft is told, and how often a linear map of a layer then has LoRA.
CONFIGS = {
    "default": (dict(), 2),
    "rslora": (
        dict(r=4, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj"]),
        3,
    ),
    "all-linear": (dict(r=2, lora_alpha=5, target_modules="all-linear"), 7),
    "expression": (dict(target_modules=r".*mlp\.(up|gate)_proj", rank_pattern={"gate_proj": 3}), 2),
    "patterns": (
        dict(
            r=4,
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={"q_proj": 2, "up_proj": 6},
            alpha_pattern={r"self_attn\.v_proj": 5},
        ),
        3,
    ),
}


def numbers(tensor) -> np.ndarray:
    return tensor.detach().numpy()


def changed(model: torch.nn.Module, scale: float, only: str = "") -> None:
    """Moves parameters from where they begin: norms at 1, biases and B at 0, which would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(scale * torch.randn_like(parameter))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    changed(model, 0.1)
    folder = tmp_path_factory.mktemp("llm")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return pretrained.load_llm(folder)


def bare(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 101, (2, 20))


@partial(jax.jit, static_argnums=0)
def _logits(graph, state, ids):
    llm = nnx.merge(graph, state)
    return llm.logits(llm(ids)[0])


def logits(llm, ids) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(llm), ids))


def assert_close(found, expected):
    """To 1e-5 of the largest, which is about 10."""
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_gives_the_same_here(name, folder, llm, ids, tmp_path):
    values, count = CONFIGS[name]
    theirs = peft.get_peft_model(bare(folder), peft.LoraConfig(**values)).eval()
    changed(theirs, 0.1, only="lora_")
    theirs.save_pretrained(tmp_path)
    ours = load_lora(tmp_path, llm)
    assert len(ours.lora.targets) == count
    expected = numbers(theirs(torch.from_numpy(ids)).logits)
    assert np.abs(expected - logits(llm, ids)).max() > 0.1
    assert_close(logits(ours, ids), expected)
    merged = numbers(theirs.merge_and_unload()(torch.from_numpy(ids)).logits)
    assert_close(logits(lora.merge(ours), ids), merged)


@pytest.mark.parametrize(
    "config",
    [
        lora.Config(rank=3, targets=("query", "out", "gate")),
        lora.Config(rank=4, alpha=10.0, targets=("key", "value", "up", "down"), rslora=True),
        lora.Config(targets=("key", "value", "up"), ranks={"up": 2, "key": 5}, alphas={"up": 3.0}),
    ],
    ids=["plain", "rslora", "each its own"],
)
def test_what_is_saved_here_gives_the_same_in_peft(config, folder, llm, ids, tmp_path):
    ours = lora.add(llm, config, nnx.Rngs(0))
    for target in config.targets:
        b = getattr(ours.layers, target).lora_b
        b[...] = 0.3 * jax.random.normal(jax.random.key(0), b.shape)
    save_lora(ours, tmp_path, base=str(folder))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = numbers(theirs(torch.from_numpy(ids)).logits)
    assert np.abs(expected - logits(llm, ids)).max() > 0.1
    assert_close(logits(ours, ids), expected)


def test_gradients(folder, llm, ids, tmp_path):
    """Those of A and B, in every layer, in a batch with padding."""
    values = dict(r=4, lora_alpha=6, target_modules="all-linear")
    theirs = peft.get_peft_model(bare(folder), peft.LoraConfig(**values)).eval()
    changed(theirs, 0.1, only="lora_")
    theirs.save_pretrained(tmp_path)
    mask = np.arange(20) < np.array([[20], [13]])
    labels = np.where(mask, ids, -100)
    expected = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).logits
    loss = torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), torch.from_numpy(labels[:, 1:]).flatten(), ignore_index=-100
    )
    loss.backward()
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)

    ours = load_lora(tmp_path, llm)
    graph, of_lora, rest = nnx.split(ours, lambda path, _: path[-1] in ("lora_a", "lora_b"), ...)

    def loss_of(of_lora):
        llm = nnx.merge(graph, of_lora, rest)
        scores = llm.logits(llm(ids, mask)[0])[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:])
        return losses.mean(where=mask[:, 1:])

    value, gradients = jax.jit(jax.value_and_grad(loss_of))(of_lora)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    graph, _ = nnx.split(ours)
    found = nnx.merge(graph, gradients, rest)
    modules = dict(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        out="self_attn.o_proj",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    )
    assert len(trained) == 2 * 3 * len(modules)
    for target, module in modules.items():
        for layer in range(3):
            for ab in "ab":
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{ab.upper()}.default.weight"
                wanted = numbers(trained[name].grad).T
                got = getattr(getattr(found.layers, target), f"lora_{ab}")[layer]
                assert np.linalg.norm(wanted) > 1e-6
                assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted), name
