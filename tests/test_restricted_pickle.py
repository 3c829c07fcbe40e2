"""Pickles of arrays are read; those that call something or refer to other objects are refused."""

import io
import pickle

import numpy as np
import pytest

from gnvc_jax.restricted_pickle import NUMPY_ARRAYS, RestrictedUnpickler


class Hostile:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def load(data: bytes):
    return RestrictedUnpickler(io.BytesIO(data), NUMPY_ARRAYS).load()


def test_containers_of_arrays_are_read():
    expected = {"a": [np.arange(3.0), np.zeros((2, 0), np.int8)], "b": ("x", None)}
    for protocol in (3, 4):
        found = load(pickle.dumps(expected, protocol=protocol))
        for got, array in zip(found["a"], expected["a"], strict=True):
            np.testing.assert_array_equal(got, array, strict=True)
        assert found["b"] == expected["b"]


def test_a_pickle_that_calls_a_function_is_refused_before_the_call(tmp_path):
    target = tmp_path / "ran"
    with pytest.raises(pickle.UnpicklingError, match=r"io\.open|builtins\.open"):
        load(pickle.dumps({"a": np.zeros(3), "b": Hostile(target)}))
    assert not target.exists()


def test_persistent_ids_are_refused_unless_expected():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return "id" if value is Hostile else None

    file = io.BytesIO()
    Pickler(file).dump([Hostile])
    with pytest.raises(pickle.UnpicklingError, match="persistent id 'id'"):
        load(file.getvalue())
    file.seek(0)
    assert RestrictedUnpickler(file, {}, persistent=str.upper).load() == ["ID"]
