"""Makes `toy_stage` importable by name, as a stage of a user's own would be; shared fixtures."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def rolled(monkeypatch):
    """Compiles the loop over latents as for accelerators, one body for all latents.

    The form for CPUs has a copy of the body for each latent, which takes long to compile.
    """
    monkeypatch.setattr("gnvc_jax.training.rollout.backend", lambda: "tpu")


@pytest.fixture(scope="module")
def base(tiny_codec, tmp_path_factory):
    """An experiment of the stage `latent`, see `refiner_runs`."""
    from refiner_runs import make_base

    return make_base(tiny_codec, tmp_path_factory.mktemp("runs"))
