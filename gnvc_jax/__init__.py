"""A generative neural video codec in JAX."""

__version__ = "0.1.0"
