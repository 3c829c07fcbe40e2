"""Makes the model file of a training run.

    from gnvc_jax.training.release import release
    release("runs/small/codec", "small.safetensors")

A run folder is all it takes: the resolved config says which networks the model has, checkpoints
hold the parameters that the run trained and the statistics of the latents, and the others are kept
beside them. What a run of an earlier version did not train is read from where it started.
"""

import os

import jax

from gnvc_jax import model
from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import as_path
from gnvc_jax.errors import UsageError
from gnvc_jax.model import Model
from gnvc_jax.model_file import save_model
from gnvc_jax.training import latent_statistics, weights
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.networks import init_networks, make_networks
from gnvc_jax.training.run_folder import model_of
from gnvc_jax.training.weights import Statistics


def release(run: str | os.PathLike, out: str | os.PathLike, name: str | None = None) -> Model:
    """Writes the model file of a run.

    Args:
        run: Run folder.
        out: Model file to write.
        name: Name of the model, by default that of the file without its suffix.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If the run, or a source of one of an earlier version, is not there.
        UsageError: If the run trains no codec, or a parameter is nowhere to be found.
        OSError: If the file cannot be written.
    """
    made = build_model(run, as_path(out).stem if name is None else name)
    save_model(out, made)
    return made


def build_model(run: str | os.PathLike, name: str) -> Model:
    """Builds the model of a run in memory.

    The model has the averaged weights of the newest checkpoint, low-rank changes merged.

    Args:
        run: Run folder.
        name: Name of the model.

    Raises:
        FileNotFoundError: If the run, or a source of one of an earlier version, is not there.
        UsageError: If the run trains no codec, or a parameter is nowhere to be found.
    """
    experiment = model_of(run)
    if experiment.codec is None:
        raise UsageError(f"{run}: a run of the stage `{experiment.stage}` has no codec to release")
    # Shapes alone say which parameters the model has; `load` finds them wherever they come from.
    # They are asked for as float32: a model file rounds them, and must not round twice.
    networks = make_networks(experiment)
    shapes = jax.eval_shape(lambda key: init_networks(networks, key), jax.random.key(0))
    statistics = latent_statistics.of_run(run, experiment)
    parts = weights.load(experiment, shapes, statistics)
    weights.check_complete(parts, shapes)
    return model_of_parts(experiment, name, parts, statistics)


def model_of_parts(experiment: Experiment, name: str, parts: Tree, statistics: Statistics) -> Model:
    """Builds a model of all its parameters.

    Args:
        experiment: Experiment; the sizes of its networks and the origin of its text count.
        name: Name of the model.
        parts: Parameters of "vae", "codec" and, if the model is to have one, "refiner".
        statistics: Complete statistics of the latents.
    """
    has_refiner = "refiner" in parts
    assert experiment.codec is not None
    return model.build(
        name,
        experiment.vae,
        experiment.codec,
        parts["vae"],
        parts["codec"],
        statistics["mean"],
        statistics["std"],
        experiment.refiner if has_refiner else None,
        parts.get("refiner"),
        weights.load_text(experiment) if has_refiner else None,
        statistics["white"] if has_refiner else None,
    )
