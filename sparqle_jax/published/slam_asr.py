"""SLAM-ASR (X-LANCE/SLAM-LLM): the names of its projectors, each an adapter and the projection after it.

    config name    adapter                                                          projection
    linear         linear: Linear, ReLU                                             Linear
    cov1d-linear   conv1d: Conv1d, ReLU, Linear, ReLU                               Linear
    q-former       qformer with frames_norm=False, projection_norm="layer"          Linear, LayerNorm

`prefix` is what stands before the names: "encoder_projector." in a published checkpoint.
"""

import dataclasses

from sparqle_jax.adapters import qformer
from sparqle_jax.adapters.bert import attention_rules
from sparqle_jax.tables import Rule, Table, linear, norm

PREFIX = "encoder_projector."


def linear_table(prefix: str = PREFIX) -> Table:
    return Table(
        (*linear("adapter.linear", f"{prefix}linear1"), *linear("projection", f"{prefix}linear2")),
    )


def conv1d_table(prefix: str = PREFIX) -> Table:
    return Table(
        (
            Rule("adapter.convolutions.0.kernel", f"{prefix}conv1d.weight", (2, 1, 0)),
            Rule("adapter.convolutions.0.bias", f"{prefix}conv1d.bias"),
        )
    ) + linear_table(prefix)


def qformer_table(config: qformer.Config, prefix: str = PREFIX) -> Table:
    """Names of transformers' Blip2QFormerModel, as `qformer` in the projector."""
    layer, blocks = f"{prefix}qformer.encoder.layer.{{i}}", "adapter.layers"
    cross_attentions = attention_rules("adapter.cross_attentions", f"{layer}.crossattention", "attention")
    return Table(
        (
            Rule("adapter.query_tokens", f"{prefix}query"),
            *norm("adapter.embeddings_norm", f"{prefix}qformer.layernorm"),
            *attention_rules(f"{blocks}.self_attention", f"{layer}.attention", "attention"),
            *(dataclasses.replace(rule, every=config.cross_attention_freq) for rule in cross_attentions),
            *linear(f"{blocks}.query_mlp.up", f"{layer}.intermediate_query.dense"),
            *linear(f"{blocks}.query_mlp.down", f"{layer}.output_query.dense"),
            *norm(f"{blocks}.query_mlp.norm", f"{layer}.output_query.LayerNorm"),
            *linear("projection", f"{prefix}linear"),
            *norm("projection.norm", f"{prefix}norm"),
        )
    )
