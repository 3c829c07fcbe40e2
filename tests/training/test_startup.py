"""The table at the start of a run, against sums done by hand."""

import dataclasses

import jax
import jax.numpy as jnp

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner.training import abstract_arguments
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training import inputs
from gnvc_jax.training.config import ComputeConfig, DataConfig, Experiment, OptimConfig
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.startup import describe_run, kernels_text

DIT = DiTConfig(16, 16, 2, 2, 8, context_every=1)
EXPERIMENT = Experiment(
    "mine",
    refiner=RefinerConfig(DIT, 16),
    data=DataConfig(frames=13, size=(64, 96), batch=16),
    optim=OptimConfig(accumulate=2),
)


def stage(experiment):
    """8 MiB of a kernel that trains beside its bias, and 1 MiB that does not."""

    def init(key):
        codec = {"kernel": jnp.zeros((2048, 1024)), "bias": jnp.zeros(1024)}
        return {"codec": codec, "vae": {"kernel": jnp.zeros((512, 512))}}

    return Stage(experiment, init, None, inputs.clips(experiment), trainable=("codec/",))


def test_table_of_a_stage_on_eight_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    state, frozen, _ = abstract_arguments(stage(EXPERIMENT), mesh, EXPERIMENT.data.largest)
    grown = dataclasses.replace(EXPERIMENT.data, size_schedule=((7, 128, 96),))
    grown = dataclasses.replace(EXPERIMENT, data=grown)
    with jax.set_mesh(mesh):
        text = describe_run(EXPERIMENT, state, frozen, EXPERIMENT.data.shape_at(0))
        later = describe_run(grown, state, frozen, grown.data.shape_at(0))
    step = text.splitlines()[-3]
    assert later == text.replace(step, f"{step}; later 13 frames of 128 x 96")
    # A quarter of the kernel lies on each device; the bias, and what has fewer than half a million
    # elements, lies on all of them whole. 13 frames are 4 latents of 8 x 12, or 4 x 6 tokens.
    assert text.splitlines() == [
        "mine on 8 x cpu: data 2, fsdp 4",
        "part   state    parameters  type     MiB  per device  on the mesh",
        "codec  trained   2,098,176  float32  8.0         2.0  100% split over fsdp",
        "vae    frozen      262,144  float32  1.0         1.0  replicated",
        "step     16 clips of 13 frames of 64 x 96: 208 frames, 1,536 tokens, in 2 micro-batches",
        "kernels  convolutions by Winograd and sums over taps; attention chunked; "
        "refiner in float32, precision highest, remat none",
        "memory   11.0 MiB per device (trained 2.0, averages 2.0, moments 4.0, gradients 2.0, "
        "frozen 1.0), and activations",
    ]


def test_kernels_are_those_of_the_mesh():
    """Two heads cannot be exchanged for tokens among four devices."""
    named = dataclasses.replace(EXPERIMENT, compute=ComputeConfig(attention="xla"))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4))):
        assert "attention chunked in a ring;" in kernels_text(EXPERIMENT)
        assert "attention xla;" in kernels_text(named)
    assert "attention" not in kernels_text(dataclasses.replace(EXPERIMENT, refiner=None))
