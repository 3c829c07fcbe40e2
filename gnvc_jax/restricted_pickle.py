"""Pickles from others, read without running anything in them.

A pickle can name any Python function and have it called. `RestrictedUnpickler` resolves only the
names that its caller lists, so that a hostile file has nothing to call. It serves both kinds of
pickles that the package reads: NumPy weights of LPIPS (`gnvc_jax.metrics.backbones`) and
descriptions of tensors in PyTorch files (`gnvc_jax.porting.torch_file`).
"""

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

# What rebuilding a NumPy array takes. The function moved between NumPy 1 and 2; files of both
# versions resolve to the one that is installed.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
NUMPY_ARRAYS: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves only the names it is given.

    Args:
        file: Binary file positioned at the start of a pickle.
        known: Object to use for each (module, name) that the pickle may refer to.
        persistent: Function from a persistent id to its object; None refuses persistent ids.
    """

    def __init__(
        self,
        file: IO[bytes],
        known: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
    ):
        super().__init__(file)
        self._known, self._persistent = known, persistent

    def find_class(self, module: str, name: str) -> Any:
        """Returns the object known under this name.

        Raises:
            UnpicklingError: If the name is not allowed.
        """
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Returns the object of a persistent id.

        Raises:
            UnpicklingError: If none are expected.
        """
        if self._persistent is None:
            raise pickle.UnpicklingError(f"unexpected persistent id {pid!r}")
        return self._persistent(pid)
