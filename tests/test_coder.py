"""Video to bytes and back with a tiny model: the whole chain, on every kind of arithmetic."""

import dataclasses
import io
import subprocess
import sys

import jax
import numpy as np
import pytest

from gnvc_jax.bitstream import EntropyCoder, PlainCoder, StreamReader
from gnvc_jax.bitstream.errors import DeviceNotExact, WrongModel
from gnvc_jax.codec import scales
from gnvc_jax.coder import Coder
from gnvc_jax.model_file import save_model
from gnvc_jax.parallel import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def coder(tiny_model):
    return Coder(tiny_model())


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(1).integers(0, 256, (7, 40, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def stream(coder, video):
    out = io.BytesIO()
    header = coder.header(70, 40, (30000, 1001), gop=5)
    assert coder.encode_frames(video, out, header, qp=20) == 7
    return out.getvalue()


def symbols(coder, stream):
    with StreamReader(stream) as reader:
        return [coder.symbols(reader.header, g) for g in reader.groups()]


def same(a, b):
    return all(
        np.array_equal(x.y, y.y) and np.array_equal(x.z, y.z) and np.array_equal(x.index, y.index)
        for group_a, group_b in zip(a, b, strict=True)
        for x, y in zip(group_a, group_b, strict=True)
    )


def test_frames_come_back_whole(coder, stream, video):
    with StreamReader(stream) as reader:
        assert reader.header.fps == (30000, 1001) and reader.header.gop_latents == 2
        frames = np.stack(list(coder.decode_frames(reader)))
    assert frames.shape == video.shape and frames.dtype == np.uint8 and frames.std() > 1
    groups = symbols(coder, stream)
    assert [len(g) for g in groups] == [2, 2]
    assert any(np.abs(s.y).max() > 0 for g in groups for s in g)


def test_a_group_decodes_alone(coder, stream):
    with StreamReader(stream) as reader:
        whole = list(coder.decode_frames(reader))
        alone = list(coder.decode_group(reader.header, reader.group(1)))
    np.testing.assert_array_equal(alone, whole[5:])


def test_plain_python_reads_the_same_symbols(coder, stream):
    """The conformance reader: plain arithmetic coder, NumPy int64 scale network."""
    plain = Coder(coder.model)
    plain.entropy = EntropyCoder(coder.model.tables, PlainCoder)
    plain.functions._network = lambda tables, q_index, *v: scales.scale_index_numpy(
        coder.model.codec_config, tables, q_index, *v
    )
    assert same(symbols(coder, stream), symbols(plain, stream))


def test_estimated_bits_are_the_bytes_of_the_file(coder, stream):
    with StreamReader(stream) as reader:
        for group in reader.groups():
            (segment,) = group.segments
            bits = sum(map(coder.entropy.ideal_bits, coder.symbols(reader.header, group)))
            # A segment is whole words, and the coder's state is one or two of them.
            assert bits <= 8 * len(segment) <= 1.001 * bits + 64


def test_another_model_is_refused(coder, stream, tiny_model):
    other = Coder(tiny_model(seed=1))
    with StreamReader(stream) as reader, pytest.raises(WrongModel, match="codec"):
        list(other.decode_frames(reader))


def test_models_that_differ_in_parameters_alone_share_programs(coder, stream, video, tiny_model):
    other = tiny_model(seed=1)
    again = Coder(other)
    programs = again.functions.programs
    assert programs is coder.functions.programs
    # Parameters are arguments: the streams are those of each model's own weights.
    out = io.BytesIO()
    traced = programs.analyse._cache_size()
    again.encode_frames(video[:1], out, again.header(70, 40, (25, 1), gop=5), qp=20)
    assert programs.analyse._cache_size() == traced
    assert not same([symbols(coder, stream)[0][:1]], symbols(again, out.getvalue()))
    for change in ({"mean": other.mean + 1}, {"text": np.zeros((1, 1, 8), np.float32)}):
        assert Coder(dataclasses.replace(other, **change)).functions.programs is not programs
    assert Coder(tiny_model(motion=True)).functions.programs is not programs


def test_a_device_that_is_not_exact_is_refused(coder, monkeypatch):
    monkeypatch.setitem(vars(coder.model), "self_test_crc", 1)
    with pytest.raises(DeviceNotExact, match="self-test fails"):
        Coder(coder.model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qp": 64}, r"qp must be in \[0, 63\], got 64"),
        ({"frames": []}, "no frame"),
        ({"frames": [np.zeros((41, 70, 3), np.uint8)]}, r"frame 0 is \(41, 70, 3\)"),
        ({"frames": [np.zeros((40, 70, 3), np.float32)]}, "frame 0 is float32, expected uint8"),
        ({"frames": [np.zeros((40, 70, 3), np.int64)]}, "frame 0 is int64, expected uint8"),
    ],
)
def test_wrong_use_is_said(coder, video, change, reason):
    args = {"frames": video, "qp": 20} | change
    header = coder.header(70, 40, (30, 1), gop=5)
    with pytest.raises(ValueError, match=reason):
        coder.encode_frames(args["frames"], io.BytesIO(), header, args["qp"])
    with pytest.raises(ValueError, match="got 6"):
        coder.header(70, 40, (30, 1), gop=6)


def test_effort_needs_motion(coder, video):
    header = coder.header(70, 40, (30, 1), gop=5)
    with pytest.raises(ValueError, match="effort 1 needs a model with block motion"):
        coder.encode_frames(video, io.BytesIO(), header, 20, effort=1)


def test_effort_lowers_what_bits_and_errors_cost_together(tiny_model, video):
    coder = Coder(tiny_model(motion=True))
    header, costs, sizes = coder.header(70, 40, (25, 1), gop=5), [], []
    for effort in (0, 1):
        out = io.BytesIO()
        coder.encode_frames(video[:5], out, header, 30, effort=effort)
        decoded = np.stack(list(coder.decode_frames(StreamReader(out.getvalue()), steps=0)))
        error = ((decoded.astype(float) - video[:5]) ** 2).mean(-1).sum()
        sizes.append(len(out.getvalue()))
        costs.append(8 * sizes[-1] + 8e-5 * 1000 ** (33 / 63) * error)
    assert sizes[1] < sizes[0] and costs[1] < costs[0]


@pytest.mark.slow
def test_symbols_from_one_device(coder, stream, tmp_path):
    """A process with one device, not eight, parses the same symbols."""
    save_model(tmp_path / "m.safetensors", coder.model)
    (tmp_path / "s.gnvc").write_bytes(stream)
    script = f"""
import sys, numpy as np
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.coder import Coder
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.model_file import load_model
coder = Coder(load_model({str(tmp_path / "m.safetensors")!r}))
reader = StreamReader({str(tmp_path / "s.gnvc")!r})
ys = [s.y.ravel() for g in reader.groups() for s in coder.symbols(reader.header, g)]
np.save({str(tmp_path / "y.npy")!r}, np.concatenate(ys))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"XLA_FLAGS": "", "PATH": ""})
    ours = np.concatenate([s.y.ravel() for g in symbols(coder, stream) for s in g])
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), ours)


@pytest.fixture(scope="module")
def refining(tiny_model):
    """The same model with a refiner over windows of two latents."""
    return Coder(tiny_model(refiner=True))


def test_the_refiner_stays_out_of_the_entropy_path(coder, refining, video, stream):
    assert refining.model.fingerprints == coder.model.fingerprints
    out = io.BytesIO()
    header = refining.header(70, 40, (30000, 1001), gop=5)
    refining.encode_frames(video, out, header, qp=20)
    assert out.getvalue() == stream
    assert same(symbols(refining, stream), symbols(coder, stream))
    with StreamReader(stream) as reader:
        plain = np.stack(list(coder.decode_frames(reader)))
        skipped = np.stack(list(refining.decode_frames(reader, steps=0)))
    np.testing.assert_array_equal(plain, skipped)


def test_refinement_is_repeatable_and_on_by_default(refining, video):
    out = io.BytesIO()
    refining.encode_frames(video, out, refining.header(70, 40, (25, 1), gop=9), qp=20)

    def decode(**options):
        with StreamReader(out.getvalue()) as reader:
            return np.stack(list(refining.decode_frames(reader, **options)))

    none, one, three = (decode(steps=n) for n in (0, 1, 3))
    assert one.shape == none.shape == video.shape
    np.testing.assert_array_equal(one, decode())
    np.testing.assert_array_equal(three, decode(steps=3))
    for a, b in ((none, one), (one, three)):
        assert np.abs(a.astype(int) - b).max() > 2


def test_a_model_without_a_refiner_says_so(coder, stream):
    with StreamReader(stream) as reader, pytest.raises(ValueError, match="no refiner"):
        list(coder.decode_frames(reader, steps=2))


@pytest.fixture
def four_devices():
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4))):
        yield


@pytest.mark.slow
def test_devices_share_frames(coder, tiny_model, four_devices):
    """Another number of devices reads the same integers, and frames that differ by rounding."""
    video = np.random.default_rng(1).integers(0, 256, (5, 40, 64, 3), np.uint8)
    spread, out = Coder(tiny_model()), io.BytesIO()
    spread.encode_frames(video, out, spread.header(64, 40, (25, 1), gop=5), qp=20)
    with StreamReader(out.getvalue()) as reader:
        frames = np.stack(list(spread.decode_frames(reader)))
    assert same(symbols(coder, out.getvalue()), symbols(spread, out.getvalue()))
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        with StreamReader(out.getvalue()) as reader:
            alone = np.stack(list(coder.decode_frames(reader)))
    assert np.abs(frames.astype(int) - alone).max() <= 1


def test_devices_keep_their_columns(tiny_model, four_devices):
    """Nothing but the keys and values of the VAE's attention is ever whole on a device."""
    functions = Coder(tiny_model()).functions
    latents = np.zeros((1, 1, 8, 32, 4), np.float32)
    _, cache = functions.decode_latents(None, latents)
    for x in filter(np.size, jax.tree.leaves(cache)):
        assert x.addressable_shards[0].data.shape[3] == x.shape[3] // 4
    arguments = functions.vae_params, cache, latents
    program = functions.programs.decode_latents.lower(*arguments).compile().as_text()
    gathered = [line for line in program.splitlines() if " all-gather(" in line]
    assert "collective-permute" in program
    assert gathered and all("attention" in line for line in gathered)


def test_devices_that_do_not_divide_are_named(tiny_model, four_devices):
    coder, video = Coder(tiny_model()), np.zeros((1, 16, 72, 3), np.uint8)
    with pytest.raises(
        ValueError, match="9 columns of latents, which cannot be split evenly over 4 devices"
    ):
        coder.encode_frames(video, io.BytesIO(), coder.header(72, 16, (25, 1)), qp=20)
