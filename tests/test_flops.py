"""FLOPs: the program's by hand, against the formulas, and both against XLA's own count."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparqle_jax import flops
from sparqle_jax.adapters.qformer import Adapter as QFormer
from sparqle_jax.adapters.qformer import Config as QFormerConfig
from sparqle_jax.aligner import STAGE_1_LOSSES, Aligner, AlignmentHeads
from sparqle_jax.encoders.hubert import Config as HubertConfig
from sparqle_jax.encoders.hubert import Encoder as Hubert
from sparqle_jax.flops import Flops
from sparqle_jax.llms.decoder import LLM as Decoder
from sparqle_jax.llms.decoder import Config as DecoderConfig
from sparqle_jax.model import Projection, SpeechLLM, encode_speech, partition
from sparqle_jax.sharding import make_mesh

SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(STAGE_1_LOSSES, n)]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def masked(**shapes) -> dict:
    batch = {}
    for name, shape in shapes.items():
        batch[name] = array(*shape, dtype=jnp.float32 if name == "waveform" else jnp.int32)
        batch[f"{name}_mask"] = array(*shape[:2], dtype=bool)
    return batch


def stage1_batch(size: int = 3, samples: int = 1600, text: int = 8) -> dict:
    batch = masked(waveform=(size, samples), text=(size, text))
    return batch | {"recording_id": array(size, dtype=jnp.int32)}


def stage2_batch(
    size: int = 3, samples: int = 1600, before: int = 4, after: int = 5, answer: int = 6
) -> dict:
    return masked(waveform=(size, samples), before=(size, before), after=(size, after), answer=(size, answer))


def trace(model, batch) -> jax.stages.Traced:
    """One step's gradients, of a model and a batch that may be abstract."""
    graph, trained, frozen = partition(model)

    def step(trained, frozen, batch):
        def loss_of(trained):
            return nnx.merge(graph, trained, frozen).loss(batch, jax.random.key(0))

        return jax.value_and_grad(loss_of, has_aux=True)(trained)

    return jax.jit(step).trace(trained, frozen, batch)


def with_losses(aligner: Aligner, losses: tuple[str, ...]) -> Aligner:
    return Aligner(aligner.encoder, aligner.adapter, aligner.heads, losses=losses)


def with_remat(sparqle: SpeechLLM, remat: str) -> SpeechLLM:
    again = nnx.clone(sparqle)
    again.encoder.remat = again.llm.remat = remat
    return again


def count(function, *args) -> Flops:
    return flops.count(jax.jit(function).trace(*args).jaxpr)


X, W = array(3, 4), array(4, 4)
ONE = 2 * 3 * 4 * 4  # of x @ w


class TestByHand:
    def test_a_product_counts_two_per_multiplication_and_addition(self):
        assert count(jnp.matmul, X, array(4, 5)) == Flops(2 * 3 * 4 * 5)
        assert count(partial(jnp.einsum, "bij,bjk->bik"), array(7, 3, 4), array(7, 4, 5)) == Flops(
            7 * 2 * 3 * 4 * 5
        )

    def test_elementwise_work_does_not_count(self):
        assert count(lambda x: jnp.exp(x) + x.sum(), X) == Flops()

    def test_a_scan_counts_as_often_as_it_runs(self):
        def loop(x, w):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=6)[0]

        assert count(loop, X, W) == Flops(6 * ONE)
        assert count(lambda x, w: jax.lax.fori_loop(0, 6, lambda _, x: x @ w, x), X, W) == Flops(6 * ONE)

    def test_of_a_condition_the_largest_branch_counts(self):
        def branch(x, w):
            return jax.lax.cond(x.sum() > 0, lambda: jax.jit(jnp.matmul)(x @ w, w), lambda: x @ w)

        assert count(branch, X, W) == Flops(2 * ONE)
        looped = lambda x, w: jax.lax.scan(lambda x, _: (branch(x, w), None), x, length=5)[0]  # noqa: E731
        assert count(looped, X, W) == Flops(5 * 2 * ONE)

    def test_what_nothing_uses_does_not_count(self):
        def loop(x, w):
            step = lambda carry, _: ((carry[0] @ w, carry[1] @ w), carry[0] @ w)  # noqa: E731
            return jax.lax.scan(step, (x, x), length=2)[0][0]

        assert count(loop, X, W) == Flops(2 * ONE)

    def test_a_gradient_needs_two_products(self):
        loss = lambda x, w: jnp.sin(x @ w).sum()  # noqa: E731
        assert count(jax.grad(loss), X, W) == Flops(2 * ONE)
        assert count(jax.grad(loss, (0, 1)), X, W) == Flops(3 * ONE)

    def test_what_a_checkpoint_computes_again_is_counted_apart(self):
        @partial(jax.checkpoint, prevent_cse=False)
        def layer(x, w):
            return jnp.sin(jnp.sin(x @ w) @ w)

        def loop(x, w):
            return jax.lax.scan(lambda x, _: (layer(x, w), None), x, length=5)[0].sum()

        assert count(layer, X, W) == Flops(2 * ONE)
        step = jax.value_and_grad(loop, (0, 1))
        assert count(step, X, W) == Flops(5 * 2 * 3 * ONE, rematerialised=5 * 2 * ONE)

    def test_a_convolution(self):
        conv = partial(
            jax.lax.conv_general_dilated,
            window_strides=(2,),
            padding="VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )
        x, kernel = array(3, 41, 8), array(5, 4, 6)
        forward = 2 * (3 * 19 * 6) * (5 * 4)
        assert count(conv, x, kernel) == Flops(forward)
        both = count(jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1)), x, kernel)
        # The gradient of the input has a term too many at the edges.
        np.testing.assert_allclose(both.model, 3 * forward, rtol=0.05)

    def test_in_a_shard_map_every_device_counts(self):
        mesh = make_mesh((2, 4, 1))
        split = partial(jax.shard_map, mesh=mesh, in_specs=(jax.P("fsdp"), jax.P()), out_specs=jax.P("fsdp"))
        assert count(split(jnp.matmul), array(8, 4), W) == Flops(2 * 2 * 8 * 4 * 4)  # twice: data is idle

    def test_products_in_a_loop_of_unknown_length_are_an_error(self):
        def until(x, w):
            return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

        with pytest.raises(ValueError, match="how often they run can't be told"):
            count(until, X, W)
        assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, jnp.sin, x), X) == Flops()


def make_hubert(width: int, **sizes) -> Hubert:
    config = dict(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return Hubert(HubertConfig(**config | sizes), rngs=nnx.Rngs(0))


def make_qformer(width: int, frames_width: int, vocab_size: int | None = None, **sizes) -> QFormer:
    config = dict(
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * width,
    )
    return QFormer(QFormerConfig(**config | sizes), frames_width, vocab_size=vocab_size, rngs=nnx.Rngs(0))


def make_decoder(width: int, **sizes) -> Decoder:
    config = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=width // 4,
    )
    return Decoder(DecoderConfig(**config | sizes), rngs=nnx.Rngs(0))


def assert_same(model, batch):
    analytic = model.flops(batch)
    assert flops.count(trace(model, batch).jaxpr).model == sum(analytic.values()), analytic


class TestAnalytic:
    @pytest.mark.parametrize("losses", SUBSETS, ids="+".join)
    def test_stage_1_is_the_programs(self, aligner, losses):
        assert_same(with_losses(aligner, losses), stage1_batch())

    def test_stage_2_is_the_programs(self, sparqle):
        assert_same(sparqle, stage2_batch())

    def test_other_shapes_of_batches(self, aligner, sparqle):
        assert_same(aligner, stage1_batch(size=5, samples=2777, text=39))  # 38 targets: two blocks
        assert_same(sparqle, stage2_batch(size=1, samples=403, before=1, after=0, answer=1))
        assert_same(sparqle, stage2_batch(size=7, samples=3001, before=11, after=17, answer=67))

    def test_frames_need_no_encoder(self, sparqle):
        batch = stage2_batch()
        batch["frames"], batch["frames_mask"] = nnx.eval_shape(encode_speech, sparqle.encoder, batch)
        del batch["waveform"], batch["waveform_mask"]
        assert sparqle.flops(batch)["encoder"] == 0
        assert_same(sparqle, batch)

    @pytest.mark.slow
    def test_other_kinds_of_towers(self):
        """Other convolutions, cross-attention in the last layer, heads whose sizes divide no width."""

        def stage1():
            encoder = make_hubert(24, conv_dim=(8, 12, 16), conv_kernel=(9, 4, 3), conv_stride=(4, 3, 2))
            adapter = make_qformer(
                20, 24, cross_attention_freq=3, vocab_size=53, num_hidden_layers=4, num_queries=9
            )
            return Aligner(encoder, adapter, AlignmentHeads(20, 12, rngs=nnx.Rngs(0)))

        def stage2():
            encoder = make_hubert(24, feat_extract_norm="layer", do_stable_layer_norm=True)
            adapter = make_qformer(20, 24, num_queries=5)
            llm = make_decoder(
                28, num_key_value_heads=1, head_dim=6, tie_word_embeddings=True, qk_norm=True, vocab_size=41
            )
            return SpeechLLM(encoder, adapter, Projection(adapter.config, 28, rngs=nnx.Rngs(0)), llm)

        aligner = nnx.eval_shape(stage1)
        for losses in SUBSETS:
            # The fourth layer stands after the loop of blocks, so what no loss reads of it is not computed.
            if "stc" in losses or "stg" not in losses:
                assert_same(with_losses(aligner, losses), stage1_batch(size=2, samples=999, text=7))
        assert_same(nnx.eval_shape(stage2), stage2_batch())


class TestRematerialisation:
    def test_the_models_own_work_stays(self, sparqle):
        plain, full, dots = (
            flops.count(trace(model, stage2_batch()).jaxpr)
            for model in (sparqle, *(with_remat(sparqle, policy) for policy in ("full", "dots")))
        )
        assert plain.model == full.model == dots.model
        assert plain.rematerialised < dots.rematerialised < full.rematerialised

    def test_full_is_the_frozen_llms_forward_pass(self, sparqle):
        """But for the last product of each layer, whose result nobody needs again."""
        batch = stage2_batch()
        full = flops.count(trace(with_remat(sparqle, "full"), batch).jaxpr)
        plain = flops.count(trace(sparqle, batch).jaxpr)
        linear, attention = sparqle.llm.config.flops(3, 4 + 6 + 5, 6)
        config = sparqle.llm.config
        last = 3 * 2 * (3 * 20) * config.hidden_size * config.intermediate_size
        assert full.rematerialised - plain.rematerialised == linear + attention - last

    def test_the_lm_head_is_computed_twice(self, sparqle):
        """`losses.token_loss` keeps no logits."""
        head = sparqle.flops(stage2_batch())["LM head"]
        assert flops.count(trace(sparqle, stage2_batch()).jaxpr).rematerialised == head // 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_xla_counts_the_same(stage, monkeypatch):
    """Without loops, which XLA counts once, and so wide that elementwise work is no matter."""
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    width = 2048

    def make():
        encoder = make_hubert(width, conv_dim=(width,) * 7)
        sizes = dict(num_queries=20, num_hidden_layers=2)
        adapter = make_qformer(width, width, 3001 if stage == 1 else None, **sizes)
        if stage == 1:
            return Aligner(encoder, adapter, AlignmentHeads(width, rngs=nnx.Rngs(0)))
        llm = make_decoder(width, num_key_value_heads=2, vocab_size=3001)
        return SpeechLLM(encoder, adapter, Projection(adapter.config, width, rngs=nnx.Rngs(0)), llm)

    batch = stage1_batch(samples=7000, text=11) if stage == 1 else stage2_batch(samples=7000, answer=35)
    model = nnx.eval_shape(make)
    traced = trace(model, batch)
    counted, analytic = flops.count(traced.jaxpr), sum(model.flops(batch).values())
    xla = traced.lower().compile().cost_analysis()["flops"]
    np.testing.assert_allclose(counted.total, xla, rtol=0.03)
    np.testing.assert_allclose(analytic + counted.rematerialised, xla, rtol=0.03)
