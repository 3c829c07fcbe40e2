"""The train step of a small DiT on 1, 2, 4 and 8 simulated devices, along each axis of the mesh.

    python benchmarks/scaling.py [--devices 1 2 4 8] [--out benchmarks/results/scaling.json]

Says, for each mesh, how far the loss of the second step is from that of one device, what state and
temporaries take on each device, and what a device sends. Seconds are not measured: the devices
share the cores of one machine. Exit status 1 if a loss differs by more than 1e-5 from that of one
device, or if `fsdp` leaves each of n devices more than 1.15 n-ths of the state.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.files import write_json
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner import hlo
from gnvc_jax.planner.program import bytes_per_device
from gnvc_jax.planner.training import abstract_arguments
from gnvc_jax.refiner import DiT, DiTConfig
from gnvc_jax.training.config import ClipShape, DataConfig, Experiment, OptimConfig
from gnvc_jax.training.inputs import Data
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.state import State, init_state
from gnvc_jax.training.step import jit_step

DIT = DiTConfig(768, 3072, 8, 2, 64, 16, text_length=0)
AXES = {
    "data": ("data", None),
    "fsdp": ("fsdp", None),
    "context, exchange": ("context", "chunked"),
    "context, ring": ("context", "ring"),
    "tensor": ("tensor", None),
}


def velocity_stage(experiment: Experiment, attention: str | None) -> Stage:
    """A DiT that is to give noise minus data."""
    dit = DiT(DIT, attention=attention)

    def init(key):
        return dit.init(key, jnp.zeros((1, 1, 2, 2, DIT.channels)), jnp.zeros(1))["params"]

    def shapes(clip):
        shape = experiment.data.batch, *clip, DIT.channels
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(params, constants, batch, key, step):
        noise = jax.random.normal(key, batch.shape)
        time = jnp.full(batch.shape[:1], 500.0)
        velocity = dit.apply({"params": params}, (batch + noise) / 2, time)
        return jnp.mean((velocity - (noise - batch)) ** 2), {}

    return Stage(experiment, init, loss, Data(None, shapes))


def start(stage: Stage) -> State:
    """The same on every mesh."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(stage.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.05, x.shape)), shapes)
    return init_state(stage.experiment.optim, params, jax.random.key(0))


def measure(name: str, count: int) -> dict:
    axis, attention = AXES[name]
    optim = OptimConfig(lr=1e-3, warmup=1, steps=10)
    experiment = Experiment("velocity", data=DataConfig(batch=8), optim=optim)
    stage = velocity_stage(experiment, attention)
    mesh = make_mesh(MeshConfig(**({"data": 1} | {axis: count})), jax.devices()[:count])
    state, frozen, batch = abstract_arguments(stage, mesh, ClipShape(4, 8, 16))
    with jax.set_mesh(mesh):
        compiled = jit_step(stage, mesh, state, frozen).lower(state, frozen, batch).compile()
        now = jax.device_put(start(stage), jax.tree.map(lambda x: x.sharding, state))
        clips = np.random.default_rng(0).normal(size=batch.shape).astype(np.float32)
        clips, losses = jax.device_put(clips, batch.sharding), []
        for _ in range(3):
            now, values = compiled(now, frozen, clips)
            losses.append(float(values["loss"]))
    return {
        "axis": name,
        "devices": count,
        "losses": losses,
        "state_mib": bytes_per_device(state) / 2**20,
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "sent_mib": {c.kind: c.sent / 2**20 for c in hlo.collectives(compiled.as_text())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    args = parser.parse_args()
    one, rows = measure("data", 1), []
    print("| axis | devices | loss differs | state MiB | temporary MiB | sent MiB |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name in AXES:
        for count in args.devices:
            row = one | {"axis": name} if count == 1 else measure(name, count)
            row["difference"] = max(abs(a / b - 1) for a, b in zip(row["losses"], one["losses"]))
            sent = ", ".join(f"{kind} {size:.2f}" for kind, size in row["sent_mib"].items())
            print(
                f"| {name} | {count} | {row['difference']:.1e} | {row['state_mib']:.2f} | "
                f"{row['temp_mib']:.1f} | {sent} |",
                flush=True,
            )
            rows.append(row)
    wrong = [row for row in rows if row["difference"] > 1e-5]
    wrong += [
        row
        for row in rows
        if row["axis"] == "fsdp" and row["state_mib"] * row["devices"] > 1.15 * one["state_mib"]
    ]
    facts = {"jax": jax.__version__, "dit": str(DIT)}
    write_json(args.out, {"facts": facts, "rows": rows})
    if wrong:
        sys.exit("too far off: " + ", ".join(f"{r['axis']} {r['devices']}" for r in wrong))


if __name__ == "__main__":
    main()
