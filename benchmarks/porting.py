"""Time and peak memory of `gnvc port` and `gnvc export` on files of full size.

    python benchmarks/porting.py [--models t2v-1.3b vace-1.3b]

Weights are random: only names, shapes and types matter. Every model is written once in the public
form below a temporary folder (three times its size is needed there), ported and exported by the
commands that users type, each in a process of its own, and what comes back is compared bit for bit.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gnvc_jax.evaluation.environment import environment
from gnvc_jax.porting.architectures import Architecture, diffusers_config
from gnvc_jax.porting.sources import list_tensors
from gnvc_jax.refiner import VACE_1_3B, WAN_1_3B

MODELS = {"t2v-1.3b": WAN_1_3B, "vace-1.3b": VACE_1_3B}
FILE = "diffusion_pytorch_model.safetensors"


def write_public(folder: Path, architecture: Architecture) -> None:
    rng = np.random.default_rng(0)
    tensors = {t.diffusers: rng.standard_normal(t.shape, np.float32) for t in architecture.tensors}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(diffusers_config(architecture)))
    save_file(tensors, folder / FILE)


def measured(*command: str) -> tuple[float, float]:
    """Seconds and peak GiB of `gnvc` with these arguments."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gnvc_jax.cli", *command, "--no-progress"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"gnvc {' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def same_bits(file: Path, folder: Path) -> bool:
    """Whether all tensors of a file are in the files of a folder, bit for bit."""
    there, back = list_tensors(file), {}
    for part in folder.glob("*.safetensors"):
        back |= list_tensors(part)
    return there.keys() == back.keys() and all(
        entry.dtype == back[name].dtype and entry.read().tobytes() == back[name].read().tobytes()
        for name, entry in there.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", default="benchmarks/results/porting.json")
    args = parser.parse_args()
    rows = []
    print(f"{'model':<10} {'GiB':>6} {'step':>7} {'s':>6} {'GiB/s':>6} {'peak GiB':>9}")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            # In a process of its own: a child starts with the peak memory of its parent.
            arguments = folder / "public" / "transformer", Architecture("dit", MODELS[name])
            writer = multiprocessing.get_context("spawn").Process(
                target=write_public, args=arguments
            )
            writer.start()
            writer.join()
            file = folder / "public" / "transformer" / FILE
            size = file.stat().st_size / 2**30
            steps = {
                "port": ("--from", str(folder / "public"), "--to", str(folder / "ported")),
                "export": ("--from", str(folder / "ported"), "--to", str(folder / "back")),
            }
            for step, options in steps.items():
                seconds, peak = measured(step, *options)
                rows.append({"model": name, "gib": size, "step": step, "seconds": seconds,
                             "peak_gib": peak})  # fmt: skip
                rate = size / seconds
                print(f"{name:<10} {size:6.2f} {step:>7} {seconds:6.1f} {rate:6.2f} {peak:9.2f}")
            if not same_bits(file, folder / "back" / "transformer"):
                raise SystemExit(f"{name}: what came back differs")
    text = json.dumps({"environment": environment(), "rows": rows}, indent=2)
    Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
