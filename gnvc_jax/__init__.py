"""A generative neural video codec in JAX.

`load_pretrained` gives a whole codec, `load_vae` and `load_refiner` its parts; see docs/api.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnvc_jax.api import load_refiner, load_vae
    from gnvc_jax.pretrained import load_pretrained

__version__ = "0.1.0"
__all__ = ["load_pretrained", "load_refiner", "load_vae"]


def __getattr__(name: str) -> Any:
    """Imports the public functions on first use, so that `import gnvc_jax` stays light."""
    if name == "load_pretrained":
        from gnvc_jax.pretrained import load_pretrained

        return load_pretrained
    if name in ("load_refiner", "load_vae"):
        from gnvc_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
