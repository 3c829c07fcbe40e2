"""Types of arrays in annotations, for functions that take those of JAX and of NumPy alike."""

from typing import TypeVar

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
# Of functions that return the kind of array that they are given.
ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
