"""Settings of the process that the programs share."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """The project's folder below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gnvc_jax"


def use_compilation_cache() -> None:
    """Keep compiled programs between runs: in JAX_COMPILATION_CACHE_DIR, or in the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
