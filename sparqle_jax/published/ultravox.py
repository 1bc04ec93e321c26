"""Ultravox (fixie-ai/ultravox): the names of its projector, a `linear` adapter and the projection after it.

linear_1 and what is around it is the adapter, linear_2 the projection; `ln_mid` (0.5 and later) is the last
of the adapter, `ln_post` (before) the projection's norm. `prefix` is what stands before the names.
"""

from sparqle_jax.tables import Rule, Table

PREFIX = "multi_modal_projector."


def table(prefix: str = PREFIX) -> Table:
    return Table(
        (
            Rule("adapter.pre_norm.scale", f"{prefix}ln_pre.weight"),
            Rule("adapter.linear.kernel", f"{prefix}linear_1.weight", (1, 0)),
            Rule("adapter.mid_norm.scale", f"{prefix}ln_mid.weight"),
            Rule("projection.kernel", f"{prefix}linear_2.weight", (1, 0)),
            Rule("projection.norm.scale", f"{prefix}ln_post.weight"),
        )
    )
