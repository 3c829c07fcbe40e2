"""Makes the golden configs and sharding tables anew: python -m pytest tests/golden/make_configs.py

Do so after a change of a config, a default or a rule that is meant, and commit the difference with
it.
"""

import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_make(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parents[1]), *sys.path])
    import test_golden_configs as golden

    for folder in (golden.CONFIGS, golden.SHARDINGS):
        shutil.rmtree(folder, ignore_errors=True)
    for name, path in golden.EXPERIMENTS.items():
        write(golden.CONFIGS / f"{name}.json", golden.resolved(path))
    for name in golden.SHARDED:
        table = golden.sharding_table(golden.EXPERIMENTS[name])
        write(golden.SHARDINGS / f"{name}.txt", table)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
