"""Adapters against transformers in PyTorch: the projectors of models that it has, with random weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    AutoConfig,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    GraniteSpeechConfig,
    Qwen2AudioConfig,
    VoxtralConfig,
)
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioMultiModalProjector
from transformers.models.voxtral.modeling_voxtral import VoxtralMultiModalProjector

from sparqle_jax import tables
from sparqle_jax.adapters import KINDS, linear, pooling, qformer, windowed_qformer
from sparqle_jax.model import Projection
from sparqle_jax.published.slam_asr import qformer_table
from sparqle_jax.tables import Rule, Table, export, norm
from sparqle_jax.tensors import Tensor

SIZES = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, intermediate_size=48)
WIDTH, LLM_WIDTH = 24, 20


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def load(config, table: Table, theirs: torch.nn.Module, frames_width: int = WIDTH) -> nnx.Dict:
    """Our adapter and projection with the weights of a PyTorch module, all of which are used."""

    def make(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(
            adapter=KINDS[config.kind].Adapter(config, frames_width, rngs=rngs),
            projection=Projection(config, LLM_WIDTH, rngs=rngs),
        )

    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    tensors = {
        name: Tensor(array.shape, lambda index, array=array: array[index]) for name, array in arrays.items()
    }
    return tables.load(make, table, tensors, name=config.kind)


def check(theirs: torch.nn.Module, forward, ours: nnx.Dict, table: Table, frames: np.ndarray, mask=None):
    """The output of forward(frames) in PyTorch, and the gradients of all parameters and of the frames."""
    given = torch.from_numpy(frames).requires_grad_()
    expected = forward(given)
    probe = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.from_numpy(probe)).sum().backward()
    mask = np.ones(frames.shape[:2], bool) if mask is None else mask
    graph, state = nnx.split(ours)

    @jax.jit
    def compute(state, frames):
        def loss_of(state, frames):
            model = nnx.merge(graph, state)
            tokens, real = model.adapter(frames, mask)
            out = model.projection(tokens)
            return (out * probe).sum(), (out, real)

        return jax.grad(loss_of, argnums=(0, 1), has_aux=True)(state, frames)

    (gradients, of_frames), (out, real) = compute(state, frames)
    assert np.asarray(real).all()
    np.testing.assert_allclose(out, expected.detach(), atol=1e-5 * float(expected.detach().abs().max()))
    all_theirs = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    all_ours = export(gradients, table)
    assert all_ours.keys() == all_theirs.keys()
    total = np.sqrt(sum(np.square(gradient).sum() for gradient in all_theirs.values()))
    for name, gradient in all_theirs.items():
        floor = 1e-5 * total if name.endswith("key.bias") else 0.0  # it is zero, up to rounding
        assert np.linalg.norm(all_ours[name] - gradient) <= 1e-4 * np.linalg.norm(gradient) + floor, name
    error = np.linalg.norm(of_frames - given.grad.numpy())
    assert error <= 1e-4 * np.linalg.norm(given.grad.numpy())


@pytest.fixture
def frames():
    return np.random.default_rng(0).normal(size=(2, 32, WIDTH)).astype(np.float32)


class Blip2(torch.nn.Module):
    """Blip2QFormerModel under SLAM-ASR's names, with the projection and the norm after it."""

    def __init__(self, frequency: int, layers: int):
        super().__init__()
        sizes = SIZES | dict(num_hidden_layers=layers)
        config = Blip2QFormerConfig(encoder_hidden_size=WIDTH, cross_attention_frequency=frequency, **sizes)
        self.query = torch.nn.Parameter(torch.randn(1, 5, SIZES["hidden_size"]))
        self.qformer = Blip2QFormerModel(config)
        self.linear = torch.nn.Linear(SIZES["hidden_size"], LLM_WIDTH)
        self.norm = torch.nn.LayerNorm(LLM_WIDTH, eps=1e-5)

    def forward(self, frames, mask):
        query = self.query.expand(len(frames), -1, -1)
        out = self.qformer(
            query_embeds=query, encoder_hidden_states=frames, encoder_attention_mask=mask, return_dict=True
        )
        return self.norm(self.linear(out.last_hidden_state))


@pytest.mark.parametrize(("frequency", "layers"), [(1, 2), (2, 4), (2, 3), (3, 5)])
def test_qformer(frames, frequency, layers):
    theirs = randomised(Blip2(frequency, layers))
    config = qformer.Config(
        num_queries=5,
        frames_norm=False,
        projection_norm="layer",
        cross_attention_freq=frequency,
        **SIZES | dict(num_hidden_layers=layers),
    )
    table, mask = qformer_table(config, ""), np.arange(32) < np.array([[32], [19]])
    ours = load(config, table, theirs)
    check(theirs, lambda x: theirs(x, torch.from_numpy(mask).long()), ours, table, frames, mask)


GRANITE = Table(
    (
        Rule("adapter.query_tokens", "query"),
        *norm("adapter.embeddings_norm", "qformer.layernorm"),
        *(
            rule
            for rule in qformer_table(qformer.Config(cross_attention_freq=1), "").rules
            if rule.target.startswith(("adapter.layers.self", "projection.kernel", "projection.bias"))
        ),
    )
) + Table(
    tuple(
        dataclasses.replace(
            rule,
            target=rule.target.replace("cross_attentions", "layers.cross_attention").replace(
                "query_mlp", "mlp"
            ),
        )
        for rule in qformer_table(qformer.Config(cross_attention_freq=1), "").rules
        if "cross_attentions" in rule.target or "query_mlp" in rule.target
    )
)


@pytest.mark.parametrize("num_frames", [32, 30, 7])
def test_granites_projector(frames, num_frames):
    sizes = SIZES | dict(encoder_hidden_size=WIDTH, cross_attention_frequency=1, num_hidden_layers=2)
    config = GraniteSpeechConfig(
        projector_config=dict(model_type="blip_2_qformer", **sizes),
        text_config=AutoConfig.for_model("granite", hidden_size=LLM_WIDTH),
        window_size=15,
        downsample_rate=5,
    )
    theirs = randomised(GraniteSpeechEncoderProjector(config))
    ours = windowed_qformer.Config(
        window=15,
        stride=15,
        num_queries=3,
        remainder="pad",
        frames_norm=False,
        **SIZES | dict(num_hidden_layers=2),
    )
    frames = frames[:, :num_frames].copy()
    check(theirs, theirs, load(ours, GRANITE, theirs), GRANITE, frames)


VOXTRAL = Table(
    (
        Rule("adapter.linear.kernel", "linear_1.weight", (1, 0)),
        Rule("projection.kernel", "linear_2.weight", (1, 0)),
    )
)


def test_voxtrals_projector(frames):
    config = VoxtralConfig(
        audio_config=dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH),
        text_config=dict(model_type="llama", hidden_size=LLM_WIDTH, num_attention_heads=5, head_dim=4),
    )
    theirs = randomised(VoxtralMultiModalProjector(config))
    # Its hidden width is the LLM's.
    ours = linear.Config(k=4, hidden=LLM_WIDTH, activation="gelu", bias=False, projection_bias=False)

    def forward(x):
        stacked = x.reshape(-1, config.audio_config.intermediate_size)  # as get_audio_features does
        return theirs(stacked).reshape(len(x), -1, LLM_WIDTH)

    check(theirs, forward, load(ours, VOXTRAL, theirs), VOXTRAL, frames)


QWEN2_AUDIO = Table(tables.linear("projection", "linear"))


@pytest.mark.parametrize("num_frames", [32, 31])
def test_qwen2_audios_projector(frames, num_frames):
    config = Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", d_model=WIDTH),
        text_config=dict(model_type="qwen2", hidden_size=LLM_WIDTH),
    )
    theirs = randomised(Qwen2AudioMultiModalProjector(config))
    pool = torch.nn.AvgPool1d(2, stride=2)  # the encoder's avg_pooler

    def forward(x):
        return theirs(pool(x.transpose(1, 2)).transpose(1, 2))

    ours = load(pooling.Config(k=2, width=WIDTH), QWEN2_AUDIO, theirs)
    check(theirs, forward, ours, QWEN2_AUDIO, frames[:, :num_frames].copy())


@pytest.mark.parametrize(("kernel", "stride", "num_layers"), [(5, 5, 1), (3, 2, 2), (4, 1, 3)])
def test_convolutions(frames, kernel, stride, num_layers):
    """SLAM-ASR's, and as SpeechVerse is described, against torch.nn.Conv1d."""
    modules, width = [], WIDTH
    for _ in range(num_layers):
        modules += [torch.nn.Conv1d(width, 16, kernel, stride), torch.nn.ReLU()]
        width = 16
    theirs = randomised(
        torch.nn.ModuleDict(dict(conv=torch.nn.Sequential(*modules), out=torch.nn.Linear(16, LLM_WIDTH)))
    )
    config = KINDS["conv1d"].Config(
        kernel=kernel, stride=stride, num_layers=num_layers, channels=16, hidden=None
    )
    rules = [tables.linear("projection", "out")]
    rules += [
        (
            Rule(f"adapter.convolutions.{i}.kernel", f"conv.{2 * i}.weight", (2, 1, 0)),
            Rule(f"adapter.convolutions.{i}.bias", f"conv.{2 * i}.bias"),
        )
        for i in range(num_layers)
    ]
    table = Table(tuple(rule for pair in rules for rule in pair))

    def forward(x):
        return theirs["out"](theirs["conv"](x.transpose(1, 2)).transpose(1, 2))

    check(theirs, forward, load(config, table, theirs), table, frames)
