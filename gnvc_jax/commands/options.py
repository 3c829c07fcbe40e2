"""Types of options that several commands share, and how their texts are read.

tyro derives an option from the annotation of a parameter. Where the type alone does not say how a
text is read, an annotation carries a specification: `numbers` and `names` for lists with commas.
The functions `parse_...` convert texts that commands keep as strings, since what is wrong with them
should name the option. `check_range` is for limits, of which tyro has no notion.
"""

import math
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Annotated, Any, TypeVar

import tyro

from gnvc_jax.errors import UsageError

T = TypeVar("T")

MAX_STEPS = 100  # of refinement
EXIT_PARTIAL = 3  # done, but something was left out or replaced, or does not fit
EXIT_STOPPED = 75  # stopped by a signal; the same command continues

# Flags that stand alone: `--force`, without a `--no-force` beside it.
Force = Annotated[bool, tyro.conf.arg(aliases=("-y",))]
Source = Annotated[str, tyro.conf.arg(name="from")]  # `from` is a keyword of Python


def numbers(
    read: Callable[[str], T], metavar: str
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[T, ...]]:
    """Specification of an option whose value is a list of numbers such as 8,24,40.

    Args:
        read: Type of the numbers, int or float.
        metavar: Placeholder for the value in help texts.
    """

    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(map(read, text.split(",")))
        except ValueError:
            kind = "integers" if read is int else "numbers"
            raise ValueError(f"expected {kind} separated by commas, got {text!r}") from None

    return _one_text(parse, metavar)


def names(choices: Collection[str]) -> tyro.constructors.PrimitiveConstructorSpec[tuple[str, ...]]:
    """Specification of an option whose value is a list of names, or "all"."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(choices) if text == "all" else tuple(text.split(","))
        if unknown := [name for name in found if name not in choices]:
            raise ValueError(f"expected names out of {', '.join(choices)}, got {unknown[0]!r}")
        return found

    return _one_text(parse, "NAME,...")


def _one_text(
    parse: Callable[[str], tuple[T, ...]], metavar: str
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[T, ...]]:
    # By itself, tyro would read a tuple as several words: --qp 8 24 40.
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def check_range(option: str, value: Any, low: float, high: float = math.inf) -> None:
    """Checks that low <= value <= high; None passes.

    Raises:
        UsageError: If the value is outside.
    """
    if value is not None and not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise UsageError(f"{option} must be {bounds}, got {value}")


def parse_size(text: str) -> tuple[int, int]:
    """Converts "WxH" to (width, height)."""
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise UsageError(
            f"--size must be WIDTHxHEIGHT, for example 1920x1080, got {text!r}"
        ) from None
    return width, height


def parse_rate(text: str) -> Fraction:
    """Converts "25", "29.97" or "30000/1001" to frames per second."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise UsageError(
            f"--fps must be a positive number such as 25, 29.97 or 30000/1001, got {text!r}"
        )
    return rate


def parse_amount(option: str, text: str) -> float:
    """Converts "200k", "1.5M" or "8000000" to a number; k, M and G are powers of 1000.

    Raises:
        UsageError: If the text is something else, or not positive.
    """
    # Bitrates and sizes count in powers of 1000, as in ffmpeg.
    number, power = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    try:
        value = float(number) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[power]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"{option} must be a positive number such as 500k or 8M, got {text!r}")
    return value
