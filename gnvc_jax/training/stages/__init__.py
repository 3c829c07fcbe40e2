"""Training stages: what is trained, on what, against which loss.

A stage is a record of functions, made from an experiment by the function that its name stands for.
One's own is named "module:function" in the config:

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

The rest of this module is what every stage needs around its loss: the parameters that train
(`init_trained`), where a run starts (`start`), what stays as it is (`frozen`), and the loss as a
function of what trains (`objective`).
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.errors import UsageError
from gnvc_jax.training import lora, partition, weights
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.inputs import Data
from gnvc_jax.training.weights import Statistics

Array = jax.Array
Tree = Any

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
    """What the training loop asks of a stage.

    Attributes:
        experiment: Experiment that it was made from.
        init: Function (key) -> random parameters of the whole model, a nested dictionary by part.
            It is traced, so nothing is read from disk in it.
        loss: Function (params, constants, batch, key, step) -> (scalar loss, dictionary of scalar
            metrics). params: those of the whole model, trained and fixed; key: new in each step;
            step: int32.
        data: Training data.
        trainable: Regular expressions for the paths of the parameters that train; everything by
            default. See `gnvc_jax.training.partition.split`.
        measure: Function () -> what a run learns of its data once, at its start, beside
            parameters. Checkpoints keep it.
        constants: Function (statistics) -> arrays beside parameters that the loss needs;
            statistics: what `measure` gave when the run began.
        constant_shapes: Function () -> the same as shapes, from the configuration alone. Needed
            whenever `constants` is given: the step is also traced before there is data.
        fit: Function (params, statistics) -> the parameters that train, started from data. Called
            for new runs that start from no other run.
        teacher: Patterns of those parameters of which the loss needs the starting values besides:
            `constants["teacher"]` is then a model that has them.
        trip_count: Of a loop in the loss whose length is drawn in each step, on average.
    """

    experiment: Experiment
    init: Callable[[Array], Tree]
    loss: Callable[[Tree, Tree, Tree, Array, Array], tuple[Array, dict[str, Array]]]
    data: Data
    trainable: tuple[str, ...] = partition.EVERYTHING
    measure: Callable[[], Statistics] = dict
    constants: Callable[[Statistics], Tree] = lambda statistics: {}
    constant_shapes: Callable[[], Tree] = dict
    fit: Callable[[Tree, Statistics], Tree] | None = None
    teacher: tuple[str, ...] = ()
    trip_count: float = 1.0


def make_stage(experiment: Experiment) -> Stage:
    """The stage that an experiment names.

    Raises:
        UsageError: There is no stage of that name, or the experiment lacks what it needs.
    """
    module, _, name = STAGES.get(experiment.stage, experiment.stage).partition(":")
    if not name:
        raise UsageError(f"unknown stage {experiment.stage!r}; there are: {', '.join(STAGES)}")
    return getattr(importlib.import_module(module), name)(experiment)


def model_shapes(stage: Stage) -> Tree:
    """All parameters of the model as shapes."""
    return jax.eval_shape(stage.init, jax.random.key(0))


def init_trained(stage: Stage, key: Array) -> Tree:
    """Random values of the parameters that train, low-rank changes included; to be traced."""
    key_model, key_lora = jax.random.split(key)
    params = stage.init(key_model)
    trained, _ = partition.split(params, stage.trainable)
    if rank := stage.experiment.lora:
        trained = trained | {"lora": lora.init(params, rank, key_lora)}
    return trained


def start(stage: Stage, params: Tree, statistics: Statistics) -> Tree:
    """What a new run starts from.

    Args:
        stage: Stage.
        params: Random parameters that train, on their devices.
        statistics: What the stage measured.

    Returns:
        The parameters, with what `experiment.init` names, or what the stage fits to data.
    """
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    params = partition.join(params, weights.load(stage.experiment, wanted, statistics))
    if stage.fit is not None and not stage.experiment.init.has_codec:
        params = stage.fit(params, statistics)
    return params


def fixed_shapes(stage: Stage) -> Tree:
    """Parameters that do not train, as shapes, in the types that they are kept in."""
    _, fixed = partition.split(model_shapes(stage), stage.trainable)
    return weights.kept(fixed, stage.experiment.compute)


def teacher_shapes(stage: Stage) -> Tree:
    """The teacher's own parameters as shapes: those that train; it shares the others."""
    whole = model_shapes(stage)
    trained, _ = partition.split(whole, stage.trainable)
    flat = flatten_dict(partition.split(whole, stage.teacher)[0], sep="/")
    trained = flatten_dict(trained, sep="/")
    own = unflatten_dict({path: x for path, x in flat.items() if path in trained}, sep="/")
    if rank := stage.experiment.lora:
        own["lora"] = lora.shapes(whole, rank)
    return weights.kept(own, stage.experiment.compute)


def frozen(stage: Stage, statistics: Statistics) -> Tree:
    """Everything that the loss needs and that does not train.

    Returns:
        {"fixed": parameters, "constants": see `Stage.constants`} and, for a stage with a teacher,
        {"teacher": its own parameters}.

    Raises:
        UsageError: A parameter is nowhere to be found.
    """
    wanted = weights.on_mesh(fixed_shapes(stage))
    fixed = weights.load(stage.experiment, wanted, statistics)
    weights.check_complete(fixed, wanted)
    found = {"fixed": fixed, "constants": stage.constants(statistics)}
    return found | ({"teacher": load_teacher(stage, statistics)} if stage.teacher else {})


def load_teacher(stage: Stage, statistics: Statistics) -> Tree:
    """The teacher's own parameters: the starting weights."""
    shapes = weights.on_mesh(teacher_shapes(stage))
    wanted: dict[str, Any] = flatten_dict(shapes, sep="/")
    found = flatten_dict(weights.load(stage.experiment, shapes, statistics), sep="/")
    missing = sorted(wanted.keys() - found.keys())
    if any(not path.startswith("lora/") for path in missing):
        raise UsageError(
            f"{stage.experiment.stage}: {stage.experiment.init.run} has no trained refiner to teach"
        )
    # New low-rank changes: the teacher has none.
    found |= {path: jnp.zeros_like(wanted[path]) for path in missing}
    return unflatten_dict(found, sep="/")


def frozen_shapes(stage: Stage) -> Tree:
    """`frozen` as shapes, from the configuration alone: nothing need be there yet."""
    found = {"fixed": fixed_shapes(stage), "constants": stage.constant_shapes()}
    return found | ({"teacher": teacher_shapes(stage)} if stage.teacher else {})


def objective(
    stage: Stage,
) -> Callable[[Tree, Tree, Tree, Array, Array], tuple[Array, dict[str, Array]]]:
    """The loss as a function (trained parameters, frozen, batch, key, step); see `frozen`."""

    def loss(
        params: Tree, frozen: Tree, batch: Tree, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        constants = frozen["constants"]
        if "teacher" in frozen:
            teacher = partition.assemble(frozen["fixed"], frozen["teacher"])
            constants = constants | {"teacher": teacher}
        model = partition.assemble(frozen["fixed"], params)
        return stage.loss(model, constants, batch, key, step)

    return loss
