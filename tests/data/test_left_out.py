"""Training data of which a part is damaged: drawn anew, counted, and an error only in bulk."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from gnvc_jax.data.clips import RandomRead, clip_dataset
from gnvc_jax.data.index import ClipIndex
from gnvc_jax.data.left_out import LeftOut, TooMuchLeftOut

OPTIONS = {"frames": 5, "size": (16, 16), "batch": 2, "seed": 7}


@dataclasses.dataclass(frozen=True)
class Numbers(RandomRead):
    """Numbers 0 to 9, of which some cannot be read."""

    broken: tuple[int, ...]
    left_out: LeftOut
    count: int = 10

    def name(self, element):
        return str(element)

    def read(self, element, rng):
        drawn = rng.integers(1000)
        if element in self.broken:
            raise ValueError("broken")
        return np.array([element, drawn])


def test_a_replacement_depends_on_seed_and_number_alone():
    left_out = LeftOut(limit=0.3)
    left_out.start(10)
    draw = Numbers((2, 5, 8), left_out)
    first = [draw.random_map(i % 10, np.random.default_rng(i)) for i in range(40)]
    fresh = Numbers((2, 5, 8), LeftOut(limit=0.3, total=10))
    for i in (38, 5, 2):  # in another order, by another object
        again = fresh.random_map(i % 10, np.random.default_rng(i))
        np.testing.assert_array_equal(again, first[i])
    assert not {2, 5, 8} & {int(element) for element, _ in first}
    whole = Numbers((), left_out)
    for i in (0, 11, 33):  # what can be read is what it was without the rest
        element = whole.random_map(i % 10, np.random.default_rng(i))
        np.testing.assert_array_equal(element, first[i])
    assert left_out.read() == {n: f"{n}: ValueError: broken" for n in ("2", "5", "8")}


def test_more_failures_than_the_limit_are_an_error():
    left_out = LeftOut(limit=0.2, total=10)
    draw = Numbers((1, 2, 3), left_out)
    for number in (1, 2, 1, 2):
        left_out.add(str(number), ValueError("broken"))
    with pytest.raises(
        TooMuchLeftOut, match=r"3 of 10 cannot be read.* 0\.2; the last one was 3: "
    ):
        draw.random_map(3, np.random.default_rng(0))


def test_copies_share_the_list(tmp_path):
    left_out = LeftOut(limit=0.2, file=tmp_path / "run" / "left_out.jsonl")
    left_out.start(10)
    copies = [pickle.loads(pickle.dumps(left_out)) for _ in range(3)]
    for number in (0, 1, 0):
        copies[number].add(str(number), ValueError("broken"))
    assert sorted(left_out.read()) == ["0", "1"]
    with pytest.raises(TooMuchLeftOut):
        copies[2].add("2", ValueError("broken"))
    with open(left_out.file, "a") as file:
        file.write('{"name": "3", "rea')  # being written by another process
    assert len(left_out.read()) == 3
    LeftOut(limit=0.2, file=left_out.file).start(10)
    assert left_out.read() == {}


@pytest.fixture
def half(tmp_path, mapped_video):
    """Four videos, one of which cannot be decoded to its end although its frames are counted."""
    (tmp_path / "data").mkdir()
    for number in range(4):
        mapped_video(tmp_path / "data" / f"{number}.mkv", number, 40, 32, 32)
    path = tmp_path / "data" / "1.mkv"
    data = bytearray(path.read_bytes())
    for at in range(len(data) * 3 // 4, len(data) * 3 // 4 + 300):
        data[at] ^= 255
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_half_readable_video_does_not_end_the_data(half, tmp_path, workers):
    left_out = LeftOut(limit=0.25, file=tmp_path / "left_out.jsonl")
    index = ClipIndex(half.parent, left_out=left_out)
    assert len(index) == 4 and not left_out.read()  # nothing is known of it before it is decoded
    batches = iter(clip_dataset(index, **OPTIONS, num_workers=workers))
    first = [next(batches) for _ in range(30)]
    batches.close()
    assert list(left_out.read()) == [str(half)]
    blue = np.concatenate(first)[:, 0, 0, 0, 2] // 50
    assert set(blue) >= {0, 2, 3}
    again = iter(clip_dataset(ClipIndex(half.parent), **OPTIONS))
    again.set_state({"global_next_index": 20 * 2})
    for batch in first[20:]:
        np.testing.assert_array_equal(next(again), batch)


def test_damage_that_is_found_at_the_start_counts_too(half, tmp_path):
    (half.parent / "4.mkv").write_bytes(b"no video")
    left_out = LeftOut(limit=0.4)
    index = ClipIndex(half.parent, tmp_path / "cache", left_out)  # decodes everything
    assert sorted(left_out.read()) == [str(half), str(half.parent / "4.mkv")]
    assert len(index) == 3 and left_out.total == 5
    with pytest.raises(TooMuchLeftOut, match="2 of 5"):
        ClipIndex(half.parent, tmp_path / "cache", LeftOut(limit=0.3))


def test_any_exception_of_a_video_counts_as_left_out(half, tmp_path, monkeypatch, caplog):
    def odd(path, **_):
        if path.name == "2.mkv":
            raise ZeroDivisionError("time base")
        return real(path)

    from gnvc_jax.data import index as module

    real = module.probe
    monkeypatch.setattr(module, "probe", odd)
    assert len(ClipIndex(half.parent)) == 3
    assert "2.mkv: ZeroDivisionError: time base" in caplog.text and "Traceback" in caplog.text


def test_list_of_left_out_files_is_json_lines(tmp_path, caplog):
    left_out = LeftOut(limit=1.0, file=tmp_path / "a.jsonl")
    left_out.start(2)
    with caplog.at_level("CRITICAL"):  # parallel test runs cannot pass such a name on
        left_out.add("\udcff.mp4", ValueError("two\nlines"))
    (line,) = left_out.file.read_text().splitlines()
    assert json.loads(line)["reason"] == "\udcff.mp4: ValueError: two lines"
