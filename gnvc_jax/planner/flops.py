"""Floating-point operations of a function, counted in its jaxpr.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and counts nothing
inside of hand-written kernels. Here scans are multiplied by their length, and a kernel is an error
rather than zero. Only matrix products and convolutions are counted, as is customary for MFU.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr

from gnvc_jax.errors import UsageError


def count(function: Callable, *args: Any, trip_count: float = 1.0) -> float:
    """Counts the operations of `function(*args)`; a multiplication and an addition are two.

    Args:
        function: Function to trace.
        *args: Arrays, or shapes with dtypes.
        trip_count: Trip count assumed for loops whose length is not known before they run.

    Returns:
        Operations of matrix products and convolutions; of the branches of a condition, the most
        expensive one counts.

    Raises:
        UsageError: If the function calls a Pallas kernel, which cannot be counted.
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr, trip_count)


def _of(jaxpr: Jaxpr, trip_count: float) -> float:
    return sum(_of_equation(equation, trip_count) for equation in jaxpr.eqns)


def _of_equation(equation: Any, trip_count: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        # Each element of the output is a sum of one product per contracted position.
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        # Zeros that a dilated input is filled up with need no multiplication.
        zeros = math.prod(params["lhs_dilation"])
        # Per element of the output: the kernel without its output features.
        return 2.0 * math.prod(out) * math.prod(kernel) / features / zeros
    if name == "pallas_call":
        raise UsageError("kernels cannot be counted; choose an attention without them")
    if name == "cond":
        return max(_of(branch.jaxpr, trip_count) for branch in params["branches"])
    # Calls, loops and custom derivatives keep their bodies among their parameters.
    # A ClosedJaxpr has its Jaxpr as an attribute; other parameters have no equations.
    inner = [getattr(x, "jaxpr", x) for x in params.values()]
    inner = [x for x in inner if hasattr(x, "eqns")]
    # The condition of a while loop is among `inner`, too, but has no products.
    times = {"scan": params.get("length"), "while": trip_count}.get(name, 1)
    return times * sum(_of(jaxpr, trip_count) for jaxpr in inner)
