"""Starting weights of a run, from all the sources that `InitConfig` describes.

Each parameter of a model comes from the last of these that has it:

1. random initialisation, only where it trains;
2. the ported VAE `init.vae`, or that of a run of the stage `vae` or of a model file;
3. the ported DiT `init.dit`;
4. the model file `init.model`, but for its VAE if `init.vae` is given;
5. what the run `init.run` did not train itself, from its folder, but for VAE or DiT if `init.vae`
   or `init.dit` is given;
6. the averaged weights of the run `init.run`.

A run folder has the whole model: checkpoints have what trains, and `fixed_parameters` the rest, so
that the sources of a run need not exist any more. Folders of earlier versions have checkpoints
only; `origins` follows them to the runs that they started from, and a source that such a run does
not name is the one of the run before it. Only what is asked for is read: `load` takes shapes, with
the types and shardings to read them in.
"""

import dataclasses
import logging
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.buckets import AnyPath, as_path
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import shardings
from gnvc_jax.porting.checkpoint import (
    PROMPT,
    has_component,
    load_prompt,
    load_weights,
    read_architecture,
)
from gnvc_jax.pretrained import find_model, is_run
from gnvc_jax.refiner.config import DiTConfig
from gnvc_jax.training import fixed_parameters, lora
from gnvc_jax.training.config import ComputeConfig, Experiment, InitConfig, flatten
from gnvc_jax.training.partition import join
from gnvc_jax.training.run_folder import averaged_names, config_of, load_params
from gnvc_jax.vae import VAE, grey_latents, init_vae

log = logging.getLogger(__name__)

Statistics = dict[str, np.ndarray]

# Kernels of the layers that compute in `compute.dtype` and `compute.vae.dtype`: where they do not
# train, they are kept in these types. Those of time and of the head stay float32, as their layers.
DIT_KERNELS = r"refiner/(features|dit/(?!time_|head/).+)/kernel"
DECODER_KERNELS = r"vae/(decoder/.+|post_quant)/kernel"


class Origins(NamedTuple):
    """Folders and runs that starting weights come from.

    Attributes:
        vae, dit, prompt, model: Sources as in `InitConfig`.
        runs: Run folders, oldest first.
        fixed: Folder in which the oldest of these runs, or a resumed run itself, keeps what it did
            not train (see `gnvc_jax.training.fixed_parameters`); None for older run folders.
        replaced: Those of "vae", "dit" and "prompt" that later runs name, in place of what `fixed`
            has of them.
    """

    vae: str | None
    dit: str | None
    prompt: str | None
    model: str | None
    runs: tuple[str, ...]
    fixed: AnyPath | None
    replaced: frozenset[str]


def origins(init: InitConfig, out: str | None = None) -> Origins:
    """Follows a run to those that it started from, up to one that keeps the whole model.

    Args:
        init: Sources that a run names.
        out: Folder of the run itself. If it is resumed, all comes from there.

    Raises:
        FileNotFoundError: If a run is not there.
        UsageError: If a run leads back to itself.
    """
    named, runs, replaced = init, [], frozenset()
    fixed = None if out is None else fixed_parameters.find(out)
    if fixed is not None:
        named = init = fixed_parameters.load_sources(fixed)
    # Newest run first; a source that it leaves open is that of the run before.
    while fixed is None and init.run is not None:
        if init.run in runs:
            raise UsageError(f"{runs[-1]}: its init.run leads back to {init.run}")
        runs.append(init.run)
        if (fixed := fixed_parameters.find(init.run)) is not None:
            # This folder has the whole model, so the search ends here. What later runs replaced
            # must not be taken from it.
            given = {"vae": named.vae, "dit": named.dit, "prompt": named.prompt}
            replaced = frozenset(name for name, source in given.items() if source is not None)
            init = fixed_parameters.load_sources(fixed)
        else:
            # A folder of an earlier version: go on with what its own run started from.
            init = InitConfig(**config_of(init.run).get("init") or {})
        named = InitConfig(
            named.vae or init.vae, named.dit or init.dit, named.prompt or init.prompt
        )
    sources = named.vae, named.dit, named.prompt, init.model
    return Origins(*sources, tuple(reversed(runs)), fixed, replaced)


def load(experiment: Experiment, wanted: Tree, statistics: Statistics | None = None) -> Tree:
    """Loads parameters from the origins of an experiment, as far as these have them.

    Args:
        experiment: Experiment; `init`, `lora`, the sizes of its networks and, for a resumed run,
            `run.out` count.
        wanted: Shapes of some parameters by part, each with the type and, if it has one, the
            sharding to read it in. Each process reads its own part of an array with a sharding;
            others become NumPy arrays.
        statistics: Statistics of the VAE's latents, from which the refiner's grey latents are made.

    Returns:
        Tree of the wanted parameters that were found.

    Raises:
        UsageError: If shapes or architectures differ, or a run lacks a parameter of a part of which
            it has others.
        FileNotFoundError: If a folder or run is not there.
    """
    known = origins(experiment.init, experiment.run.out)
    like = wanted
    ranks = [config_of(run).get("lora", 0) for run in known.runs]
    # Else a type of fewer bits would round the kernel before its change is added.
    if any(ranks):  # changes are added to exact kernels
        like = jax.tree.map(lambda x: x.update(dtype=jnp.float32), wanted)
    found = load_sources(experiment, known, like, statistics)
    # From the oldest run to the newest: later ones replace what earlier ones have.
    trained_before: set[str] = set()
    kernels = {name: part for name, part in like.items() if name != "lora"}
    # Each run with its rank and that of what started from it, the experiment itself at the end.
    for run, rank, next_rank in zip(known.runs, ranks, [*ranks[1:], experiment.lora]):
        shapes = like if run == known.runs[-1] else kernels
        found, parts = add_run(found, run, shapes, rank, rank == next_rank)
        trained_before |= parts

    # Only now are types and places those that were asked for.
    def finished(x: Array | np.ndarray, like: jax.ShapeDtypeStruct) -> Array | np.ndarray:
        x = x.astype(like.dtype)
        return x if like.sharding is None else jax.device_put(x, like.sharding)

    flat: dict[str, Any] = flatten_dict(found, sep="/")
    wanted = flatten_dict(wanted, sep="/")
    # A random parameter among trained ones would be a mistake in the sizes that nobody sees.
    for path in sorted(wanted):
        if path not in flat and path.partition("/")[0] in trained_before:
            raise UsageError(f"{experiment.init.run}: has no parameter {path}")
    return unflatten_dict(
        {path: finished(flat[path], x) for path, x in wanted.items() if path in flat}, sep="/"
    )


def load_sources(
    experiment: Experiment, known: Origins, like: Tree, statistics: Statistics | None
) -> Tree:
    """Loads what lies below the averaged weights of runs, from the weakest source to the strongest.

    These are ported folders, the model file, the refiner's grey latents and, in place of all of
    them, what the oldest run keeps. A source that nothing is wanted of need not exist any more.
    """
    kept = {}
    if known.fixed is not None:
        kept = fixed_parameters.load(known.fixed, without_replaced(like, known.replaced))
        there = flatten_dict(kept, sep="/").keys() | (
            averaged_names(known.runs[0]) if known.runs else set()
        )
        # Only what neither the folder nor its checkpoints have is asked of the original sources.
        flat = flatten_dict(like, sep="/")
        like = unflatten_dict({k: x for k, x in flat.items() if k not in there}, sep="/")
    found = load_ported(experiment, known, like)
    if known.model is not None and like:
        found = join(found, load_model_weights(experiment, known, like))
    if statistics is not None and "grey" in like.get("refiner", {}):
        found = join(found, {"refiner": {"grey": whitened_grey_latents(experiment, statistics)}})
    return join(found, kept)


def without_replaced(like: Tree, replaced: frozenset[str]) -> Tree:
    """Leaves out parameters that come from another VAE or DiT than that of the run before."""
    patterns = {"vae": r"vae/.*|refiner/grey", "dit": r"refiner/dit/.*"}
    flat = flatten_dict(like, sep="/")
    for name in replaced & patterns.keys():
        flat = {path: x for path, x in flat.items() if not re.fullmatch(patterns[name], path)}
    return unflatten_dict(flat, sep="/")


def load_ported(experiment: Experiment, known: Origins, like: Tree) -> Tree:
    """Loads parameters from `init.vae` and `init.dit`."""
    found = {}
    if known.vae is not None and "vae" in like:
        if has_component(known.vae, "vae"):
            check_architecture(known.vae, "vae", experiment.vae)
            found["vae"] = load_weights(known.vae, "vae", wanted=like["vae"])[1]
        elif is_run(known.vae):
            found |= load_params(known.vae, {"vae": like["vae"]}, partial=True)
        else:
            model = find_model(known.vae)
            check_same(known.vae, "vae", model.vae_config, experiment.vae)
            found["vae"] = model.vae
    refiner = like.get("refiner", {})
    if known.dit is not None and "dit" in refiner and experiment.refiner is not None:
        check_architecture(known.dit, "dit", experiment.refiner.dit)
        found["refiner"] = {"dit": load_weights(known.dit, "dit", wanted=refiner["dit"])[1]}
    return found


def load_model_weights(experiment: Experiment, known: Origins, like: Tree) -> Tree:
    """Loads parameters from the model file `init.model`.

    A refiner is taken only if it has the experiment's sizes, so that another one may be trained for
    the same codec; a warning says so. The VAE is not taken if `init.vae` names one: model files
    round theirs.
    """
    name = known.model
    assert name is not None
    model = find_model(name)
    if known.vae is not None:
        like = {part: shapes for part, shapes in like.items() if part != "vae"}
    # Other sizes of VAE or codec are a mistake: symbols and latents would mean something else.
    for part in ("vae", "codec"):
        if part in like:
            check_same(name, part, getattr(model, f"{part}_config"), getattr(experiment, part))
    parts = {"vae": model.vae, "codec": model.codec}
    if model.refiner is not None and "refiner" in like:
        if model.refiner_config == experiment.refiner:
            parts["refiner"] = model.refiner
        else:
            log.warning("%s: its refiner has other sizes and is not used; a new one starts", name)
    # A stage may want a part of the file only, such as the codec without the refiner.
    wanted = flatten_dict(like, sep="/").keys()
    flat = flatten_dict(parts, sep="/")
    return unflatten_dict({path: x for path, x in flat.items() if path in wanted}, sep="/")


def check_architecture(folder: str, component: str, expected: object) -> None:
    """Checks the sizes of a ported component.

    Raises:
        UsageError: If they are not the expected ones.
    """
    check_same(folder, component, read_architecture(folder, component).config, expected)


def check_same(origin: str, part: str, found: Any, expected: Any) -> None:
    """Checks the sizes of a part of a model.

    Args:
        origin: What holds the part.
        part: Name of the part.
        found: Sizes there, a dataclass.
        expected: Sizes in the experiment.

    Raises:
        UsageError: If they differ; it names the settings that do.
    """
    if found == expected:
        return
    there, here = (flatten(dataclasses.asdict(x)) for x in (found, expected))
    names = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    told = "; ".join(f"{k} is {there.get(k)!r}, not {here.get(k)!r}" for k in names)
    raise UsageError(f"{origin}: its {part} is not that of the experiment: {told}")


def add_run(found: Tree, run: str, like: Tree, rank: int, goes_on: bool) -> tuple[Tree, set[str]]:
    """Replaces parameters found so far by those that a run has.

    Args:
        found: Parameters found so far.
        run: Run folder.
        like: Shapes of the wanted parameters.
        rank: Rank of the run's low-rank changes.
        goes_on: Whether what starts from this run trains changes of the same rank. It then goes on
            with these, and the kernels stay as they were before them; else they are merged here.

    Returns:
        The parameters, and the names of the parts that came from the run.
    """
    if not rank or goes_on:
        loaded = load_params(run, like, partial=True)
        return join(found, loaded), set(loaded)
    # The rank differs from what follows, so these changes become part of the kernels for good.
    changes = lora.shapes({"refiner": like.get("refiner", {})}, rank)
    loaded = load_params(run, like | {"lora": on_mesh(changes)}, partial=True)
    return lora.merge_part(join(found, loaded)), set(loaded) - {"lora"}


def whitened_grey_latents(experiment: Experiment, statistics: Statistics) -> np.ndarray:
    """Computes whitened latents (2, c) of a grey clip: the first one, and one that follows."""
    latents = grey_latents(VAE(experiment.vae), load_vae(experiment))
    latents = (np.asarray(latents) - statistics["mean"]) / statistics["std"]
    return latents * statistics["white"]


def load_vae(experiment: Experiment) -> Tree:
    """Loads all parameters of the VAE, float32 on the host.

    It raises the errors of `load`, and UsageError if a parameter is nowhere to be found.
    """
    vae = VAE(experiment.vae)
    shapes = {"vae": jax.eval_shape(lambda key: init_vae(vae, key), jax.random.key(0))}
    found = load(experiment, shapes)
    check_complete(found, shapes)
    return found["vae"]


def load_text(experiment: Experiment) -> np.ndarray | None:
    """Loads the text condition (1, rows, width), None for a model without one.

    It is that of the file `init.prompt`, the one beside the ported DiT, that of the run that the
    DiT comes from, or that of the model file; else zeros.
    """
    config, known = text_config(experiment), origins(experiment.init, experiment.run.out)
    if config is None:
        return None
    if known.fixed is not None and not known.replaced & {"dit", "prompt"}:
        text = fixed_parameters.load_text(known.fixed)
        if text is not None:
            return text
    # A prompt that is named goes before one that lies beside the DiT.
    path = known.prompt
    if path is None and known.dit and (kept := as_path(known.dit) / PROMPT).is_file():
        path = kept
    if path is not None:
        return load_prompt(path, config)
    text = None if known.model is None else find_model(known.model).text
    return np.zeros((1, 1, config.text_width), np.float32) if text is None else text


def text_config(experiment: Experiment) -> DiTConfig | None:
    """Sizes of the DiT, and so of its text condition; None for a model without one."""
    if experiment.refiner is None or not experiment.refiner.dit.text_length:
        return None
    return experiment.refiner.dit


def check_complete(found: Tree, wanted: Tree) -> None:
    """Checks that all parameters that do not train were found.

    Raises:
        UsageError: If one is missing.
    """
    missing = sorted(flatten_dict(wanted, sep="/").keys() - flatten_dict(found, sep="/").keys())
    if missing:
        raise UsageError(
            f"{len(missing)} parameters neither train nor come from a run, model or ported folder "
            f"(see init.vae, init.dit, init.model, init.run); the first is {missing[0]}"
        )


def kept(shapes: Tree, compute: ComputeConfig) -> Tree:
    """Gives shapes the types in which parameters that do not train are kept.

    These are the types that their layers compute in, which saves memory and changes no result.
    """
    return with_types(
        shapes, {DIT_KERNELS: compute.jax_dtype, DECODER_KERNELS: compute.vae.jax_dtype}
    )


def stored(shapes: Tree, compute: ComputeConfig) -> Tree:
    """Gives shapes the types in which a run's folder, and so a release, has what does not train.

    The VAE stays exact, since model files tell VAEs by their bits; the DiT, which may be large, is
    as the run computes with it.
    """
    return with_types(shapes, {DIT_KERNELS: compute.jax_dtype})


def with_types(shapes: Tree, kernels: dict[str, jnp.dtype]) -> Tree:
    """Gives shapes the types that go with the patterns of their paths."""

    def one(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        found = [dtype for pattern, dtype in kernels.items() if re.fullmatch(pattern, path)]
        return x.update(dtype=found[0]) if found else x

    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    return unflatten_dict({path: one(path, x) for path, x in flat.items()}, sep="/")


def on_mesh(shapes: Tree) -> Tree:
    """Gives shapes of parameters their shardings on the mesh in use, if there is one.

    Each process then reads its own part of the parameters.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return shapes
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings(shapes, mesh))


def placed_like(old: Tree, new: Tree) -> Tree:
    """Puts the arrays `new` on the devices, and in the shardings, of `old`."""
    return jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), old, new)


def agreed(tree: Tree) -> Tree:
    """Replaces host arrays by those of the first process, on all processes of a run.

    Each process reads its own part of the data, so what they measure differs.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
