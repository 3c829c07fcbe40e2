"""A refiner of normalised latents, from a model, a run, or a DiT that was not trained for one.

`load_refiner` returns a `PretrainedRefiner`. Its `refine` takes the decoded latents of a group to
better ones; `velocity` is the network alone, at one state of the flow, for samplers and losses of
your own. The network is `gnvc_jax.refiner.Refiner`, the equations are in `gnvc_jax.refiner.flow`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key

from gnvc_jax.api.vae import load_vae
from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.buckets import as_path
from gnvc_jax.errors import UsageError
from gnvc_jax.model import as_float32
from gnvc_jax.porting.checkpoint import (
    PROMPT,
    has_component,
    load_prompt,
    load_weights,
    read_architecture,
    refuse_other_components,
)
from gnvc_jax.pretrained import find_model, is_run
from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig, init_refiner, refine
from gnvc_jax.refiner.config import PATCH
from gnvc_jax.vae import VAE, grey_latents


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedRefiner:
    """A diffusion refiner of normalised latents.

    Attributes:
        config: Sizes.
        params: Parameters of `gnvc_jax.refiner.Refiner`.
        text: Text condition (1, rows, width), None for a refiner without one.
        white: Factors (2, c) that whiten the first and the later latents, see
            `gnvc_jax.refiner.per_latent_factors`; None if latents are refined as they are.
        dtype: Type of matrix products and attention.
    """

    config: RefinerConfig
    params: Tree
    text: np.ndarray | None = None
    white: np.ndarray | None = None
    dtype: jax.typing.DTypeLike = jnp.float32

    @functools.cached_property
    def _velocity(self) -> Callable[..., Array]:
        # The text is a constant of the program, since it is the same for every video.
        refiner = Refiner(self.config, jnp.dtype(self.dtype))

        def velocity(params: Tree, *inputs: Array) -> Array:
            return cast(Array, refiner.apply({"params": params}, *inputs, self.text))

        return jax.jit(velocity)

    def velocity(
        self,
        state: Float[AnyArray, "b t h w c"],
        tau: Float[AnyArray, " b"],
        decoded: Float[AnyArray, "b t h w c"],
        features: Float[AnyArray, "b t h w f"],
        q_index: Int[AnyArray, "b t"],
    ) -> Float[Array, "b t h w c"]:
        """Velocity of the flow, data minus noise; see `gnvc_jax.refiner.Refiner`.

        Args:
            state: State of the flow at time `tau`, whitened: normalised latents times `white`.
            tau: Flow time, 0 for noise and 1 for data.
            decoded: Decoded latents, whitened.
            features: Features of the codec.
            q_index: Quality levels of the latents, 0 (worst) to 63.
        """
        return self._velocity(self.params, state, tau, decoded, features, q_index)

    def refine(
        self,
        decoded: Float[AnyArray, "b t h w c"],
        features: Float[AnyArray, "b t h w f"] | None = None,
        q_index: Int[AnyArray, "*t"] | int = 0,
        steps: int | None = None,
        seed: int = 0,
    ) -> Float[Array, "b t h w c"]:
        """Refines decoded latents of one group, in overlapping windows if it is long.

        Args:
            decoded: Normalised latents as a codec decodes them, h and w even.
            features: Features of the codec; None for zeros.
            q_index: Quality level that the latents were coded at, 0 (worst) to 63, which is
                63 - qp: one for all, or one for each latent.
            steps: Steps of the flow, None for what the refiner was trained for; with 0, the latents
                are returned as they are.
            seed: Seed of the noise.

        Returns:
            Refined latents, normalised in the same way as the input.

        Raises:
            UsageError: If the latents or features have another number of axes or channels, or
                sides that do not divide into patches.
        """
        shape, channels = np.shape(decoded), self.config.dit.channels
        if len(shape) != 5 or shape[-1] != channels or any(side % PATCH for side in shape[2:4]):
            raise UsageError(
                f"latents are {shape}, expected (b, t, h, w, {channels}) with even h and w"
            )
        # (b, t, h, w, f): features lie on the grid of the latents.
        given = (*shape[:-1], self.config.features)
        if features is None:
            features = jnp.zeros(given)
        elif np.shape(features) != given:
            raise UsageError(f"features are {np.shape(features)}, expected {given}")

        def velocity(state: Array, tau: Array, *conditions: Array) -> Array:
            # The sampler has one time for all clips, the network takes one for each.
            return self.velocity(state, jnp.full(len(state), tau), *conditions)

        steps = self.config.steps if steps is None else steps
        levels = jnp.broadcast_to(jnp.asarray(q_index), shape[:2])
        key = jax.random.key(seed)
        return refine(velocity, self.config, decoded, features, levels, key, steps, self.white)


def load_refiner(
    path: str | Path,
    *,
    features: int = 256,
    context_every: int = 2,
    dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
) -> PretrainedRefiner:
    """Loads a refiner from a model, or makes one from a ported DiT.

    A ported DiT knows nothing of a codec. What it lacks is initialised so that its velocity is
    unchanged at first: the conditions on features and quality are zero, and so is the output of the
    context blocks of a DiT without VACE's adapter. VACE's adapter also sees the latents of a grey
    clip; they come from the VAE in the same folder, and are zero if there is none.

    Args:
        path: Name of a shipped model, model file, run folder, or folder of `gnvc port` with a DiT.
        features: Channels of the codec's features, for a ported DiT.
        context_every: Blocks per new context block, for a ported DiT without an adapter; 0 for no
            context blocks. The DiT then sees decoded latents only in the state that refinement
            begins with.
        dtype: Type of matrix products and attention.
        seed: Seed of new parameters.

    Raises:
        FileNotFoundError: If there is none of these.
        UsageError: If the model has no refiner, or sizes do not fit.
        PortError, ModelCorrupt: If the files are damaged.
    """
    if has_component(path, "dit"):
        return _refiner_of_ported_dit(path, features, context_every, dtype, seed)
    refuse_other_components(path, "dit")
    if is_run(path):
        found = _refiner_of_run(path, dtype)
    else:
        model = find_model(path)
        params = as_float32(model.refiner)
        given = params, model.text, model.white, dtype
        found = model.refiner_config and PretrainedRefiner(model.refiner_config, *given)
    if found is None:
        raise UsageError(
            f"{path}: this model has no refiner; use one that has, or a folder of `gnvc port` with "
            "a DiT"
        )
    return found


def _refiner_of_run(path: str | Path, dtype: jax.typing.DTypeLike) -> PretrainedRefiner | None:
    """Loads the refiner of a run and of those it started from, None if there is none.

    Unlike that of a model file, it is not rounded.
    """
    # Imported here: coding with a model file does not need the training code.
    from gnvc_jax.training import latent_statistics, weights
    from gnvc_jax.training.run_folder import model_of

    experiment = model_of(path)
    if experiment.refiner is None:
        return None
    refiner = Refiner(experiment.refiner)
    shapes = jax.eval_shape(lambda key: init_refiner(refiner, key), jax.random.key(0))
    statistics = latent_statistics.of_run(path, experiment)
    found = weights.load(experiment, {"refiner": shapes}, statistics)
    weights.check_complete(found, {"refiner": shapes})
    text = weights.load_text(experiment)
    white = statistics["white"]
    return PretrainedRefiner(experiment.refiner, found["refiner"], text, white, dtype)


def _refiner_of_ported_dit(
    path: str | Path, features: int, context_every: int, dtype: jax.typing.DTypeLike, seed: int
) -> PretrainedRefiner:
    """Makes a refiner of a ported DiT, see `load_refiner`."""
    dit = read_architecture(path, "dit").config
    assert isinstance(dit, DiTConfig)
    if context_every and not dit.context_every:
        # The new blocks see decoded latents, which have as many channels.
        new = {"context_every": context_every, "context_channels": dit.channels}
        dit = dataclasses.replace(dit, **new)
    # VACE's context layout is recognised by its number of channels, see `RefinerConfig`.
    config = RefinerConfig(dit, features=features)
    # Ported parameters stay NumPy arrays: nothing is copied to a device before it is used.
    known = {f"dit/{k}": x for k, x in flatten_dict(load_weights(path, "dit")[1], sep="/").items()}
    if config.vace_layout and has_component(path, "vae"):
        # What VACE was given in place of pixels to generate: mid-grey, encoded and normalised.
        vae = load_vae(path)
        grey = grey_latents(VAE(vae.config), vae.params)
        known["grey"] = (grey - vae.mean) / vae.std
    known |= _new_parameters(config, set(known), jax.random.key(seed))
    text = None
    if dit.text_length:
        kept = as_path(path) / PROMPT
        # One row of zeros: attention needs at least one.
        no_text = np.zeros((1, 1, dit.text_width), np.float32)
        text = load_prompt(kept, dit) if kept.is_file() else no_text
    return PretrainedRefiner(config, unflatten_dict(known, sep="/"), text, None, dtype)


def _new_parameters(config: RefinerConfig, known: set[str], key: Key[Array, ""]) -> dict[str, Any]:
    """Draws parameters of a refiner by path, without those that are known."""

    @jax.jit
    def init(key: Array) -> dict[str, Any]:
        params = flatten_dict(init_refiner(Refiner(config), key), sep="/")
        # The compiler drops what is not returned, so a DiT never exists twice in memory.
        return {path: x for path, x in params.items() if path not in known}

    return init(key)
