"""Runs in buckets of real servers: trained, killed, resumed, used by others, without leftovers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_stage

import gnvc_jax
from gnvc_jax import buckets, cli
from gnvc_jax.buckets import as_path
from gnvc_jax.errors import UsageError
from gnvc_jax.media.writer import open_writer
from gnvc_jax.training import bucket_runs
from gnvc_jax.training.config import InitConfig
from gnvc_jax.training.loop import train
from gnvc_jax.training.run_folder import load_params, load_statistics, steps_of
from gnvc_jax.training.stages.codec import CodecLoss

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "training" / "toy_stage.py"


@pytest.fixture(autouse=True)
def one_log_folder_per_test():
    yield
    bucket_runs.log_folder.cache_clear()


def toy(out, steps, **run):
    base = toy_stage.experiment()
    # A constant rate, so that a run of other length takes the same steps.
    optim = dataclasses.replace(base.optim, steps=steps, final_lr_ratio=1.0)
    run = dataclasses.replace(base.run, out=str(out), **run)
    return toy_stage.toy_stage(dataclasses.replace(base, optim=optim, run=run))


def losses(out):
    lines = (as_path(out) / "metrics.jsonl").read_text().splitlines()
    return {(r := json.loads(line))["step"]: r["loss"] for line in lines}


def steps_in(out):
    names = (path.name for path in (as_path(out) / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


@pytest.mark.slow
def test_a_run_in_a_bucket_is_resumed_with_the_same_losses(bucket, tmp_path):
    train(toy(tmp_path / "local", 6))
    out = f"{bucket}/run"
    train(toy(out, 4, checkpoint_every=1, tensorboard=True))
    bucket_runs.log_folder.cache_clear()  # as in another process
    state = train(toy(out, 6, checkpoint_every=1, tensorboard=True))
    assert losses(out) == losses(tmp_path / "local") and len(losses(out)) == 6
    assert steps_in(out) == [5, 6]
    assert json.loads((as_path(out) / "config.json").read_text())["optim"]["steps"] == 6
    assert len(list((as_path(out) / "tensorboard").iterdir())) == 2
    loaded = load_params(out, state.ema)
    np.testing.assert_array_equal(loaded["w"], state.ema["w"])
    assert load_statistics(out) == {}
    assert not list(Path(tmp_path / "cache").glob("gnvc_jax/checkpoints/*"))


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, tmp_path):
    out = f"{bucket}/run"
    train(toy(out, 3, checkpoint_every=1))
    state = as_path(out) / "checkpoints" / "3" / "state"
    for file in buckets.files_below(state):
        if "/d/" in os.fspath(file):
            file.write_bytes(b"damaged")
    bucket_runs.log_folder.cache_clear()
    train(toy(out, 4, checkpoint_every=1))
    train(toy(tmp_path / "local", 4))
    assert losses(out) == losses(tmp_path / "local")
    assert steps_in(out)[-2:] == [3, 4]
    if out.startswith("gs"):
        names = [path.name for path in state.parent.parent.iterdir()]
        assert sum(name.startswith("damaged-3-") for name in names) == 1


@pytest.mark.slow
def test_half_an_upload_is_no_checkpoint(bucket, tmp_path):
    if bucket.startswith("gs"):
        pytest.skip("Orbax writes there itself")
    train(toy(f"{bucket}/run", 2, checkpoint_every=1))
    folder = as_path(f"{bucket}/run/checkpoints")
    (folder / "2" / bucket_runs.COMPLETE).unlink()
    assert bucket_runs.complete_steps(folder) == [1]
    bucket_runs.log_folder.cache_clear()
    train(toy(f"{bucket}/run", 3, checkpoint_every=1))
    train(toy(tmp_path / "local", 3))
    assert losses(f"{bucket}/run") == losses(tmp_path / "local")
    assert bucket_runs.complete_steps(folder) == [2, 3]


@pytest.mark.slow
def test_what_is_kept_for_good_stays_in_a_bucket_and_the_rest_goes(bucket):
    train(toy(f"{bucket}/run", 5, checkpoint_every=1, keep=1, keep_every=2))
    assert steps_of(f"{bucket}/run") == [1, 3, 5]


def test_several_processes_need_gs_or_a_shared_folder(bucket, monkeypatch):
    monkeypatch.setattr(bucket_runs.jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="is on S3, where only a single process"):
        bucket_runs.StagedCheckpoints(as_path(bucket) / "checkpoints")


def start(out, steps, processes=1, port=0):
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(TOY), "--run.out", out]
    command += ["--run.checkpoint_every", "2", "--optim.final_lr_ratio", "1"]
    command += ["--optim.steps", str(steps), "--mesh", "data=4"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TOY.parent)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
    }
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        environment |= {"JAX_NUM_PROCESSES": str(processes)}
    numbers = [{"JAX_PROCESS_ID": str(i)} if processes > 1 else {} for i in range(processes)]
    return [
        subprocess.Popen(
            command,
            env=environment | number,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in numbers
    ]


@pytest.mark.slow
def test_killed_hard_and_resumed_from_a_bucket(bucket, tmp_path, free_port):
    out, processes = f"{bucket}/run", 2 if bucket.startswith("gs") else 1
    running = start(out, 10**9, processes, free_port())
    deadline = time.monotonic() + 200
    folder = as_path(out) / "checkpoints"
    while time.monotonic() < deadline and not (folder.exists() and steps_in(out)):
        assert all(p.poll() is None for p in running), running[0].communicate()
        time.sleep(0.2)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (resumed,) = start(out, 4 + max(steps_in(out), default=0))
    resumed.communicate(timeout=200)
    assert resumed.returncode == 0
    found = losses(out)
    assert list(found) == list(range(1, max(found) + 1))
    train(toy(tmp_path / "local", max(found)))
    expected = losses(tmp_path / "local")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.slow
def test_caching_training_and_releasing_in_a_bucket(bucket, tiny_codec, tmp_path):
    """From videos to a model file by the commands, with every path in the bucket.

    The loss is a cheap one: that of the codec takes minutes to compile and knows no paths.
    """
    from refiner_runs import make_vae

    first = make_vae(tiny_codec, as_path(bucket) / "runs")
    for name in "ab":
        with open_writer(tmp_path / f"{name}.mkv", 64, 64, 25) as out:
            for frame in np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), np.uint8):
                out.write(frame)
        buckets.upload(tmp_path / f"{name}.mkv", as_path(f"{bucket}/videos/{name}.mkv"))
    vae, cache, run = f"{bucket}/runs/vae", f"{bucket}/cache", f"{bucket}/runs/trained"
    for _ in range(2):  # the second time, all is there
        assert cli.main(["cache-latents", "--data", f"{bucket}/videos", "--vae", vae,
                         "--to", cache, "--frames", "5", "--no-progress"]) == 0  # fmt: skip
    assert len(list(as_path(cache).glob("*.array_record"))) == 2
    experiment = dataclasses.replace(
        first, stage="cheap_stage:cheap_codec_stage", init=InitConfig(vae=vae), loss=CodecLoss()
    )
    config = as_path(f"{bucket}/config.py")
    config.write_text(
        "from gnvc_jax.codec.config import CodecConfig\n"
        "from gnvc_jax.training.config import *\n"
        "from gnvc_jax.training.stages.codec import CodecLoss\n"
        "from gnvc_jax.parallel import MeshConfig\n"
        "from gnvc_jax.vae import VAEConfig\n"
        f"experiment = {experiment!r}\n"
    )
    command = ["train", "--config", str(config), "--data.latents", cache, "--run.out", run]
    command += ["--data.path", f"{bucket}/videos", "--data.statistics_batches", "1"]
    command += ["--mesh", "data=2", "--optim.steps"]
    assert cli.main([*command, "1"]) == 0
    bucket_runs.log_folder.cache_clear()
    assert cli.main([*command, "2"]) == 0
    assert max(losses(run)) == 2
    assert cli.main(["release", run, f"{bucket}/tiny.safetensors"]) == 0
    codec = gnvc_jax.load_pretrained(f"{bucket}/tiny.safetensors")
    same = gnvc_jax.load_pretrained(run)
    assert codec.model.fingerprints == same.model.fingerprints and codec.model.name == "tiny"
    left = [p for p in Path(tmp_path / "cache" / "gnvc_jax").iterdir() if p.name != "buckets"]
    assert [list(p.iterdir()) for p in left] == [[] for _ in left]
