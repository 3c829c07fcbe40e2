"""The networks of an experiment and their random parameters.

Parameters of a model are a tree by part, {"vae": ..., "codec": ..., "refiner": ...}; networks are
Flax modules, which hold sizes and how to compute, and no arrays.
"""

from typing import Any, NamedTuple

import jax

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.codec.model import LatentCodec, init_codec
from gnvc_jax.refiner import Refiner, init_refiner
from gnvc_jax.training.config import Experiment
from gnvc_jax.vae import VAE, init_vae


class Networks(NamedTuple):
    """The networks of a model; None for those that it does not have.

    They are annotated as Any because what `apply` returns depends on the method that it is given.

    Attributes:
        vae: The VAE, `gnvc_jax.vae.VAE`.
        codec: The codec, `gnvc_jax.codec.model.LatentCodec`, or None.
        refiner: The refiner, `gnvc_jax.refiner.Refiner`, or None.
    """

    vae: Any
    codec: Any
    refiner: Any


def make_networks(experiment: Experiment) -> Networks:
    """Makes the networks of an experiment, which compute as `experiment.compute` says."""
    compute, vae, refiner = experiment.compute, experiment.compute.vae, None
    if experiment.refiner is not None:
        refiner = Refiner(
            experiment.refiner,
            compute.jax_dtype,
            compute.attention,
            compute.remat,
            compute.precision,
        )
    return Networks(
        VAE(experiment.vae, vae.remat == "full", vae.jax_dtype, vae.precision),
        None if experiment.codec is None else LatentCodec(experiment.codec),
        refiner,
    )


def init_networks(networks: Networks, key: Array) -> Tree:
    """Draws random parameters of all networks, by part."""
    # Three keys in any case: a part has the same values whether or not there are others.
    key_vae, key_codec, key_refiner = jax.random.split(key, 3)
    parts = {"vae": init_vae(networks.vae, key_vae)}
    if networks.codec is not None:
        parts["codec"] = init_codec(networks.codec, key_codec)
    if networks.refiner is not None:
        parts["refiner"] = init_refiner(networks.refiner, key_refiner)
    return parts
