"""The Q-Former against transformers' BERT and BLIP-2 Q-Former in PyTorch."""

import numpy as np
import pytest
import torch
from flax import nnx
from transformers import BertConfig, BertForMaskedLM, BertModel, Blip2QFormerConfig, Blip2QFormerModel

from sparqle_jax import tables
from sparqle_jax.adapters.qformer import Adapter as QFormer
from sparqle_jax.adapters.qformer import Config as QFormerConfig
from sparqle_jax.published import sparqle as published
from sparqle_jax.tensors import Tensor
from tests.conftest import call

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)


def perturbed(model):
    """Evaluation mode, and random norms and biases: at 1 and 0 they would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=[BertForMaskedLM, BertModel])
def bert(request):
    torch.manual_seed(0)
    bert = perturbed(request.param(BertConfig(vocab_size=60, **SIZES)))
    with torch.no_grad():  # the reference's Q-Former has no segments
        bert.base_model.embeddings.token_type_embeddings.weight.zero_()
    return bert


@pytest.fixture(scope="module")
def qformer(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    config = QFormerConfig(**published.bert_config(folder)[0], num_queries=5)
    return published.qformer_from_bert(folder, config, 24, text=True, rngs=nnx.Rngs(0))


class TestBert:
    def test_its_text_half_is_the_bert(self, bert, qformer):
        rng = np.random.default_rng(0)
        ids, mask = rng.integers(0, 60, (2, 9)), np.arange(9) < np.array([[9], [4]])
        with torch.no_grad():
            out = bert(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask).long(),
                output_hidden_states=True,
            )
        hidden = call(qformer.encode_text, ids, mask)
        np.testing.assert_allclose(hidden[mask], out.hidden_states[-1][mask], atol=1e-4)
        if isinstance(bert, BertForMaskedLM):
            logits = call(qformer.lm_logits, hidden)
            assert logits.shape == (2, 9, 61)  # [DEC] is new
            np.testing.assert_allclose(np.asarray(logits)[mask][:, :60], out.logits[mask], atol=1e-4)

    def test_its_query_half_starts_as_the_bert_without_speech(self, bert, qformer):
        """Without cross-attention, queries go through it as its own embeddings would."""
        encoder = bert.base_model
        queries = np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)
        with torch.no_grad():
            start = encoder.embeddings.LayerNorm(torch.from_numpy(queries))
            expected = encoder.encoder(start)[0]
        out = qformer.embeddings_norm(queries)
        for number in range(qformer.config.num_hidden_layers):
            layer, _ = qformer.layer(number)
            out, _ = layer(out, 5, None, None, None, None, None, None)
        np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("freq", [1, 2, 3])
def test_query_path_is_blip2s(freq):
    """The same computation as in transformers' BLIP-2, whose names differ in three places."""
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        **SIZES, encoder_hidden_size=24, cross_attention_frequency=freq, use_qformer_text_input=False
    )
    theirs = perturbed(Blip2QFormerModel(config))
    queries = torch.randn(1, 5, 32)
    tensors = {"query_tokens": queries, "ln_speech.weight": torch.ones(24), "ln_speech.bias": torch.zeros(24)}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("attention.attention.", "attention.self.")
        name = name.replace("layernorm.", "embeddings.LayerNorm.") if name.startswith("layernorm") else name
        tensors[f"Qformer.bert.{name}"] = tensor
    tensors = {
        name: Tensor(tuple(tensor.shape), tensor.numpy().__getitem__) for name, tensor in tensors.items()
    }
    sizes = QFormerConfig(**SIZES, num_queries=5, cross_attention_freq=freq, layer_norm_eps=1e-12)
    ours = tables.load(
        lambda rngs: QFormer(sizes, 24, rngs=rngs), published.qformer_table(sizes), tensors, name="BLIP-2"
    )
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(2, 11, 24)).astype(np.float32)
    mask = np.arange(11) < np.array([[11], [6]])
    # Our adapter normalises the frames first; give theirs the same.
    mean, std = frames.mean(-1, keepdims=True), np.sqrt(frames.var(-1, keepdims=True) + 1e-5)
    with torch.no_grad():
        expected = theirs(
            query_embeds=queries.expand(2, -1, -1),
            encoder_hidden_states=torch.from_numpy((frames - mean) / std),
            encoder_attention_mask=torch.from_numpy(mask).long(),
        ).last_hidden_state
    np.testing.assert_allclose(call(ours.__call__, frames, mask)[0], expected, atol=1e-4)
