"""PyTorch files: read exactly, and never run."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.torch_file import read_descriptions, read_tensor

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["tensors", "tensors_old"])
def test_tensors_of_every_layout_are_read(name):
    path = GOLDEN / f"{name}.pth"
    found = read_descriptions(path)
    with np.load(GOLDEN / "tensors.npz") as expected:
        assert found.keys() == set(expected)
        for name, tensor in found.items():
            array = read_tensor(path, tensor)
            np.testing.assert_array_equal(array.astype(np.float32), expected[name])
    assert [str(found[k].dtype) for k in ("half", "bfloat16", "double")] == [
        *("float16", "bfloat16", "float64")
    ]


def torch_file(path: Path, pickled: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"x/data/{key}", data)
    return path


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path):
    path = torch_file(tmp_path / "x.pth", pickle.dumps({"a": Hostile(tmp_path / "ran")}))
    with pytest.raises(PortError, match=r"x\.pth.*open"):
        read_descriptions(path)
    assert not (tmp_path / "ran").exists()


def pickled(shape, strides, offset=0, count=6) -> bytes:
    """The instructions that torch writes for {"a": tensor} with storage "0" of float32."""

    def numbers(values):
        return "(" + "".join(f"I{n}\n" for n in values) + "t"

    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{count}\ntQ"
    tensor = f"({storage}I{offset}\n{numbers(shape)}{numbers(strides)}I00\nNt"
    return f"(dS'a'\nctorch._utils\n_rebuild_tensor_v2\n{tensor}Rs.".encode()


DATA = np.arange(6, dtype=np.float32).tobytes()


def test_hand_written_file(tmp_path):
    path = torch_file(tmp_path / "x.pth", pickled((2, 3), (3, 1)), **{"0": DATA})
    tensor = read_descriptions(path)["a"]
    np.testing.assert_array_equal(read_tensor(path, tensor), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "data"),
    [
        (pickled((2, 3), (4, 1)), DATA),  # the last row ends beyond the storage
        (pickled((2, 3), (3, 1), offset=1), DATA),
        (pickled((2, -3), (3, 1)), DATA),
        (pickled((2, 3), (-3, 1)), DATA),
        (pickled((2, 3), (3, 1), count=60), DATA),  # says more than the archive holds
        (pickled((2, 3), (3, 1)), DATA[:-1]),
        (pickled((2, 3), (3, 1))[:-20], DATA),
        (b"(lp0\n.", DATA),
        (b"", DATA),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, content, data):
    path = torch_file(tmp_path / "x.pth", content, **{"0": data})
    with pytest.raises(PortError, match=r"x\.pth"):
        read_descriptions(path)


@pytest.mark.parametrize("size", [0, 1, 20, 200, 1000, -1])
def test_truncated_files_of_the_old_format_are_refused(tmp_path, size):
    path = tmp_path / "x.pth"
    path.write_bytes((GOLDEN / "tensors_old.pth").read_bytes()[:size])
    with pytest.raises(PortError, match=r"x\.pth"):
        read_descriptions(path)


def test_a_missing_storage_and_a_file_of_another_kind(tmp_path):
    with pytest.raises(PortError, match=r"x\.pth.*data/0"):
        read_descriptions(torch_file(tmp_path / "x.pth", pickled((2, 3), (3, 1))))
    (tmp_path / "old.pth").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(PortError, match=r"old\.pth.*not a PyTorch file"):
        read_descriptions(tmp_path / "old.pth")
