"""Operations of a program, counted from what was traced, before any compiler.

The compiler's own count takes the body of a loop once and knows nothing of hand-written kernels.
"""

import math
from typing import Any

import jax

from gnvc_jax.errors import UsageError


def count(function, *args: Any, trip_count: float = 1.0) -> float:
    """Operations of `function(*args)`; multiply and add are two. args: arrays or shapes.

    Matrix products and convolutions only; of the branches of a condition the dearest counts.
    trip_count: of loops whose length is not known before they run.
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr, trip_count)


def _of(jaxpr, trip_count: float) -> float:
    return sum(_of_equation(equation, trip_count) for equation in jaxpr.eqns)


def _of_equation(equation, trip_count: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        # Zeros that a dilated input is filled up with need no multiplication.
        zeros = math.prod(params["lhs_dilation"])
        return 2.0 * math.prod(out) * math.prod(kernel) / features / zeros
    if name == "pallas_call":
        raise UsageError("kernels cannot be counted; choose an attention without them")
    if name == "cond":
        return max(_of(branch.jaxpr, trip_count) for branch in params["branches"])
    inner = [getattr(x, "jaxpr", x) for x in params.values()]
    inner = [x for x in inner if hasattr(x, "eqns")]
    times = {"scan": params.get("length"), "while": trip_count}.get(name, 1)
    return times * sum(_of(jaxpr, trip_count) for jaxpr in inner)
