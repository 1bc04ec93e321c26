"""SparQLe in JAX: a small trained adapter teaches a frozen language model to listen."""

from typing import Any

from sparqle_jax import quiet

__version__ = "0.1.0"
__all__ = ["SparQLe", "Transcript"]

quiet.third_parties()


def __getattr__(name: str) -> Any:
    # Loaded when they are used: worker processes that only read data need no JAX.
    if name in __all__:
        from sparqle_jax import sparqle

        return getattr(sparqle, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
