"""Speed and memory of DiT blocks of Wan2.1's 1.3B model beside diffusers', with equal weights.

    python benchmarks/dit_speed.py [--layers 2] [--latents 5x32x32] [--repeats 5] [--threads N]

A whole forward pass with so many layers; random weights, float32, batch 1. PyTorch runs eagerly
under inference_mode. Processes, memory and ratios as in vae_speed.py.
"""

import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers import side_by_side

from gnvc_jax.refiner import WAN_1_3B

SIDES = ("torch", "jax")


def make_weights(folder: Path, layers: int) -> None:
    """Random weights as diffusers saves them, and ported."""
    import torch
    from diffusers import WanTransformer3DModel

    from gnvc_jax.porting.port import port

    torch.manual_seed(0)
    cfg = dataclasses.replace(WAN_1_3B, layers=layers)
    model = WanTransformer3DModel(
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.head_width,
        ffn_dim=cfg.ffn_width,
        num_layers=layers,
    )
    model.save_pretrained(folder / "public" / "transformer")
    port(folder / "public", folder / "ported", progress=False)


def inputs(latents: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    t, h, w = map(int, latents.split("x"))
    rng = np.random.default_rng(0)
    shapes = (1, t, h, w, WAN_1_3B.channels), (1, WAN_1_3B.text_length, WAN_1_3B.text_width)
    x, text = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, np.array([500.0], np.float32), text


def torch_run(folder: Path, latents: str) -> tuple[Callable, float]:
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = WanTransformer3DModel.from_pretrained(folder / "public" / "transformer")
    x, time, text = map(torch.from_numpy, inputs(latents))
    x = x.movedim(-1, 1).contiguous()

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(x, time, text, return_dict=False)[0].movedim(1, -1).numpy()

    return run, 0.0


def jax_run(folder: Path, latents: str) -> tuple[Callable, float]:
    import jax

    from gnvc_jax.porting.checkpoint import load_weights
    from gnvc_jax.refiner import DiT

    architecture, params = load_weights(folder / "ported", "dit")
    params, arrays = jax.device_put(({"params": params}, inputs(latents)))
    start = time.perf_counter()
    compiled = jax.jit(DiT(architecture.config).apply).lower(params, *arrays).compile()
    return lambda: np.asarray(compiled(params, *arrays)), time.perf_counter() - start


def options(parser) -> None:
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--latents", default="5x32x32", help="frames x rows x columns")


def main() -> None:
    out = Path(__file__).parent / "results/dit_speed.json"
    args = side_by_side.parse(__doc__, out, options)
    if args.child:
        side, folder, latents = args.child
        made = (torch_run if side == "torch" else jax_run)(Path(folder), latents)
        side_by_side.serve(*made, Path(folder) / f"{side}.npy")
        return
    grid = tuple(map(int, args.latents.split("x")))
    cfg = dataclasses.replace(WAN_1_3B, layers=args.layers)
    label = f"{args.layers} layers, {cfg.tokens(*grid)} tokens"
    print(f"{side_by_side.HEADER}   GFLOP/s   {label}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_weights, (Path(folder), args.layers))
        arguments = [folder, args.latents]
        results = side_by_side.compare(args, label, SIDES, arguments, Path(folder))
    for side, result in results.items():
        result["gflops"] = cfg.flops(*grid) / result["seconds"] / 1e9
        print(f"{side_by_side.line(side, result)}   {result['gflops']:.1f}", flush=True)
    row = {"layers": args.layers, "latents": args.latents, "tokens": cfg.tokens(*grid), **results}
    side_by_side.write(args, row, ("layers", "latents"))


if __name__ == "__main__":
    main()
