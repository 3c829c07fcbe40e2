"""Config files of experiments and of evaluations that ship with the package.

In a checkout they are the folder `configs/`; in an installed package a copy of it,
`gnvc_jax/shipped/configs/` (see `force-include` in pyproject.toml). Either way they are found by
name (`small/codec`), and config files, those of users too, import them as
`configs.small.codec`: `configs` is a namespace package, so that a folder `configs/` of a
user's own and the shipped one merge.
"""

import os
import sys
from pathlib import Path

from gnvc_jax.buckets import as_path, local_copy

_PACKAGE = Path(__file__).parent
ROOT = next(root for root in (_PACKAGE / "shipped", _PACKAGE.parent) if (root / "configs").is_dir())


def find_config(name: str, suffix: str = ".py") -> Path:
    """Returns the path of a config file.

    Args:
        name: Path of a file, or name of a shipped config without its suffix. Of a file in a bucket,
            the path of a local copy is returned.
        suffix: Suffix of shipped configs of the kind: ".py" for experiments, ".txt" for
            arguments of evaluations.

    Raises:
        FileNotFoundError: If it is neither a file nor a shipped config; the message lists these.
    """
    if as_path(name).is_file():
        return local_copy(name)
    folder = ROOT / "configs"
    shipped = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob(f"*{suffix}"))
        if path.stem != "models"  # shared by the experiments beside it
    }
    if name not in shipped:
        raise FileNotFoundError(
            f"{name}: no such config file, nor one of the shipped configs {', '.join(shipped)}"
        )
    return shipped[name]


def make_importable() -> None:
    """Makes the shipped configs importable, after those of the working directory."""
    for folder in (os.getcwd(), str(ROOT)):
        if folder not in sys.path:
            sys.path.append(folder)
