"""The name tables against lists made from the public code, and against our own parameters."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gnvc_jax.porting.architectures import (
    WAN22_MEAN,
    WAN22_STD,
    WAN_MEAN,
    WAN_STD,
    Architecture,
)
from gnvc_jax.porting.names import dit_tensors, vae_tensors
from gnvc_jax.refiner import VACE_1_3B, WAN_1_3B, DiTConfig
from gnvc_jax.vae import VAEConfig
from gnvc_jax.vae.config import WAN22

SMALL = DiTConfig(width=12, ffn_width=20, heads=2, layers=6, frequencies=4, channels=3,
                  text_width=7, context_every=3, context_channels=5)  # fmt: skip

TINY_WAN22 = dataclasses.replace(WAN22, base=4, decoder_base=6)


def listed(table: str) -> dict[str, tuple]:
    """Original name -> (diffusers name, shape) of a table, its rows for blocks written out."""
    found = {}
    with open(Path(__file__).parent / "names" / f"{table}.csv") as file:
        for row in csv.DictReader(file):
            repeat = row.get("repeat", "once")
            last = int(repeat.rpartition("..")[2]) if ".." in repeat else 0
            shape = tuple(map(int, row["torch_shape"].split("x")))
            for i in range(last + 1):
                original, diffusers = (
                    row[key].replace("{i}", str(i)) for key in ("original", "diffusers")
                )
                found[original] = diffusers, shape
    return found


@pytest.mark.parametrize(
    ("table", "tensors", "count"),
    [
        ("vae", vae_tensors(VAEConfig()), 194),
        ("vae-2.2", vae_tensors(WAN22), 196),
        ("dit-1.3b", dit_tensors(WAN_1_3B), 825),
        ("vace-1.3b", dit_tensors(VACE_1_3B), 1264),
    ],
)
def test_tensor_names_equal_the_published_ones(table, tensors, count):
    ours = {t.original: (t.diffusers, t.shape) for t in tensors}
    assert len(tensors) == len(ours) == count
    assert ours == listed(table)


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("vae", VAEConfig(base=4), WAN_MEAN, WAN_STD),
        Architecture("vae", VAEConfig(4, (1, 1, 2), 1, 4, (True, False)), WAN_MEAN, WAN_STD),
        Architecture("vae", TINY_WAN22, WAN22_MEAN, WAN22_STD),
        Architecture("dit", SMALL),
        Architecture("dit", DiTConfig(width=12, heads=2, layers=2, ffn_width=8, text_width=3)),
    ],
)
def test_public_tensors_fill_every_parameter_exactly(architecture):
    shapes = {k: x.shape for k, x in flatten_dict(architecture.abstract(), sep="/").items()}
    parts = architecture.by_parameter()
    assert parts.keys() == shapes.keys()
    for path, tensors in parts.items():
        rows = [t.index for t in tensors]
        row_shape = shapes[path] if rows == [None] else shapes[path][1:]
        assert rows in ([None], list(range(shapes[path][0])))
        for tensor in tensors:
            array = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
            there = tensor.forward(array, row_shape)
            np.testing.assert_array_equal(tensor.inverse(there), array)


def test_architecture_json_round_trip():
    import json

    for architecture in (
        Architecture("vae", VAEConfig(base=4), WAN_MEAN, WAN_STD),
        Architecture("dit", SMALL),
    ):
        text = json.dumps(architecture.to_json())
        assert Architecture.from_json(json.loads(text)) == architecture
