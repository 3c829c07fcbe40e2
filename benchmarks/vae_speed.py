"""Speed and memory of the full-size VAE beside diffusers' AutoencoderKLWan, with equal weights.

    python benchmarks/vae_speed.py [--cases 17x256x256 9x480x832] [--repeats 3] [--threads N]

Random weights, float32, random inputs; a case is frames x rows x columns. PyTorch runs eagerly
under inference_mode. Each side is a process of its own that waits while the others run; runs are
interleaved and medians are given. The first --warm-ups runs are not counted; JAX compiles before
them. Memory is the largest resident size during the runs, compilation and loading left out. "clip"
is JAX's driver for whole clips, "stream" the one with constant memory, which works in groups of
four frames as diffusers does. Ratios are PyTorch over JAX: above 1, JAX is faster or smaller.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

SIDES = ("torch", "clip", "stream")


def torch_run(folder: Path, way: str, array: np.ndarray) -> tuple[Callable, float]:
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vae = AutoencoderKLWan.from_pretrained(folder / "public" / "vae")
    x = torch.from_numpy(array).movedim(-1, 1).contiguous()

    def run() -> np.ndarray:
        with torch.inference_mode():
            y = vae.encode(x).latent_dist.mean if way == "encode" else vae.decode(x).sample
            return y.movedim(1, -1).numpy()

    return run, 0.0


def jax_run(
    folder: Path, side: str, way: str, array: np.ndarray, case: tuple[int, ...]
) -> tuple[Callable, float]:
    import jax
    import jax.numpy as jnp

    from gnvc_jax import vae as v
    from gnvc_jax.porting.checkpoint import load_weights

    architecture, params = load_weights(folder / "ported", "vae")
    vae, params = v.VAE(architecture.config), jax.device_put(params)
    driver, x = getattr(v, f"{way}_{side}"), jnp.asarray(array)
    more = (case[0], case[1:]) if way == "decode" else ()
    start = time.perf_counter()
    compiled = jax.jit(lambda params, x: driver(vae, params, x, *more)).lower(params, x).compile()
    return lambda: np.asarray(compiled(params, x)), time.perf_counter() - start


def peak_mib() -> float:
    """Largest resident size since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def child(folder: Path, side: str, way: str, case: tuple[int, ...]) -> None:
    """Prints its compile seconds; then, for each line read, seconds and peak memory of a run."""
    frames, h, w = case
    shape = (1, frames, h, w, 3) if way == "encode" else (1, 1 + frames // 4, h // 8, w // 8, 16)
    array = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    if side == "torch":
        run, compile_seconds = torch_run(folder, way, array)
    else:
        run, compile_seconds = jax_run(folder, side, way, array, case)
    print(json.dumps(compile_seconds), flush=True)
    reset_peak()
    for _ in sys.stdin:
        start = time.perf_counter()
        result = run()
        measured = time.perf_counter() - start, peak_mib()
        np.save(folder / f"{side}.npy", result)
        print(json.dumps(measured), flush=True)


class Child:
    """A process that runs one side of a case when asked to."""

    def __init__(self, args: argparse.Namespace, folder: str, side: str, way: str, case: str):
        command = [sys.executable, __file__, "--child", folder, side, way, case]
        if args.threads:
            command += ["--threads", str(args.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.compile_seconds = self.answer()
        self.seconds: list[float] = []

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a benchmarked process ended early")
        return json.loads(line)

    def run(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, self.peak_mib = self.answer()
        self.seconds.append(seconds)

    def result(self) -> dict:
        return {
            "seconds": statistics.median(self.seconds),
            "peak_mib": self.peak_mib,
            "compile_s": self.compile_seconds,
        }


def make_weights(folder: Path) -> None:
    """Random weights as diffusers saves them, and ported."""
    import torch
    from diffusers import AutoencoderKLWan

    from gnvc_jax.porting.port import port

    torch.manual_seed(0)
    AutoencoderKLWan().save_pretrained(folder / "public" / "vae")
    port(folder / "public", folder / "ported", progress=False)


def measure(args: argparse.Namespace, folder: str, case: str, way: str) -> dict:
    children: dict[str, Child] = {}
    with contextlib.ExitStack() as stack:
        for side in SIDES:
            print(f"{case} {way}: preparing {side}", file=sys.stderr, flush=True)
            children[side] = Child(args, folder, side, way, case)
            stack.callback(children[side].process.communicate)  # ends its input
        for i in range(args.warm_ups + args.repeats):
            for side, process in children.items():
                process.run()
                if i < args.warm_ups:
                    process.seconds.clear()
                    continue
                done = f"{process.seconds[-1]:.1f} s"
                number = i + 1 - args.warm_ups
                print(f"{case} {way}: run {number}, {side} {done}", file=sys.stderr, flush=True)
    outputs = {side: np.load(f"{folder}/{side}.npy") for side in SIDES}
    results = {side: process.result() for side, process in children.items()}
    theirs, scale = results["torch"], np.abs(outputs["torch"]).max()
    for side in ("clip", "stream"):
        ours = results[side]
        ours["speed_ratio"] = theirs["seconds"] / ours["seconds"]
        ours["memory_ratio"] = theirs["peak_mib"] / ours["peak_mib"]
        ours["difference"] = float(np.abs(outputs[side] - outputs["torch"]).max() / scale)
    over = results["stream"]["seconds"] / results["clip"]["seconds"]
    return {"case": case, "way": way, **results, "stream_over_clip": over}


def show(row: dict) -> None:
    for side in SIDES:
        r = row[side]
        line = f"{row['case']:11}{row['way']:8}{side:8}{r['seconds']:9.2f}{r['peak_mib']:9.0f}"
        if side != "torch":
            line += f"{r['compile_s']:11.1f}{r['speed_ratio']:8.2f}{r['memory_ratio']:9.2f}"
            line += f"{r['difference']:10.1e}"
        print(line, flush=True)


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["17x256x256", "9x480x832"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--threads", type=int, help="processor cores that each side may use")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/vae_speed.json"
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    missing = [m for m in ("torch", "diffusers") if importlib.util.find_spec(m) is None]
    if missing:
        raise SystemExit(f"this benchmark needs {' and '.join(missing)}: pip install them first")
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        folder, side, way, case = args.child
        child(Path(folder), side, way, tuple(map(int, case.split("x"))))
        return
    print("case       way     side      seconds      MiB  compile s  faster  smaller  differ")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:  # a child starts with the peak memory of its parent
            pool.apply(make_weights, (Path(folder),))
        for case in args.cases:
            for way in ("encode", "decode"):
                rows.append(measure(args, folder, case, way))
                show(rows[-1])
    facts = {
        "cpu": cpu_name(),
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "torch", "diffusers")},
        "repeats": args.repeats,
        "warm_ups": args.warm_ups,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    temporary.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
