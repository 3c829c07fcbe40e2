"""Statistics of a VAE's latents: how they are normalised for the codec and whitened for a refiner.

They are a dictionary of float32 arrays, measured once at the start of a run and kept in its
checkpoints:

    mean, std (c,)   normalised latents are (latents - mean) / std
    white (2, c)     factors that whiten the first normalised latent of a clip and the later ones
"""

import os

import jax
import numpy as np

from gnvc_jax.codec.fit import whitening
from gnvc_jax.frames import to_float
from gnvc_jax.porting.checkpoint import has_component, read_architecture
from gnvc_jax.pretrained import find_model
from gnvc_jax.training import inputs
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.run_folder import load_statistics
from gnvc_jax.training.weights import Statistics, load_vae, origins
from gnvc_jax.vae import VAE, encode_clip


def identity_statistics(channels: int) -> Statistics:
    """Statistics that change nothing."""
    return {
        "mean": np.zeros(channels, np.float32),
        "std": np.ones(channels, np.float32),
        "white": np.ones((2, channels), np.float32),
    }


def shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the statistics."""
    return jax.eval_shape(lambda: identity_statistics(experiment.vae.latent_channels))


def measure(experiment: Experiment) -> Statistics:
    """Finds or measures the statistics for a new run.

    A run takes over the statistics of the run or model that it starts from, if that has them, or of
    a ported VAE, whose DiT was trained with them. Latents of a linear VAE are not normalised for
    the codec: the transform keeps distances, so that equal errors in any two channels are equal
    errors of pixels. Everything else is measured on `data.statistics_batches` batches of clips.
    """
    known = origins(experiment.init)
    found = identity_statistics(experiment.vae.latent_channels)
    # What a refiner or codec was trained with must not change, so an earlier run comes first.
    if known.runs:
        kept = load_statistics(known.runs[-1])
        if found.keys() <= kept.keys():
            return kept
    if known.model is not None:
        # Models without a refiner have no whitening, which is then measured.
        model = find_model(known.model)
        if model.white is None:
            found |= measure_latents(experiment)
        else:
            found["white"] = model.white
        found |= {"mean": model.mean, "std": model.std}
    elif known.vae is not None and has_component(known.vae, "vae"):
        ported = read_architecture(known.vae, "vae")
        found |= {"mean": ported.latents_mean, "std": ported.latents_std}
    else:
        found |= measure_latents(experiment)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def of_run(run: str | os.PathLike, experiment: Experiment) -> Statistics:
    """Loads the statistics that a run keeps, see `complete`."""
    return complete(experiment, load_statistics(run))


def complete(experiment: Experiment, statistics: Statistics) -> Statistics:
    """Completes statistics of a run: those that a linear VAE does not need change nothing."""
    known = identity_statistics(experiment.vae.latent_channels) if experiment.vae.linear else {}
    return known | {name: np.asarray(x, np.float32) for name, x in statistics.items()}


def measure_latents(experiment: Experiment) -> Statistics:
    """Measures statistics of the latents of some batches of clips."""
    vae, params = VAE(experiment.vae), load_vae(experiment)
    encode = jax.jit(lambda params, batch: encode_clip(vae, params, to_float(batch)))
    batches = iter(inputs.clips(experiment).batches(experiment.data.shape_at(0)))
    count = experiment.data.statistics_batches
    latents = [np.asarray(encode(params, next(batches))) for _ in range(count)]
    # (clips, t, h, w, c); statistics are those of channels.
    latents, axes = np.concatenate(latents), (0, 1, 2, 3)
    found = {}
    if not experiment.vae.linear:
        found = {"mean": latents.mean(axes), "std": latents.std(axes)}
    scaled = latents / found.get("std", 1.0)
    # The first latent stands for one frame and each later one for four: their spreads differ.
    first, later = scaled[:, :1].var(axes), scaled[:, 1:].var(axes)
    return found | {"white": np.stack([whitening(first), whitening(later)])}
