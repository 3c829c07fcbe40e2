"""Groups of settings of a training run: data, optimizer, run folder, evaluation, start, precision.

`gnvc_jax.training.config.Experiment` joins them; sizes of networks and the mesh are defined beside
the code that they size. Each group checks its own values when it is made.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax.numpy as jnp

from gnvc_jax.data.left_out import MAX_SHARE
from gnvc_jax.errors import UsageError


def check_range(group: str, config: object, **ranges: tuple[float, float]) -> None:
    """Checks that values lie in their ranges, in which NaN and infinities never lie.

    Raises:
        UsageError: If a value is outside; the message names the first one.
    """
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"{group}.{key}: must be in [{low}, {high}], got {value}")


def check_choices(group: str, config: object) -> None:
    """Checks settings that are annotated as `Literal`, which Python itself does not check.

    Raises:
        UsageError: If a setting is none of its choices; the message names them.
    """
    for key, hint in get_type_hints(type(config)).items():
        # Either the hint itself or, in `Literal[...] | None`, a member of the union.
        literal = next((t for t in (hint, *get_args(hint)) if get_origin(t) is Literal), None)
        value = getattr(config, key)
        optional = type(None) in get_args(hint)
        if literal is None or value in get_args(literal) or (optional and value is None):
            continue
        choices = ", ".join(map(str, get_args(literal)))
        raise UsageError(f"{group}.{key}: expected one of {choices}, got {value!r}")


class ClipShape(NamedTuple):
    """Shape of training clips.

    Attributes:
        frames: Number of frames, 1 + 4k.
        height, width: Size in pixels.
    """

    frames: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def volume(self) -> int:
        """Number of pixels in all frames, by which the largest of some shapes is chosen."""
        return self.frames * self.height * self.width


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training clips.

    Attributes:
        path: Folder of videos, list of videos (.txt), a single video, or a folder made by `gnvc
            make-shards`.
        mixture: (path, weight) pairs to draw from in place of `path`, each a share of the clips in
            proportion to its weight.
        frames: Number of frames per clip, 1 + 4k.
        clip_length_schedule: (step, frames) pairs in order; from that step on, clips have that
            length (GNVC-VD: 5, then 9, then 13).
        size: Height and width of the crop in pixels.
        size_schedule: (step, height, width) triples in order; from that step on, crops have that
            size. It may change together with the length, or at other steps.
        batch: Number of clips per step over all devices.
        workers: Number of decoding processes; 0 decodes in a thread of this one.
        decode_cache: Folder to keep decoded frames in.
        downscale_prob: Share of clips that are halved in size before cropping.
        latents: Folder made by `gnvc cache-latents`, read in place of videos by stages that need no
            frames, or by `gnvc cache-coded`, for the stage `refine`.
        statistics_batches: Number of batches that statistics of latents are measured on at the
            start of a run, unless the VAE brings them.
        max_left_out: Largest share of videos that may be unreadable, wholly or in part.
        seed: Seed of all draws: clips, crops, mirroring.
    """

    path: str = "data"
    mixture: tuple[tuple[str, float], ...] = ()
    frames: int = 5
    clip_length_schedule: tuple[tuple[int, int], ...] = ()
    size: tuple[int, int] = (256, 256)
    size_schedule: tuple[tuple[int, int, int], ...] = ()
    batch: int = 8
    workers: int = 0
    decode_cache: str | None = None
    downscale_prob: float = 0.5
    latents: str | None = None
    statistics_batches: int = 8
    max_left_out: float = MAX_SHARE
    seed: int = 0

    def __post_init__(self):
        counts = {"batch": (1, math.inf), "workers": (0, math.inf)}
        counts["statistics_batches"] = (1, math.inf)
        check_range("data", self, **counts, downscale_prob=(0, 1), max_left_out=(0, 1))
        for path, weight in self.mixture:
            if not (weight > 0 and math.isfinite(weight)):
                raise UsageError(
                    f"data.mixture: the weight of {path} must be positive, got {weight}"
                )
        # Step 0 has `frames` and `size` themselves, so entries begin at 1.
        for name in ("clip_length_schedule", "size_schedule"):
            steps = [step for step, *_ in getattr(self, name)]
            if steps != sorted(set(steps)) or min(steps, default=1) < 1:
                raise UsageError(f"data.{name}: steps must be positive and rising, got {steps}")
        for shape in self.shapes:
            if shape.frames < 1:
                raise UsageError(f"data.frames: must be positive, got {shape.frames}")

    @property
    def shapes(self) -> tuple[ClipShape, ...]:
        """Shapes of clips that a run comes to, in order."""
        schedules = *self.clip_length_schedule, *self.size_schedule
        return tuple(self.shape_at(step) for step in sorted({0, *(step for step, *_ in schedules)}))

    @property
    def largest(self) -> ClipShape:
        """The shape with the most pixels, which needs the most memory and time."""
        return max(self.shapes, key=lambda shape: shape.volume)

    def shape_at(self, step: int) -> ClipShape:
        """Shape of clips in the step that follows `step` others."""

        def last(schedule: Sequence[tuple[int, ...]], before: tuple[int, ...]) -> tuple[int, ...]:
            # The last entry that has begun, or the value before the first one.
            begun = (tuple(value) for first, *value in reversed(schedule) if step >= first)
            return next(begun, before)

        lengths, sizes = self.clip_length_schedule, self.size_schedule
        return ClipShape(*last(lengths, (self.frames,)), *last(sizes, self.size))


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, and an average of the weights.

    Attributes:
        lr: Largest learning rate.
        warmup: Number of steps in which the learning rate rises from 0.
        steps: Number of steps of the run.
        final_lr_ratio: Learning rate at the last step, relative to `lr`.
        betas: Decay of the first and the second moment.
        weight_decay: Weight decay, which acts on kernels only (see
            `gnvc_jax.training.batched_optimizer.is_kernel`).
        accumulate: Number of micro-batches that a batch is split into; gradients are averaged.
        clip: Largest global norm of the gradient.
        ema: Decay of the average of the weights; step n uses min(ema, (1 + n) / (10 + n)).
    """

    lr: float = 1e-4
    warmup: int = 1000
    steps: int = 100_000
    final_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    accumulate: int = 1
    clip: float = 1.0
    ema: float = 0.9995

    def __post_init__(self):
        counts = dict.fromkeys(("steps", "accumulate"), (1, math.inf)) | {"warmup": (0, math.inf)}
        sizes = dict.fromkeys(("lr", "weight_decay", "clip"), (0, math.inf))
        check_range("optim", self, **counts, **sizes, final_lr_ratio=(0, 1), ema=(0, 1))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Output of a run.

    Attributes:
        out: Run folder; repeating a command with the same folder resumes the run.
        log_every: Steps between lines of the log.
        checkpoint_every_s: Seconds between checkpoints.
        checkpoint_every: Steps between checkpoints, in place of seconds.
        keep: Number of checkpoints to keep, the newest ones.
        keep_every: Steps between checkpoints that are kept for good, beside the newest; 0 for none.
        seed: Seed of parameters and of all noise.
        watchdog_s: Seconds after which a step that does not end ends the process, with the stacks
            of its threads; 0 for never. Evaluations and the copy of a checkpoint count.
        tensorboard: Whether to log for TensorBoard, too.
        profile: First and last step to trace; the trace for XProf or TensorBoard is written to
            `out`/profile.
    """

    out: str = "runs/unnamed"
    log_every: int = 50
    checkpoint_every_s: float = 600.0
    checkpoint_every: int | None = None
    keep: int = 2
    keep_every: int = 0
    seed: int = 0
    watchdog_s: float = 0.0
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        check_range("run", self, keep=(1, math.inf), keep_every=(0, math.inf))
        check_range("run", self, watchdog_s=(0, math.inf))
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            raise UsageError(f"run.profile: {self.profile} are no first and last step")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Coding of held-out clips while a codec trains, see `gnvc_jax.training.evaluator`.

    Attributes:
        every: Steps between evaluations, 0 for none.
        data: Held-out clips: folder of videos, list of videos (.txt), or a single video.
        frames: Number of frames to code of each clip, from its first on.
        clips: Number of clips to code, the first ones of `data`.
        best_by: Quality metric by which the best model so far is chosen.
    """

    every: int = 0
    data: str | None = None
    frames: int = 33
    clips: int = 4
    best_by: Literal["psnr", "lpips"] = "psnr"

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("frames", "clips"), (1, math.inf))
        check_range("evaluate", self, every=(0, math.inf), **counts)
        check_choices("evaluate", self)
        if self.every and self.data is None:
            raise UsageError("evaluate.data: name the held-out clips for evaluate.every")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Sources of the starting weights; see `gnvc_jax.training.weights`.

    Settings that are None are taken over from the run `run`, if that is given. A run and a model
    cannot both be given.

    Attributes:
        vae: Folder made by `gnvc port`, run folder of the stage `vae`, or a model, whose VAE to
            start from.
        dit: Folder made by `gnvc port` with the DiT of the refiner.
        prompt: File of the text condition, see `gnvc_jax.porting.checkpoint.load_prompt`; by
            default the one in the folder `dit`, or zeros.
        run: Run folder whose averaged weights to start from.
        model: Model file, or name of a shipped model, whose weights to start from.
    """

    vae: str | None = None
    dit: str | None = None
    prompt: str | None = None
    run: str | None = None
    model: str | None = None

    def __post_init__(self):
        if self.run is not None and self.model is not None:
            raise UsageError("init.run and init.model: start from one of them")

    @property
    def has_codec(self) -> bool:
        """Whether the run starts from trained weights of a codec."""
        return self.run is not None or self.model is not None


@dataclasses.dataclass(frozen=True)
class Policy:
    """Types and precision in which one network computes.

    Parameters that train are always float32; kernels that do not train are kept in `dtype`, as
    layers cast them to it anyway.

    Attributes:
        dtype: Type of activations and of the inputs of matrix products and convolutions.
        precision: Precision of products of float32 inputs. "highest" is float32; "default" is the
            fastest of the backend, bfloat16 on TPUs and TF32 on GPUs; "high" lies between.
        remat: Activations that the backward pass computes again instead of keeping them.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["default", "high", "highest"] = "highest"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self):
        check_choices("compute", self)

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The type `dtype` for JAX."""
        return jnp.dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Policy):
    """Types and precision of all networks; those at the top are the refiner's DiT's.

    The codec and encoding by the VAE have no setting: they are float32 with the precision
    "highest", since latents and the integers made of them are what is coded.

    Attributes:
        remat: Activations that the backward pass of the DiT computes again, see
            `gnvc_jax.refiner.dit.REMAT`.
        attention: Implementation of attention, see `gnvc_jax.refiner.attention`; None for the
            backend's best, "ring" for keys that go round the mesh axis `context`, which otherwise
            exchanges tokens for heads where it divides these.
        vae: Settings of the VAE's decoder; `remat` covers the encoder, too, where that trains.
        perceptual: Settings of the network of LPIPS, where that is a loss.
    """

    remat: Literal["none", "full", "attention", "matmuls"] = "none"
    attention: Literal["xla", "cudnn", "chunked", "splash", "ring"] | None = None
    vae: Policy = Policy()
    perceptual: Policy = Policy()

    def without_remat(self) -> "ComputeConfig":
        """Returns the same settings with nothing computed again."""
        keep = {"remat": "none"}
        parts = {k: dataclasses.replace(getattr(self, k), **keep) for k in ("vae", "perceptual")}
        return dataclasses.replace(self, **keep, **parts)
