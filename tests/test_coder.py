"""Video to bytes and back with a tiny model: the whole chain, on every kind of arithmetic."""

import dataclasses
import io
import json
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gnvc_jax import model as models
from gnvc_jax.bitstream import EntropyCoder, PlainCoder, StreamReader
from gnvc_jax.bitstream.errors import DeviceNotExact, EntropyError, ModelCorrupt, WrongModel
from gnvc_jax.codec import scales
from gnvc_jax.coder import Coder
from gnvc_jax.frames import to_float
from gnvc_jax.model_file import load_model, save_model
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


def test_model_file_keeps_everything(tmp_path, coder, stream):
    path = tmp_path / "m.safetensors"
    save_model(path, coder.model)
    loaded = load_model(path)
    assert loaded.fingerprints == coder.model.fingerprints
    assert loaded.vae_config == coder.model.vae_config
    assert loaded.codec_config == coder.model.codec_config
    assert list(tmp_path.iterdir()) == [path]

    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelCorrupt, match="fingerprint"):
        load_model(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelCorrupt, match="Git LFS pointer"):
        load_model(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelCorrupt, match="not a model file"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no such model file"):
        load_model(tmp_path / "absent")


def edit_facts(path, **changes):
    """Change the description in a model file and nothing else."""
    with safe_open(path, "numpy") as file:
        facts = json.loads(file.metadata()["gnvc"])
    facts |= changes
    facts = {k: v for k, v in facts.items() if v is not None}
    save_file(load_file(path), path, metadata={"gnvc": json.dumps(facts)})


def test_every_part_of_a_model_file_is_checked(tmp_path, tiny_model):
    path = tmp_path / "m.safetensors"
    model = tiny_model(refiner=True)
    model = dataclasses.replace(model, text=np.ones((1, 2, 3), np.float32))
    save_model(path, model)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        places = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    del places["__metadata__"]
    assert {name.split("/")[0] for name in places} >= {"refiner", "text", "vae", "codec"}
    parts = {name.split("/")[0]: place["data_offsets"][0] for name, place in places.items()}
    for at in parts.values():
        damaged = bytearray(whole)
        damaged[start + at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ModelCorrupt):
            load_model(path)
    path.write_bytes(whole)
    edit_facts(path, name="other")
    with pytest.raises(ModelCorrupt, match="checksum"):
        load_model(path)
    path.write_bytes(whole)
    edit_facts(path, checksum=None)  # as in files of earlier versions
    assert load_model(path).self_test_crc == model.self_test_crc


def test_the_stored_self_test_decides(tmp_path, coder):
    """A device, and NumPy on it, that gets other values than the maker's is refused."""
    path = tmp_path / "m.safetensors"
    save_model(path, coder.model)
    edit_facts(path, checksum=None, self_test=coder.model.self_test_crc ^ 1)
    with pytest.raises(DeviceNotExact, match="self-test fails"):
        Coder(load_model(path))


def test_a_field_added_later_leaves_old_models_readable(tmp_path, coder, stream):
    """A file without the newest field keeps its fingerprints, and its streams."""
    path = tmp_path / "m.safetensors"
    stored = {k: dict(v) for k, v in coder.model.configs.items()}
    del stored["codec"]["level_pattern"], stored["vae"]["head"]
    old = dataclasses.replace(coder.model, stored=stored)
    assert old.fingerprints != coder.model.fingerprints
    save_model(path, old)
    again = load_model(path)
    assert again.fingerprints == old.fingerprints
    assert again.codec_config == coder.model.codec_config
    save_model(path, again)
    assert load_model(path).fingerprints == old.fingerprints


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


def test_a_refiner_survives_its_file(refining, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, refining.model)
    again = load_model(path)
    assert again.refiner_config == refining.model.refiner_config
    import jax

    jax.tree.map(np.testing.assert_array_equal, again.refiner, refining.model.refiner)
    plain = load_model(path)
    assert plain.fingerprints == refining.model.fingerprints


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


@pytest.fixture(scope="module")
def moving(tiny_model):
    """A coder with block motion over a linear VAE, and a model that nothing was trained in."""
    return Coder(tiny_model(motion=True))


def pan(frames: int, h: int, w: int) -> np.ndarray:
    """A window that moves over a smooth random picture."""
    canvas = np.random.default_rng(4).integers(0, 256, (h + 60, w + 60, 3), np.uint8)
    canvas = cv2.GaussianBlur(canvas, None, 3.0)
    return np.stack([canvas[t : t + h, 2 * t : 2 * t + w] for t in range(frames)])


def through(coder, video, qp=10, gop=9):
    """Stream and decoded frames."""
    out = io.BytesIO()
    t, h, w, _ = video.shape
    assert coder.encode_frames(video, out, coder.header(w, h, (25, 1), gop=gop), qp=qp) == t
    with StreamReader(out.getvalue()) as reader:
        return out.getvalue(), np.stack(list(coder.decode_frames(reader)))


@pytest.mark.parametrize(
    "shape", [(1, 40, 70), (2, 64, 64), (10, 40, 70), (6, 17, 130), (5, 16, 16)]
)
def test_motion_at_any_size_and_length(moving, shape):
    video = pan(*shape)
    stream, frames = through(moving, video)
    assert frames.shape == video.shape and frames.dtype == np.uint8
    with StreamReader(stream) as reader:
        header, groups = reader.header, list(reader.groups())
        fields = [f for g in groups for f in moving.fields(header, g)]
    assert len(fields) == sum(len(g.q_indices) - 1 for g in groups)
    if shape[0] == 10:
        assert any(np.abs(f.coarse).max() > 0 for f in fields)


def test_decoder_and_encoder_agree_on_every_latent(moving):
    """Decoded frames are those that the encoder predicted from, to the bit, group after group."""
    video = pan(18, 64, 64)
    stream, frames = through(moving, video)
    again = Coder(moving.model)
    np.testing.assert_array_equal(through(again, video)[1], frames)
    assert through(again, video)[0] == stream


def test_training_form_gives_the_symbols_of_the_stream(moving):
    """The same integers from the stage's loop over latents and from the coder."""
    from gnvc_jax.codec.model import LatentCodec
    from gnvc_jax.motion import expand
    from gnvc_jax.motion.warp import predict, to_eight_bits
    from gnvc_jax.vae import VAE

    video, model = pan(9, 64, 64), moving.model
    stream, decoded = through(moving, video)
    with StreamReader(stream) as reader:
        group = next(iter(reader.groups()))
        symbols = moving.symbols(reader.header, group)
        fields = moving.fields(reader.header, group)
    vae, codec = VAE(model.vae_config), LatentCodec(model.codec_config)
    params = {"params": jax.tree.map(lambda x: np.asarray(x, np.float32), model.vae)}
    codec_params = {"params": jax.tree.map(jax.numpy.asarray, model.codec)}

    def encode(frames, first):
        latents, _ = vae.apply(params, frames, first, method="encode")
        return ((latents - model.mean) / model.std)[:, 0]

    @jax.jit
    def code(latent, state, q_index, prediction):
        state, coded = codec.apply(
            codec_params,
            latent,
            state,
            q_index[None],
            jax.random.key(0),
            prediction,
            method="train",
        )
        return state, coded

    def scaled(latent):
        return latent * model.std + model.mean

    pixels = video[None].astype(np.float32) / 127.5 - 1
    state = prediction = predicted = None
    for i, s in enumerate(symbols):
        first, part = i == 0, slice(0, 1) if i == 0 else slice(4 * i - 3, 4 * i + 1)
        if not first:
            # The frame that the decoder has: rounded here, one pixel in a million may differ by a
            # step, which moves symbols of fine levels.
            reference = to_eight_bits(to_float(decoded[None, 4 * i - 4]))
            predicted = predict(reference, expand(fields[i - 1])[None])
            prediction = encode(predicted, False)
        latent = encode(pixels[:, part], first)
        state, coded = code(latent, state, jax.numpy.int32(s.q_index), prediction)
        integers = coded.symbols
        # One rounding in a thousand may fall on the other side of a tie.
        for ours, theirs in ((s.y, integers.y), (s.z, integers.z), (s.index, integers.index)):
            assert np.mean(np.asarray(ours) == np.asarray(theirs)[0]) > 0.999
        if first:
            shown = vae.apply(params, scaled(coded.latent)[:, None], method="decode")
        else:
            given = scaled(coded.latent), scaled(prediction), predicted, coded.fresh, coded.detail
            shown = vae.apply(params, *given, method="compensate")
        # The frames of the decoder, before they are rounded.
        exact = 127.5 * (np.clip(shown[0], -1, 1) + 1)
        assert np.abs(exact - decoded[part]).max() < 0.501
    assert any(np.abs(s.y).max() > 0 for s in symbols[1:])


def test_motion_needs_a_model_with_motion(moving, coder):
    stream, _ = through(moving, pan(5, 40, 70))
    with StreamReader(stream) as reader, pytest.raises(WrongModel, match="made with codec"):
        list(coder.decode_frames(reader))
    with StreamReader(stream) as reader:
        with pytest.raises(WrongModel, match="has motion, the loaded model has none"):
            coder.fields(reader.header, next(iter(reader.groups())))


def test_false_motion_is_an_error(moving):
    """Another motion segment under mended checksums: an error of ours, or frames."""
    stream, _ = through(moving, pan(9, 40, 70))
    with StreamReader(stream) as reader:
        header, group = reader.header, next(iter(reader.groups()))
    rng, errors = np.random.default_rng(0), 0
    for size in (0, 3, 4, len(group.motion), 400):
        false = dataclasses.replace(group, motion=rng.bytes(size))
        try:
            for field in moving.fields(header, false):
                assert np.abs(field.coarse).max() <= 127
        except EntropyError:
            errors += 1
    assert errors >= 2


def test_levels_of_a_group_are_those_of_the_model(tiny_model):
    model = tiny_model(motion=True)
    config = dataclasses.replace(model.codec_config, intra_offset=5, level_pattern=(-2, 0, 3))
    coder = Coder(dataclasses.replace(model, codec_config=config))
    stream, _ = through(coder, pan(18, 64, 64), qp=60, gop=17)
    with StreamReader(stream) as reader:
        levels = [g.q_indices for g in reader.groups()]
    assert levels == [(8, 1, 3, 6, 1), (8,)]


def test_strides_are_those_of_the_vae(tiny_codec, start, start_codec):
    """A model with 16 pixels and 2 frames per latent writes streams that it can read."""
    from gnvc_jax.codec.model import LatentCodec
    from gnvc_jax.vae import VAE, VAEConfig, init_vae

    config = VAEConfig(
        multipliers=(1,) * 5, temporal_down=(False, False, False, True), latent_channels=4,
        linear=True,
    )  # fmt: skip
    assert (config.stride, config.temporal_stride) == (16, 2)
    vae = start(lambda key: init_vae(VAE(config), key), "klt")
    codec = start_codec(LatentCodec(tiny_codec))
    model = models.build("wide", config, tiny_codec, vae, codec, np.zeros(4), np.ones(4))
    coder, video = Coder(model), pan(6, 40, 150)
    stream, frames = through(coder, video, gop=5)
    assert frames.shape == video.shape
    with StreamReader(stream) as reader:
        assert (reader.header.latent_stride, reader.header.temporal_stride) == (16, 2)
        assert [len(g.q_indices) for g in reader.groups()] == [3, 1]
    assert coder.reconstruct(video).shape == video.shape
    coder.header(150, 40, (25, 1), gop=3)
    with pytest.raises(ValueError, match=r"gop must be 1 \+ 2k frames in \[1, 511\], got 4"):
        coder.header(150, 40, (25, 1), gop=4)
