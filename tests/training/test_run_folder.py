"""Weights that other programs read from a run folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage
from toy_stage import experiment_in

from gnvc_jax.training import stages
from gnvc_jax.training.config import InitConfig
from gnvc_jax.training.loop import train
from gnvc_jax.training.run_folder import load_params


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the toy stage and its last state."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    experiment = experiment_in(out)
    return out, train(toy_stage.toy_stage(experiment))


def test_weights_that_do_not_fit_are_refused(finished, tmp_path):
    out, state = finished
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        load_params(tmp_path / "nowhere", like=state.params)
    with pytest.raises(ValueError, match="parameter extra has shape None, expected"):
        load_params(out, like={**state.params, "extra": jnp.zeros(1)})
    for w in (jnp.zeros((4, 3)), np.zeros((4, 3)), jax.ShapeDtypeStruct((4, 3), jnp.float32)):
        with pytest.raises(ValueError, match=r"parameter w has shape \(4, 2\), expected \(4, 3\)"):
            load_params(out, like={**state.params, "w": w})


def test_new_stage_starts_from_averaged_weights(finished, tmp_path):
    out, state = finished
    following = experiment_in(tmp_path, init=InitConfig(run=str(out)))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    start = stages.start(toy_stage.toy_stage(following), zeros, {})
    jax.tree.map(np.testing.assert_array_equal, start, state.ema)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.ema)
    on_host = load_params(out, like=abstract)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))
    jax.tree.map(np.testing.assert_array_equal, on_host, state.ema)
