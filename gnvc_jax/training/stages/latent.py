"""Stage `latent` (stage I): codec and refiner together, on latents."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.errors import UsageError
from gnvc_jax.porting.checkpoint import PROMPT, load_prompt, load_weights, read_architecture
from gnvc_jax.refiner import Refiner, flow, per_latent_factors
from gnvc_jax.training import lora
from gnvc_jax.training.checkpoints import config_of, load_params, load_statistics
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.partition import join, split
from gnvc_jax.training.stages import Tree, on_mesh
from gnvc_jax.training.stages.codec import CodecLoss, CodecStage, Coding
from gnvc_jax.training.stages.vae import init_vae
from gnvc_jax.vae import encode_clip

Array = jax.Array

TAU_MAX = 0.999  # at 1 nothing is left to learn

# Kernels of the layers that compute in `compute.dtype` and `compute.vae.dtype`: where they do not
# train, they are kept in these types. Those of time and of the head stay float32, as their layers.
DIT_KERNELS = r"refiner/(features|dit/(?!time_|head/).+)/kernel"
DECODER_KERNELS = r"vae/(decoder/.+|post_quant)/kernel"


@dataclasses.dataclass(frozen=True)
class LatentLoss(CodecLoss):
    """R + lambda * (refined * E_1 + decoded * E_c) + matching * L_CFM (GNVC-VD, stage I).

    E_1, E_c: mean squared error of refined and of decoded latents, the refined ones estimated in
    one step from the sampled time; L_CFM: that of the velocity; weights: folder of `gnvc port` with
    the DiT, None to train one from scratch; prompt: file of the text condition, by default that of
    the folder, or zeros.
    """

    refined: float = 1.0
    decoded: float = 0.1
    matching: float = 1.0
    weights: str | None = None
    prompt: str | None = None


class LatentStage(CodecStage):
    """Starts from a codec that was trained alone.

    The model has the parts "vae", "codec" and, if configured, "refiner"; `experiment.train` says
    which parameters train. Each comes from the last of these that has it: random initialisation
    (only where it trains), `loss.vae`, `loss.weights`, the runs that `init_from` came from, itself.
    """

    needs_refiner = True

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        if experiment.init_from is None:
            raise UsageError(
                f"init_from: the stage `{experiment.stage}` starts from a run of the stage `codec`"
            )
        if not experiment.train:
            raise UsageError(f"train: say what the stage `{experiment.stage}` trains")
        if self.needs_refiner and experiment.refiner is None:
            raise UsageError(f"refiner: the stage `{experiment.stage}` trains one, name its sizes")
        compute, self.refiner = experiment.compute, None
        if experiment.refiner is not None:
            self.refiner = Refiner(
                experiment.refiner,
                compute.jax_dtype,
                compute.attention,
                compute.remat,
                compute.precision,
            )

    def measure(self) -> dict[str, np.ndarray]:
        """As the run that this one starts from has it."""
        return load_statistics(self.experiment.init_from) or super().measure()

    def init_parts(self, key: Array) -> Tree:
        """All parameters, at random."""
        key_vae, key_codec, key_refiner = jax.random.split(key, 3)
        parts = {"vae": init_vae(self.vae, key_vae), "codec": super().init(key_codec)}
        if self.refiner is not None:
            cfg = self.experiment.refiner
            b, t, h, w = 1, 1, 2, 2
            latents = jnp.zeros((b, t, h, w, cfg.dit.channels))
            features = jnp.zeros((b, t, h, w, cfg.features))
            text = jnp.zeros((b, 1, cfg.dit.text_width)) if cfg.dit.text_length else None
            one = jnp.zeros((b,))
            inputs = latents, one, latents, features, one.astype(jnp.int32), text
            parts["refiner"] = self.refiner.init(key_refiner, *inputs)["params"]
        return parts

    @functools.cached_property
    def shapes(self) -> Tree:
        """All parameters as shapes."""
        return jax.eval_shape(self.init_parts, jax.random.key(0))

    def init(self, key: Array) -> Tree:
        key_parts, key_lora = jax.random.split(key)
        parts = self.init_parts(key_parts)
        chosen, _ = split(parts, self.experiment.train)
        return chosen | self.low_rank(parts, self.experiment.lora, key_lora)

    def low_rank(self, parts: Tree, rank: int, key: Array) -> Tree:
        """{"lora": its parameters at random}, nothing for rank 0."""
        return {"lora": lora.init(parts, rank, key)} if rank else {}

    @property
    def fixed(self) -> Tree:
        """Parameters that do not train, as shapes, in the types that they are kept in."""
        return self.kept(split(self.shapes, self.experiment.train)[1])

    def kept(self, shapes: Tree) -> Tree:
        """Shapes in the types of parameters that do not train: what their layers compute in."""
        compute = self.experiment.compute
        kernels = {DIT_KERNELS: compute.jax_dtype, DECODER_KERNELS: compute.vae.jax_dtype}

        def one(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            found = [dtype for pattern, dtype in kernels.items() if re.fullmatch(pattern, path)]
            return x.update(dtype=found[0]) if found else x

        flat = flatten_dict(shapes, sep="/")
        return unflatten_dict({path: one(path, x) for path, x in flat.items()}, sep="/")

    def load(self, wanted: Tree) -> Tree:
        """What ported folders and other runs have of some parameters.

        wanted: their shapes, each with the type and, if it has one, the sharding to read it in.
        Nothing else is read, and each process reads its own part. Shapes without a sharding become
        NumPy arrays.
        """
        runs = ancestry(self.experiment.init_from)
        like = wanted
        if any(config_of(run).get("lora") for run in runs):  # changes are added to exact kernels
            like = jax.tree.map(lambda x: x.update(dtype=jnp.float32), wanted)
        found = self.ported(like)
        for run in runs:
            found = self.overlaid(found, run, like)

        def finished(x: Array | np.ndarray, like: jax.ShapeDtypeStruct) -> Array | np.ndarray:
            x = x.astype(like.dtype)
            return x if like.sharding is None else jax.device_put(x, like.sharding)

        found, flat = flatten_dict(found, sep="/"), flatten_dict(wanted, sep="/")
        known = {path: finished(found[path], x) for path, x in flat.items() if path in found}
        return unflatten_dict(known, sep="/")

    def ported(self, like: Tree) -> Tree:
        """What the folders `loss.vae` and `loss.weights` have."""
        found, weights = {}, self.experiment.loss.weights
        refiner = like.get("refiner", {})
        if "vae" in like:
            found["vae"] = self.load_vae()
        if weights and self.refiner is not None:
            config = read_architecture(weights, "dit").config
            if config != self.experiment.refiner.dit:
                raise UsageError(
                    f"{weights}: holds {config}, the refiner is {self.experiment.refiner.dit}"
                )
            if "dit" in refiner:
                found["refiner"] = {"dit": load_weights(weights, "dit", wanted=refiner["dit"])[1]}
        if "grey" in refiner:
            found = join(found, {"refiner": {"grey": self.grey()}})
        return found

    def overlaid(self, found: Tree, run: str, like: Tree) -> Tree:
        """What is found so far, replaced by what a run has of it."""
        config = config_of(run)
        if config["stage"] == "codec":
            codec = like.get("codec", {})
            loaded = load_params(run, codec, partial=True) if codec else {}
            if missing := sorted(
                flatten_dict(codec, sep="/").keys() - flatten_dict(loaded, sep="/")
            ):
                raise UsageError(f"{run}: has no parameter {missing[0]} of the codec")
            return join(found, {"codec": loaded})
        rank = config.get("lora", 0)
        goes_on = rank == self.experiment.lora and run == self.experiment.init_from
        if rank and not goes_on:
            kernels = {"refiner": like.get("refiner", {})}
            changes = lora.shapes(kernels, rank)
            found = join(found, load_params(run, like | {"lora": on_mesh(changes)}, partial=True))
            return merged(found)
        return join(found, load_params(run, like, partial=True))

    def grey(self) -> np.ndarray:
        """Whitened latents (2, c) of a grey clip: the first one, and one that follows."""
        known = super().frozen()
        side, frames = 8 * self.vae.config.stride, 1 + 3 * self.vae.config.temporal_stride
        latents = encode_clip(self.vae, known["vae"], jnp.zeros((1, frames, side, side, 3)))
        latents = (np.asarray(latents) - known["mean"]) / known["std"]
        return latents[0, [0, -1], 4, 4] * known["white"]

    def warm_start(self, params: Tree) -> Tree:
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        return join(params, self.load(wanted))

    def frozen(self) -> Tree:
        """Statistics of latents, text, and "fixed": the parameters that do not train.

        Raises UsageError if one of these is nowhere to be found.
        """
        fixed = on_mesh(self.fixed)
        found = self.load(fixed)
        known, wanted = flatten_dict(found, sep="/"), flatten_dict(fixed, sep="/")
        if missing := sorted(wanted.keys() - known.keys()):
            raise UsageError(
                f"{len(missing)} parameters neither train nor come from a run or ported folder, "
                f"{missing[0]} is the first"
            )
        return {**self.statistics, "fixed": found, "text": self.text()}

    def frozen_shapes(self) -> Tree:
        rest, text = super().frozen_shapes(), None
        del rest["vae"]
        if self.refiner is not None and self.experiment.refiner.dit.text_length:
            config = self.experiment.refiner.dit
            text = jax.ShapeDtypeStruct((1, config.text_length, config.text_width), jnp.float32)
        return rest | {"fixed": self.fixed, "text": text}

    def text(self) -> np.ndarray | None:
        """The text condition (1, rows, width), None for a refiner without text."""
        if self.refiner is None or not self.experiment.refiner.dit.text_length:
            return None
        config, loss = self.experiment.refiner.dit, self.experiment.loss
        path = loss.prompt
        if path is None and loss.weights and (kept := Path(loss.weights) / PROMPT).is_file():
            path = kept
        if path is None:
            return np.zeros((1, 1, config.text_width), np.float32)
        return load_prompt(path, config)

    def model_parts(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        return merged(join(frozen["fixed"], params))

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3), h and w multiples of 64, or latents of such clips."""
        weights, start = self.experiment.loss, self.experiment.refiner.start
        key_code, key_time, key_noise, key_window = jax.random.split(key, 4)
        parts = self.model_parts(params, frozen)
        done = self.code(parts["codec"], frozen | {"vae": parts["vae"]}, batch, key_code)
        window = self.window(frozen["white"], done, key_window)
        clean, decoded = window.of(done.latents), window.of(done.coded.latent)
        noise = jax.random.normal(key_noise, clean.shape)
        tau = jax.random.uniform(key_time, clean.shape[:1], jnp.float32, start, TAU_MAX)
        time = tau[:, None, None, None, None]
        state = flow.path_state(clean, decoded, noise, time, start)
        target = jax.lax.stop_gradient(flow.path_velocity(clean, decoded, noise, start))
        velocity = self.velocity(parts, frozen, state, tau, decoded, window.features, done.q_index)
        matching = per_clip((velocity - target) ** 2)
        error = window.unwhitened(flow.clean_estimate(state, velocity, time) - clean)
        refined = per_clip(error**2)
        loss = self.weighted(done, weights.refined * refined + weights.decoded * done.error)
        metrics = {"flow": matching.mean(), "refined": refined.mean()}
        return loss + weights.matching * matching.mean(), done.metrics | metrics

    def window(self, white: Array, done: Coding, key: Array) -> "Window":
        """A window of latents to refine, at a random place of the group.

        In use all windows but the first begin inside a group, without an intra latent; so clips are
        one latent longer than what is refined of them.
        """
        count = done.latents.shape[1]
        size = min(self.experiment.refiner.window, max(1, count - 1))
        first = jax.random.randint(key, (), 0, count - size + 1)
        return Window(first, size, per_latent_factors(white, count), done.coded.feature)

    def velocity(
        self,
        parts: Tree,
        frozen: Tree,
        state: Array,
        tau: Array,
        decoded: Array,
        features: Array,
        q_index: Array,
    ) -> Array:
        """The refiner's velocity of a window of latents; tau, q_index (b,)."""
        text = frozen["text"]
        if text is not None:
            text = jnp.broadcast_to(text, (state.shape[0], *text.shape[1:]))
        inputs = decoded, features, q_index, text
        return self.refiner.apply({"params": parts["refiner"]}, state, tau, *inputs)


@dataclasses.dataclass(frozen=True)
class Window:
    """Latents of a group that are refined together, whitened.

    Attributes:
      first, size: place in the group (traced) and number of latents.
      white: (t, 1, 1, c) factors of all latents of the group.
      group_features: (b, t, h, w, f).
    """

    first: Array
    size: int
    white: Array
    group_features: Array

    def cut(self, x: Array, axis: int = 1) -> Array:
        """The window's part of an array with an axis of latents."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size, axis)

    def of(self, latents: Array) -> Array:
        """Whitened latents of the window, from those of the group (b, t, h, w, c)."""
        return self.cut(latents * self.white)

    def unwhitened(self, latents: Array) -> Array:
        """Undoes the whitening of latents of the window."""
        return latents / self.cut(self.white, 0)

    def put(self, group: Array, latents: Array) -> Array:
        """Latents of the group with those of the window, whitened, in their place."""
        return jax.lax.dynamic_update_slice_in_dim(group, self.unwhitened(latents), self.first, 1)

    @property
    def features(self) -> Array:
        return self.cut(self.group_features)


def merged(parts: Tree) -> Tree:
    """The parts without "lora", whose changes are in the kernels."""
    parts = dict(parts)
    changes = parts.pop("lora", None)
    return parts if changes is None else lora.merge(parts, changes)


def ancestry(run: str) -> list[str]:
    """A run and those that it started from, oldest first, back to one of the stage `codec`.

    Raises UsageError if it leads back to a run that was there already.
    """
    runs = [run]
    while (config := config_of(runs[0]))["stage"] != "codec" and config.get("init_from"):
        if config["init_from"] in runs:
            raise UsageError(f"{runs[0]}: its init_from leads back to {config['init_from']}")
        runs = [config["init_from"], *runs]
    return runs


def per_clip(x: Array) -> Array:
    """Mean over all axes but the first."""
    return x.mean(tuple(range(1, x.ndim)))
