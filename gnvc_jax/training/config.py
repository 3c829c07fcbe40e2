"""Experiments: nested frozen dataclasses, config files, and overrides on the command line.

`Experiment` holds all settings of a run in groups (`data`, `optim`, ...), each a dataclass of
`gnvc_jax.training.settings`, which can be imported from here too, or of the network that it sizes.
`load` reads one from a config file and `override` applies command-line arguments, as
`gnvc train --config X` does. Every dataclass checks itself, and `Experiment` checks them against
each other, so that an experiment that exists is valid.
"""

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from gnvc_jax.buckets import absolute
from gnvc_jax.codec.config import LATENT_MULTIPLE, CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig, parse_mesh
from gnvc_jax.refiner.config import PATCH, RefinerConfig
from gnvc_jax.training.settings import (
    ClipShape,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    InitConfig,
    OptimConfig,
    Policy,
    RunConfig,
)
from gnvc_jax.vae.config import VAEConfig

# What a config file needs, in one place.
__all__ = [
    "ClipShape",
    "ComputeConfig",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "InitConfig",
    "OptimConfig",
    "Policy",
    "RunConfig",
    "flatten",
    "load",
    "override",
]

# Requirements of the package's stages; your own stages check theirs. "motion" is a codec with
# motion ("codec" alone is one without), "start" a run or model with a codec, "train" the choice of
# what trains, "frames" videos rather than cached latents.
STAGE_NEEDS: dict[str, tuple[str, ...]] = {
    "vae": ("frames",),
    "transform": ("codec", "motion", "frames"),
    "refine": ("codec", "motion", "refiner", "start"),
    "codec": ("codec",),
    "latent": ("codec", "refiner", "start", "train"),
    "pixel": ("codec", "start", "train", "frames"),
    "distill": ("codec", "refiner", "start", "train", "frames"),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run.

    Settings are checked against each other here, so that neither a config file nor the command line
    can combine what does not fit; stages check what only they know.

    Attributes:
        stage: Name of a stage (see `gnvc_jax.training.stages`), or "module:function" of your own.
        vae: Sizes of the VAE.
        codec: Sizes of the latent codec, None for stages without one.
        refiner: Sizes of the refiner, None for models without one.
        compute: Types and precision of the networks.
        init: Sources of the starting weights.
        train: Regular expressions for the paths of the parameters that train ("codec/",
            "refiner/dit/groups/context"), in stages that leave the choice.
        lora: Rank of low-rank changes of the DiT's kernels that train in addition, 0 for none.
        loss: Settings of the stage's loss, a dataclass that is defined beside it.
        data: Training clips.
        optim: Optimizer.
        mesh: Number of devices along each axis of the mesh.
        run: Output of the run.
        evaluate: Evaluation on held-out clips.

    Raises:
        UsageError: If settings do not fit each other, or the stage lacks one.
    """

    stage: str
    vae: VAEConfig = VAEConfig()
    codec: CodecConfig | None = None
    refiner: RefinerConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    init: InitConfig = InitConfig()
    train: tuple[str, ...] = ()
    lora: int = 0
    loss: Any = None
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    evaluate: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        if self.init.run and absolute(self.init.run, True) == absolute(self.run.out, True):
            raise UsageError(
                f"init.run: {self.init.run} is run.out too; a run cannot start from itself"
            )
        self._check_networks()
        self._check_data()
        self._check_stage()

    def _check_networks(self) -> None:
        """Checks that each network has the sizes that the others expect of it."""
        vae, codec, refiner = self.vae, self.codec, self.refiner
        channels = "vae.latent_channels", vae.latent_channels
        # (name, value, name of the other, its value) of sizes that must be equal.
        equal = []
        if codec is not None:
            equal += [("codec.latent_channels", codec.latent_channels, *channels)]
        if refiner is not None:
            equal += [("refiner.dit.channels", refiner.dit.channels, *channels)]
        if codec is not None and refiner is not None:
            equal += [("refiner.features", refiner.features, "codec.width", codec.width)]
        for name, value, other, expected in equal:
            if value != expected:
                raise UsageError(f"{name}: must equal {other}, {expected}, got {value}")
        if codec is None or codec.motion is None:
            return
        if not vae.linear:
            raise UsageError("codec.motion: only a linear VAE gives frames to compensate from")
        if (strides := (vae.temporal_stride, vae.stride)) != (4, 8):
            raise UsageError(
                f"codec.motion: made for strides 4 and 8 of the VAE, got {strides[0]} and "
                f"{strides[1]}"
            )

    def _check_data(self) -> None:
        """Checks that clips consist of whole latents, and batches of whole micro-batches."""
        stride, shapes = self.vae.temporal_stride, self.data.shapes
        for shape in shapes:
            if (shape.frames - 1) % stride:
                raise UsageError(f"data.frames: must be 1 + {stride}k, got {shape.frames}")
        # A codec needs whole hyperlatents, a DiT whole tokens: in latents, then in pixels.
        multiple = PATCH if self.refiner is not None else 1
        multiple = self.vae.stride * (LATENT_MULTIPLE if self.codec is not None else multiple)
        for shape in shapes:
            if any(side < 1 or side % multiple for side in shape.size):
                raise UsageError(
                    f"data.size: must be multiples of {multiple}, got {shape.height} x "
                    f"{shape.width}"
                )
        if self.data.batch % self.optim.accumulate:
            raise UsageError(
                f"data.batch: must be a multiple of optim.accumulate, {self.optim.accumulate}, "
                f"got {self.data.batch}"
            )

    def _check_stage(self) -> None:
        """Checks that the experiment has all that its stage needs."""
        needs = STAGE_NEEDS.get(self.stage, ())
        if "codec" in needs:
            if self.codec is None:
                raise UsageError(f"codec: the stage `{self.stage}` needs one, got None")
            if (self.codec.motion is not None) != ("motion" in needs):
                expected = "blocks" if "motion" in needs else "None"
                raise UsageError(
                    f"codec.motion: must be {expected} in the stage `{self.stage}`, got "
                    f"{self.codec.motion}"
                )
        if "refiner" in needs and self.refiner is None:
            raise UsageError(f"refiner: the stage `{self.stage}` needs one, got None")
        if self.refiner is not None and not self.refiner.dit.context_every:
            raise UsageError(
                "refiner.dit.context_every: must be positive; training needs an adapter"
            )
        if "start" in needs and not self.init.has_codec:
            raise UsageError(
                f"init: the stage `{self.stage}` starts from a codec, give init.run or init.model"
            )
        if "train" in needs and not self.train:
            raise UsageError(f"train: must name what the stage `{self.stage}` trains")
        if self.evaluate.every and self.codec is None:
            raise UsageError(
                f"evaluate.every: the stage `{self.stage}` has no codec to evaluate, use 0"
            )
        if "frames" in needs and self.data.latents is not None:
            raise UsageError(
                f"data.latents: the stage `{self.stage}` needs frames, got {self.data.latents}"
            )

    def latents(self, shape: ClipShape) -> tuple[int, int, int]:
        """Number, height and width of the latents of a clip."""
        height, width = (side // self.vae.stride for side in shape.size)
        return 1 + (shape.frames - 1) // self.vae.temporal_stride, height, width

    def tokens(self, shape: ClipShape) -> int:
        """Number of the refiner's tokens for a clip; 0 without a refiner."""
        return 0 if self.refiner is None else self.refiner.dit.tokens(*self.latents(shape))


def load(path: str | os.PathLike) -> Experiment:
    """Loads the `experiment` that a config file defines, a value or a function without arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        UsageError: If the file does not define an experiment.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: a config file must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "experiment", None)
    # A function puts off what is slow, such as reading the sizes of a model file.
    found = found() if callable(found) else found
    if not isinstance(found, Experiment):
        raise UsageError(f"{path}: defines no `experiment` of type Experiment")
    return found


def override(experiment: Experiment, args: Sequence[str]) -> Experiment:
    """Applies `--group.key value` arguments to an experiment.

    `--mesh data=2,fsdp=4` stands for its parts. A wrong key or type ends the program with a
    message.

    Raises:
        UsageError: If the mesh has other axes, or the settings do not fit each other.
    """
    # tyro knows the axes one by one, as `--mesh.data 2`; the short form is taken out before.
    mesh = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    mesh.add_argument("--mesh")
    known, args = mesh.parse_known_args(args)
    if known.mesh is not None:
        experiment = dataclasses.replace(experiment, mesh=parse_mesh(known.mesh))
    return tyro.cli(
        type(experiment),
        prog="gnvc train --config FILE",
        default=experiment,
        args=list(args),
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
