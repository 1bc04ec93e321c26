"""SALMONN (bytedance/SALMONN): the names of its windowed Q-Former and of the projection after it.

The norms of Whisper's and BEATs' frames, `ln_speech` and `ln_audio`, are before the adapter, whose Config has
frames_norm=False.
"""

import re

from sparqle_jax.adapters.bert import attention_rules
from sparqle_jax.tables import Rule, Table, linear, norm


def table() -> Table:
    bert, layer = "speech_Qformer.bert", "speech_Qformer.bert.encoder.layer.{i}"
    blocks = "adapter.layers"
    attentions = [("self_attention", "attention"), ("cross_attention", "crossattention")]
    return Table(
        (
            Rule("adapter.query_tokens", "speech_query_tokens"),
            *norm("adapter.embeddings_norm", f"{bert}.embeddings.LayerNorm"),
            *(
                rule
                for ours, theirs in attentions
                for rule in attention_rules(f"{blocks}.{ours}", f"{layer}.{theirs}")
            ),
            *linear(f"{blocks}.mlp.up", f"{layer}.intermediate_query.dense"),
            *linear(f"{blocks}.mlp.down", f"{layer}.output_query.dense"),
            *norm(f"{blocks}.mlp.norm", f"{layer}.output_query.LayerNorm"),
            *linear("projection", "speech_llama_proj"),
        ),
        ignored=(re.escape(f"{bert}.embeddings.position_ids"),),
    )
