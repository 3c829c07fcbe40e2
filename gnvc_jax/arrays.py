"""Types of arrays in annotations, which most modules share.

`Array` is JAX's, `AnyArray` also NumPy's, `ArrayT` the one of the two that a function is given, and
`Tree` whatever `jax.tree.map` takes, usually parameters in nested dictionaries.
"""

from typing import Any, TypeVar

import jax
import numpy as np

Array = jax.Array
AnyArray = jax.Array | np.ndarray
# For functions that return the kind of array that they are given.
ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
# Nested containers of arrays or of shapes. It is Any, since another type would need a cast wherever
# a leaf or a branch is taken out.
Tree = Any
