"""Speed of everything that needs an accelerator, on the GPU or TPU that is there, in one run.

    python benchmarks/accelerator.py [--config wan_1_3b/latent] [--sizes 832x480,1280x720,1920x1080]
        [--steps 1,5] [--frames 25] [--train-frames 5,13] [--repeats 5] [--out FILE]

Measured on one device, with random weights and inputs: the programs of encoder and decoder, one by
one (VAE, codec, DiT), and what a group of --frames frames takes with so many refinement steps; and
the train step of the config with clips of --train-frames. Sizes are rounded up to what the codec
pads to. Each program is compiled, run once, and then timed; medians are given, with the share of
the chip's peak if that is known. A part that does not fit is listed with the reason, and the others
go on. Not included are the entropy coder and transfers from and to the host.

Where PyTorch finds a GPU, the VAE's decoder and the DiT of diffusers run in the same sizes and in
bfloat16, compiled by torch.compile, in a process of their own.
"""

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from helpers import options

from gnvc_jax.arrays import Tree
from gnvc_jax.codec.config import LATENT_MULTIPLE
from gnvc_jax.commands.training import load_experiment
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.files import write_json
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner import flops
from gnvc_jax.planner.chips import PEAK_FLOPS
from gnvc_jax.planner.coding import coding_programs, program_times, stored_shapes
from gnvc_jax.planner.training import abstract_arguments
from gnvc_jax.training.config import ClipShape, Experiment
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.step import jit_step
from gnvc_jax.training.throughput import operations

CONFIG = "wan_1_3b/latent"


def drawn(shapes: Tree) -> Tree:
    """Arrays of these shapes, types and shardings: small numbers where the type allows."""

    def one(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            made = jnp.broadcast_to(jax.random.key(0), x.shape)
        elif jnp.issubdtype(x.dtype, jnp.floating):
            # Positive, since moments of the optimizer are among them.
            made = jnp.abs(0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype))
        else:
            made = jnp.zeros(x.shape, x.dtype)
        return jax.device_put(made, x.sharding)

    return jax.tree.map(one, shapes)


def timed(compiled: Callable, repeats: int, *arguments: Tree, state: bool = False) -> float:
    """Median seconds of a run after a first one; with `state`, the first result goes in again."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
        if state:  # its buffers are donated
            arguments = result[0], *arguments[1:]
    return statistics.median(seconds[1:])


def compiled(function: Callable, *shapes: Tree) -> tuple[Callable, dict]:
    start = time.perf_counter()
    program = function.lower(*shapes).compile()
    facts = {"compile_s": time.perf_counter() - start}
    return program, facts | {"temp_bytes": program.memory_analysis().temp_size_in_bytes}


def rate(work: float, seconds: float) -> dict:
    """Seconds, operations, and the share of the chip's peak."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    share = {"share_of_peak": work / seconds / peak} if peak else {}
    return {"seconds": seconds, "flops": work, **share}


def coding(experiment: Experiment, steps: list[int], repeats: int) -> dict:
    """Seconds of each program, and frames per second of encoding and of decoding by steps."""
    frames, params = experiment.data.frames, stored_shapes(experiment)
    latents = 1 + (frames - 1) // experiment.vae.temporal_stride
    encode = program_times(experiment, "encode", latents)
    ways = {"encode": encode} | {
        f"decode_steps{n}": program_times(experiment, "decode", latents, n) for n in [0, *steps]
    }
    found: dict[str, dict] = {"programs": {}, "frames_per_s": {}}
    for name, (function, shapes) in coding_programs(experiment, params, latents).items():
        if not any(name in times for times in ways.values()):
            continue
        try:
            program, facts = compiled(function, *shapes)
            seconds = timed(program, repeats, *drawn(shapes))
        except jax.errors.JaxRuntimeError as error:
            found["programs"][name] = {"error": str(error).splitlines()[0]}
            continue
        if name == "velocity":  # attention kernels cannot be counted
            work = experiment.refiner.dit.flops(*shapes[1].shape[1:4])
        else:
            work = flops.count(function, *shapes)
        found["programs"][name] = facts | rate(work, seconds)
    for way, times in ways.items():
        parts = [(n, found["programs"][name].get("seconds")) for name, n in times.items()]
        if all(seconds is not None for _, seconds in parts):
            found["frames_per_s"][way] = frames / sum(n * seconds for n, seconds in parts)
    return found


def training(experiment: Experiment, frames: int, repeats: int) -> dict:
    """Seconds of the train step on clips of so many frames."""
    stage, mesh = make_stage(experiment), jax.sharding.get_mesh()
    clip = ClipShape(frames, *experiment.data.size)
    shapes = abstract_arguments(stage, mesh, clip)
    found = {"batch": experiment.data.batch, "frames": frames, "size": clip.size}
    try:
        program, facts = compiled(jit_step(stage, mesh, *shapes[:2]), *shapes)
        seconds = timed(program, repeats, *drawn(shapes), state=True)
    except jax.errors.JaxRuntimeError as error:
        return found | {"error": str(error).splitlines()[0]}
    return found | facts | rate(operations(stage, jax.devices()[0], clip), seconds)


def peer(sizes: list[tuple[int, int]], frames: int, repeats: int) -> dict:
    """Seconds of diffusers' VAE decoder and DiT (1.3B), compiled, in bfloat16, on a GPU."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    def seconds(function: Callable) -> dict:
        taken = []
        try:
            for _ in range(2 + repeats):  # the first compiles, the second may do so again
                start = time.perf_counter()
                with torch.inference_mode():
                    function()
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
        except torch.OutOfMemoryError as error:
            return {"error": str(error).splitlines()[0]}
        return {"seconds": statistics.median(taken[2:])}

    like = {"device": "cuda", "dtype": torch.bfloat16}
    vae = AutoencoderKLWan().to(**like).eval()
    sizes_of = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    dit = torch.compile(WanTransformer3DModel(**sizes_of).to(**like).eval())
    vae.decoder = torch.compile(vae.decoder)
    text, when = torch.randn(1, 512, 4096, **like), torch.tensor([500.0], device="cuda")
    found = {}
    for height, width in sizes:
        latents = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, **like)
        found[f"{width}x{height}"] = {
            "decode_latents": seconds(lambda x=latents: vae.decode(x)),
            "velocity": seconds(lambda x=latents: dit(x, when, text)),
        }
    versions = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    return versions | {"frames": frames, "sizes": found}


def torch_has_gpu() -> bool:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        return False
    import torch

    return torch.cuda.is_available()


def main() -> None:
    args = options.parse(
        __doc__,
        "accelerator",
        config=CONFIG,
        sizes="832x480,1280x720,1920x1080",
        steps="1,5",
        frames=25,
        train_frames="5,13",
        repeats=5,
        part="all",  # "peer" in the process that runs diffusers
    )
    sizes = [tuple(map(int, size.split("x")))[::-1] for size in args.sizes.split(",")]
    if args.part == "peer":
        print(json.dumps(peer(sizes, args.frames, args.repeats)))
        return
    result = {"command": sys.argv[1:]}
    if torch_has_gpu():  # before JAX takes the memory of the GPU
        command = [sys.executable, *sys.argv, "--part", "peer"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        result["diffusers"] = json.loads(done.stdout) if not done.returncode else None
    if args.config == CONFIG and jax.default_backend() == "cpu":
        print("no GPU or TPU here: nothing is measured; to try it on a CPU, name a small --config")
        return
    result |= {"environment": environment(), "coding": {}, "training": []}
    base = load_experiment(args.config, ())
    unit = base.vae.stride * LATENT_MULTIPLE
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        for size in sizes:
            padded = tuple(-(-side // unit) * unit for side in size)
            data = dataclasses.replace(
                base.data,
                size=padded,
                frames=args.frames,
                clip_length_schedule=(),
                size_schedule=(),
            )
            experiment = dataclasses.replace(base, data=data)
            name = f"{size[1]}x{size[0]}"
            steps = [int(n) for n in args.steps.split(",")]
            result["coding"][name] = coding(experiment, steps, args.repeats)
            print(name, json.dumps(result["coding"][name]["frames_per_s"]), flush=True)
            write_json(args.out, result)  # what is done is kept if a later part ends the process
        for frames in map(int, args.train_frames.split(",")):
            row = training(base, frames, args.repeats)
            result["training"].append(row)
            print("train step", json.dumps(row), flush=True)
            write_json(args.out, result)


if __name__ == "__main__":
    main()
