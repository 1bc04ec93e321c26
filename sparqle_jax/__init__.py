"""SparQLe in JAX: a small trained adapter teaches a frozen language model to listen."""

__version__ = "0.1.0"
