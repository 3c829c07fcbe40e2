"""A generative neural video codec in JAX."""

__version__ = "0.1.0"
__all__ = ["load_pretrained"]


def __getattr__(name: str):
    """`load_pretrained` is imported on first use, so that `import gnvc_jax` stays light."""
    if name == "load_pretrained":
        from gnvc_jax.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
