"""Training stages: what is trained, on what data, against which loss.

A stage is a record of functions, made from an experiment by the function that its name stands for.
Your own stage is named "module:function" in the config:

    def my_stage(experiment: Experiment) -> Stage:
        networks = make_networks(experiment)

        def loss(params, constants, batch, key, step):
            ...
            return losses.squared_error(output, video).mean(), {"psnr": ...}

        return Stage(
            experiment,
            init=lambda key: init_networks(networks, key),
            loss=loss,
            data=inputs.clips(experiment),
            trainable=("codec/",),
        )

The rest of this module is common to all stages: the parameters that train (`init_trained`), their
values at the start of a run (`start`), everything that stays as it is (`frozen`), and the loss as a
function of the parameters that train (`objective`).
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.training import fixed_parameters, lora, partition, weights
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.inputs import Data
from gnvc_jax.training.levels import Metric
from gnvc_jax.training.weights import Statistics

# Resolved on first use, so that one stage does not import the networks of the others.
STAGES = {
    "vae": "gnvc_jax.training.stages.vae:vae_stage",
    "transform": "gnvc_jax.training.stages.transform:transform_stage",
    "refine": "gnvc_jax.training.stages.refine:refine_stage",
    "codec": "gnvc_jax.training.stages.codec:codec_stage",
    "latent": "gnvc_jax.training.stages.latent:latent_stage",
    "pixel": "gnvc_jax.training.stages.pixel:pixel_stage",
    "distill": "gnvc_jax.training.stages.pixel:distill_stage",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage as the training loop sees it.

    Attributes:
        experiment: Experiment that the stage was made from.
        init: Function (key) -> random parameters of the whole model, a nested dictionary by part.
            It is traced, so nothing is read from disk in it.
        loss: Function (params, constants, batch, key, step) -> (scalar loss, dictionary of metrics:
            scalars, or sums by quality level as `gnvc_jax.training.levels.by_level` makes them).
            `params` are those of the whole model, trained and fixed; `key` is new in each step;
            `step` is an int32.
        data: Training data.
        trainable: Regular expressions for the paths of the parameters that train; everything by
            default. See `gnvc_jax.training.partition.split`.
        measure: Function () -> statistics of the data, which a run measures once, at its start.
            Checkpoints keep them.
        constants: Function (statistics) -> arrays beside parameters that the loss needs, from the
            statistics that were measured when the run began.
        constant_shapes: Function () -> shapes of the constants, from the configuration alone. It is
            needed whenever `constants` is given: the step is also traced before there is data.
        fit: Function (params, statistics) -> the parameters that train, started from data. It is
            called for new runs that start from no other run.
        teacher: Patterns of parameters whose starting values the loss needs, too:
            `constants["teacher"]` is then a model that has them.
        trip_count: Average length of a loop in the loss whose length is drawn in each step.
    """

    experiment: Experiment
    init: Callable[[Array], Tree]
    loss: Callable[[Tree, Tree, Tree, Array, Array], tuple[Array, Mapping[str, Metric]]]
    data: Data
    trainable: tuple[str, ...] = partition.EVERYTHING
    measure: Callable[[], Statistics] = dict
    constants: Callable[[Statistics], Tree] = lambda statistics: {}
    constant_shapes: Callable[[], Tree] = dict
    fit: Callable[[Tree, Statistics], Tree] | None = None
    teacher: tuple[str, ...] = ()
    trip_count: float = 1.0


def make_stage(experiment: Experiment) -> Stage:
    """Makes the stage that an experiment names.

    Raises:
        UsageError: If there is no stage of that name, or the experiment lacks what it needs.
    """
    module, _, name = STAGES.get(experiment.stage, experiment.stage).partition(":")
    if not name:
        raise UsageError(f"unknown stage {experiment.stage!r}; there are: {', '.join(STAGES)}")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"stage {experiment.stage!r}: {error}") from error
    return make(experiment)


def model_shapes(stage: Stage) -> Tree:
    """Shapes of all parameters of the model."""
    return jax.eval_shape(stage.init, jax.random.key(0))


def init_trained(stage: Stage, key: Array) -> Tree:
    """Draws the parameters that train, low-rank changes included; to be traced."""
    key_model, key_lora = jax.random.split(key)
    # All of the model is drawn, so that a parameter does not depend on what else trains. Under
    # `jit` the compiler leaves out what is then dropped.
    params = stage.init(key_model)
    trained, _ = partition.split(params, stage.trainable)
    if rank := stage.experiment.lora:
        trained = trained | {"lora": lora.init(params, rank, key_lora)}
    return trained


def start(stage: Stage, params: Tree, statistics: Statistics) -> Tree:
    """Replaces random parameters by those that a new run starts from.

    Args:
        stage: Stage.
        params: Random parameters that train, on their devices.
        statistics: Statistics that the stage measured.

    Returns:
        The parameters from the sources that `experiment.init` names, or as the stage fits them to
        data; random ones where there is neither.
    """
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    # Random parameters stay where there is no source.
    params = partition.join(params, weights.load(stage.experiment, wanted, statistics))
    if stage.fit is not None and not stage.experiment.init.has_codec:
        params = stage.fit(params, statistics)
    return params


def fixed_shapes(stage: Stage) -> Tree:
    """Shapes of the parameters that do not train, in the types that they are kept in."""
    _, fixed = partition.split(model_shapes(stage), stage.trainable)
    return weights.kept(fixed, stage.experiment.compute)


def stored_shapes(stage: Stage) -> Tree:
    """Shapes of the parameters that do not train, in the types that the run's folder has."""
    _, fixed = partition.split(model_shapes(stage), stage.trainable)
    return weights.stored(fixed, stage.experiment.compute)


def teacher_shapes(stage: Stage) -> Tree:
    """Shapes of the teacher's own parameters: those that train; it shares the others."""
    whole = model_shapes(stage)
    trained, _ = partition.split(whole, stage.trainable)
    # Parts of the teacher that do not train are the student's as well, and in memory once.
    flat = flatten_dict(partition.split(whole, stage.teacher)[0], sep="/")
    trained = flatten_dict(trained, sep="/")
    own = unflatten_dict({path: x for path, x in flat.items() if path in trained}, sep="/")
    if rank := stage.experiment.lora:
        own["lora"] = lora.shapes(whole, rank)
    return weights.kept(own, stage.experiment.compute)


def frozen(stage: Stage, statistics: Statistics) -> Tree:
    """Loads everything that the loss needs and that does not train.

    Returns:
        A dictionary of "fixed", the parameters that do not train, "constants" (see
        `Stage.constants`) and, for a stage with a teacher, "teacher", its own parameters.

    Raises:
        UsageError: If a parameter is nowhere to be found.
    """
    wanted = weights.on_mesh(fixed_shapes(stage))
    fixed = weights.load(stage.experiment, wanted, statistics)
    weights.check_complete(fixed, wanted)
    found = {"fixed": fixed, "constants": stage.constants(statistics)}
    return found | ({"teacher": load_teacher(stage, statistics)} if stage.teacher else {})


def load_teacher(stage: Stage, statistics: Statistics) -> Tree:
    """Loads the teacher's own parameters, the starting weights."""
    shapes = weights.on_mesh(teacher_shapes(stage))
    wanted: dict[str, Any] = flatten_dict(shapes, sep="/")
    if (kept := fixed_parameters.find(stage.experiment.run.out)) is not None:  # resumed
        found = fixed_parameters.load(kept, shapes, "teacher")
    else:
        found = weights.load(stage.experiment, shapes, statistics)
    found = flatten_dict(found, sep="/")
    missing = sorted(wanted.keys() - found.keys())
    if any(not path.startswith("lora/") for path in missing):
        raise UsageError(
            f"{stage.experiment.stage}: {stage.experiment.init.run} has no trained refiner to teach"
        )
    # New low-rank changes: the teacher has none.
    found |= {path: jnp.zeros_like(wanted[path]) for path in missing}
    return unflatten_dict(found, sep="/")


def keep(stage: Stage, statistics: Statistics) -> None:
    """Writes what does not train into the folder of a new run, which then has the whole model.

    Raises:
        UsageError: If a parameter is nowhere to be found.
    """
    experiment, model = stage.experiment, model_shapes(stage)
    wanted = weights.on_mesh(stored_shapes(stage))
    trees = {"fixed": weights.load(experiment, wanted, statistics)}
    weights.check_complete(trees["fixed"], wanted)
    if stage.teacher:
        trees["teacher"] = load_teacher(stage, statistics)
    text = weights.load_text(experiment) if "refiner" in model else None
    known = weights.origins(experiment.init)
    sources = {name: getattr(known, name) for name in ("vae", "dit", "prompt", "model")}
    fixed_parameters.save(experiment.run.out, trees, text, sources)


def frozen_shapes(stage: Stage) -> Tree:
    """Shapes of what `frozen` loads, from the configuration alone: nothing need be there yet."""
    found = {"fixed": fixed_shapes(stage), "constants": stage.constant_shapes()}
    return found | ({"teacher": teacher_shapes(stage)} if stage.teacher else {})


def objective(
    stage: Stage,
) -> Callable[[Tree, Tree, Tree, Array, Array], tuple[Array, Mapping[str, Metric]]]:
    """Makes the loss a function of (trained parameters, frozen, batch, key, step)."""

    def loss(
        params: Tree, frozen: Tree, batch: Tree, key: Array, step: Array
    ) -> tuple[Array, Mapping[str, Metric]]:
        constants = frozen["constants"]
        if "teacher" in frozen:
            teacher = partition.assemble(frozen["fixed"], frozen["teacher"])
            constants = constants | {"teacher": teacher}
        # Frozen arrays are an argument: closed over, they would be constants of the compiled
        # program. Gradients are those of the first argument alone.
        model = partition.assemble(frozen["fixed"], params)
        return stage.loss(model, constants, batch, key, step)

    return loss
