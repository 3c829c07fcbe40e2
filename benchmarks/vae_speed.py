"""Speed and memory of the full-size VAE beside diffusers' AutoencoderKLWan, with equal weights.

    python benchmarks/vae_speed.py [--cases 17x256x256 9x480x832] [--ways encode decode]
        [--repeats 3] [--threads N]

Random weights, float32, random inputs; a case is frames x rows x columns. PyTorch runs eagerly
under inference_mode. Each side is a process of its own that waits while the others run; runs are
interleaved and medians are given. The first --warm-ups runs are not counted; JAX compiles before
them. Memory is the largest resident size during the runs, compilation and loading left out. "clip"
is JAX's driver for whole clips, "stream" the one with constant memory, which works in groups of
four frames as diffusers does. Ratios are PyTorch over JAX: above 1, JAX is faster or smaller.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers import side_by_side

SIDES = ("torch", "clip", "stream")


def make_weights(folder: Path) -> None:
    """Random weights as diffusers saves them, and ported."""
    import torch
    from diffusers import AutoencoderKLWan

    from gnvc_jax.porting.port import port

    torch.manual_seed(0)
    AutoencoderKLWan().save_pretrained(folder / "public" / "vae")
    port(folder / "public", folder / "ported", progress=False)


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


def child(side: str, folder: Path, way: str, case: tuple[int, ...]) -> None:
    frames, h, w = case
    shape = (1, frames, h, w, 3) if way == "encode" else (1, 1 + frames // 4, h // 8, w // 8, 16)
    array = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    if side == "torch":
        made = torch_run(folder, way, array)
    else:
        made = jax_run(folder, side, way, array, case)
    side_by_side.serve(*made, folder / f"{side}.npy")


def measure(args, folder: Path, case: str, way: str) -> None:
    arguments = [str(folder), way, case]
    results = side_by_side.compare(args, f"{case} {way}", SIDES, arguments, folder)
    for side in SIDES:
        print(f"{case:11}{way:8}{side_by_side.line(side, results[side])}", flush=True)
    over = results["stream"]["seconds"] / results["clip"]["seconds"]
    row = {"case": case, "way": way, **results, "stream_over_clip": over}
    side_by_side.write(args, row, ("case", "way"))


def options(parser) -> None:
    parser.add_argument("--cases", nargs="+", default=["17x256x256", "9x480x832"])
    parser.add_argument("--ways", nargs="+", default=["encode", "decode"])


def main() -> None:
    out = Path(__file__).parent / "results/vae_speed.json"
    args = side_by_side.parse(__doc__, out, options)
    if args.child:
        side, folder, way, case = args.child
        child(side, Path(folder), way, tuple(map(int, case.split("x"))))
        return
    print(f"{'case':11}{'way':8}{side_by_side.HEADER}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_weights, (Path(folder),))  # a child starts with its parent's peak
        for case in args.cases:
            for way in args.ways:
                measure(args, Path(folder), case, way)


if __name__ == "__main__":
    main()
