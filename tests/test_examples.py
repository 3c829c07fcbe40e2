"""Every notebook under examples/ runs from its first cell to its last, and is short."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def code_of(path: Path) -> str:
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "notebooks are kept without outputs"
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 4


# Compiling the gradient of a codec takes a minute on two cores.
SLOW = {"train_codec": pytest.mark.slow}


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=SLOW.get(p.stem, ())) for p in NOTEBOOKS]
)
def test_notebook_runs(path):
    names: dict = {}
    exec(compile(code_of(path), path.name, "exec"), names)
    history = names.get("history")
    if history:  # those that train get better
        assert sum(history[-5:]) < 0.9 * sum(history[:5]), history
    distance = names.get("distance")
    if distance:  # refinement makes pictures look more like the source
        assert distance["refined"] < 0.95 * distance["decoded"], distance


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_at_most_forty_lines_of_code(path):
    lines = [line for line in code_of(path).splitlines() if line.strip()]
    assert len(lines) <= 40, len(lines)
