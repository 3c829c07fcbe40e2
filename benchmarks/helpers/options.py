"""The options that benchmarks have in common."""

import argparse
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def parse(text: str, result: str, **defaults: int | str) -> argparse.Namespace:
    """--NAME for each default, of its type, and --out, by default results/RESULT.json.

    text: the benchmark's docstring, which --help shows.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{result}.json")
    return parser.parse_args()
