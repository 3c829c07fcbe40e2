"""benchmarks/accelerator.py at tiny sizes, as it would run on a GPU or TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Two sizes of clips that the codec pads to 64x64, a model of a few thousand parameters.
CONFIG = """
from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.vae import VAEConfig

codec = CodecConfig(4, 8, 8, 1, 1, y_channels=8, z_channels=4, scale_width=8, entropy_width=16)
dit = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)
experiment = Experiment(
    stage="latent",
    vae=VAEConfig(4, (1, 1, 1, 1), 1, latent_channels=4),
    codec=codec,
    refiner=RefinerConfig(dit, codec.width, 2, 1, deviation=0.3),
    init=InitConfig(run="nowhere"),
    train=("refiner/",),
    loss=LatentLoss(),
    data=DataConfig(size=(64, 64), batch=1),
)
"""


@pytest.mark.slow
def test_the_whole_list_runs_and_leaves_one_file(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    out = tmp_path / "accelerator.json"
    line = f"--config {tmp_path / 'tiny.py'} --sizes 40x56 --steps 1,2 --frames 13 --repeats 1"
    command = [sys.executable, ROOT / "benchmarks/accelerator.py", *line.split()]
    command += ["--train-frames", "5", "--out", out]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found = json.loads(out.read_text())
    assert found["environment"]["backend"] == "cpu" and "diffusers" not in found
    coding = found["coding"]["40x56"]
    programs = coding["programs"]
    assert programs.keys() == {
        *("encode_video", "analyse", "reconstruct", "decode_latents", "velocity")
    }
    assert all(one["seconds"] > 0 and one["flops"] > 0 for one in programs.values())
    # A group has four latents; windows of two with an overlap of one make three.
    rates = coding["frames_per_s"]
    plain = 4 * (programs["reconstruct"]["seconds"] + programs["decode_latents"]["seconds"])
    assert rates["decode_steps0"] == pytest.approx(13 / plain)
    more = plain + 2 * 3 * programs["velocity"]["seconds"]
    assert rates["decode_steps2"] == pytest.approx(13 / more)
    assert rates.keys() == {"encode", "decode_steps0", "decode_steps1", "decode_steps2"}
    (step,) = found["training"]
    assert step["frames"] == 5 and step["seconds"] > 0 and "error" not in step
