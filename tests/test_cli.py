"""The command line: a round trip, and one line and an exit code for everything that goes wrong."""

import dataclasses
import errno
import importlib
import inspect
import io
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import zlib

import av
import imageio.v3 as imageio
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from gnvc_jax import cli
from gnvc_jax.api import PretrainedVAE, with_light_decoder
from gnvc_jax.bitstream import StreamReader, StreamWriter
from gnvc_jax.commands import coding
from gnvc_jax.commands.options import EXIT_PARTIAL
from gnvc_jax.errors import UsageError
from gnvc_jax.media.reader import read_clip
from gnvc_jax.model_file import load_model, save_model
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.checkpoint import leaves_by_path, write_component
from gnvc_jax.pretrained import Codec
from gnvc_jax.vae import LightDecoder, LightDecoderConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder with a model, a video, and a stream of it made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "m.safetensors", tiny_model())
    save_model(folder / "other.safetensors", tiny_model(1))
    rng = np.random.default_rng(0)
    with av.open(str(folder / "clip.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 70, 40, "yuv420p"
        for _ in range(6):
            picture = rng.integers(0, 256, (40, 70, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    imageio.imwrite(folder / "dot.gif", rng.integers(0, 256, (2, 1, 1, 3), np.uint8))
    (folder / "damaged.mkv").write_bytes(damaged_at_frame(12, rng))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 100)
    args = ("encode", folder / "clip.mp4", folder / "clip.gnvc", "--gop", 5, "--qp", 20)
    assert run(*args, "--model", folder / "m.safetensors") == 0
    stream = (folder / "clip.gnvc").read_bytes()
    (folder / "stream.mkv").write_bytes(stream)
    (folder / "short.gnvc").write_bytes(stream[: len(stream) // 2])
    flipped = bytearray(stream)
    flipped[200] ^= 4
    (folder / "flipped.gnvc").write_bytes(flipped)
    (folder / "wide.gnvc").write_bytes(resized(stream, 16384, 40))
    (folder / "huge.gnvc").write_bytes(resized(stream, 16384, 8192))
    with StreamReader(stream) as reader:
        one, two = reader.index()
    end = two.offset + two.size
    swapped = stream[: one.offset] + stream[two.offset : end] + stream[one.offset : two.offset]
    swapped += stream[end:]
    (folder / "swapped.gnvc").write_bytes(swapped)
    return folder


def damaged_at_frame(number: int, rng) -> bytes:
    """A .mkv of 20 frames that the decoder can read before frame `number`."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        video = out.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuvj420p"
        for place in range(20):
            picture = rng.integers(0, 256, (48, 64, 3), np.uint8)
            for packet in video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                if place == number:
                    damaged = av.Packet(bytes(packet)[:20] + bytes(packet.size - 20))
                    damaged.pts, damaged.dts, damaged.stream = packet.pts, packet.dts, video
                    damaged.time_base, damaged.is_keyframe = packet.time_base, True
                    packet = damaged
                out.mux(packet)
    return file.getvalue()


def resized(stream: bytes, width: int, height: int) -> bytes:
    """A stream whose header claims another picture size and is otherwise right."""
    header = bytearray(stream[: int.from_bytes(stream[12:16], "little")])
    header[24:32] = struct.pack("<II", width, height)
    header[-4:] = struct.pack("<I", zlib.crc32(header[:-4]))
    return bytes(header) + stream[len(header) :]


def run(*args) -> int:
    return cli.main([str(a) for a in args])


def test_round_trip(place, capsys):
    out = place / "decoded.mkv"
    assert run("decode", place / "clip.gnvc", out, "--model", place / "m.safetensors") == 0
    with av.open(str(out)) as video:
        frames = [f for f in video.decode(video=0)]
    assert len(frames) == 6 and (frames[0].width, frames[0].height) == (70, 40)
    capsys.readouterr()
    assert run("info", place / "clip.gnvc") == 0
    text = capsys.readouterr().out
    assert "70x40, 6 frames, 25.000 frames/s" in text and "audio     none" in text
    size = (place / "clip.gnvc").stat().st_size
    assert f"{size} bytes" in text and f"{8 * size / (6 * 70 * 40):.5f} bpp" in text


def decoded(place, *options):
    """Frames that `gnvc decode` makes of the stream."""
    line = "decode", place / "clip.gnvc", place / "o.mkv", "--force", *options
    assert run(*line, "--model", place / "m.safetensors") == 0
    frames = read_clip(place / "o.mkv", 0, 6)
    (place / "o.mkv").unlink()
    return frames


def test_decoding_with_another_refiner(place, tiny_model):
    save_model(place / "refiner.safetensors", tiny_model(3, refiner=True))
    refined = decoded(place, "--refiner", place / "refiner.safetensors", "--t-start", 0.5)
    other = tiny_model(3, refiner=True)
    config = dataclasses.replace(other.refiner_config, start=0.5)
    model = dataclasses.replace(tiny_model(), refiner_config=config, refiner=other.refiner)
    codec, stream = Codec(model), (place / "clip.gnvc").read_bytes()
    np.testing.assert_array_equal(refined, codec.decode(stream))
    assert np.abs(refined - codec.decode(stream, steps=0).astype(int)).max() > 2


def test_decoding_with_a_light_decoder(place, tiny_model, tmp_path):
    """Frames are those of the network on the normalised latents of each group."""
    sizes = LightDecoderConfig(widths=(4, 4, 4, 4), latent_channels=4, blocks=1)
    model, rng = tiny_model(), np.random.default_rng(0)
    architecture = Architecture(
        "decoder", sizes, tuple(model.mean.tolist()), tuple(model.std.tolist())
    )
    leaves = leaves_by_path(architecture.abstract())
    arrays = {k: 0.4 * rng.normal(size=x.shape).astype(np.float32) for k, x in leaves.items()}
    arrays["conv_out/bias"] += 0.5
    write_component(tmp_path / "decoder", architecture, arrays.items())
    got = decoded(place, "--decoder", tmp_path)
    network, expected = LightDecoder(sizes), []
    for group in Codec(model).decode_latents((place / "clip.gnvc").read_bytes()):
        given = {"params": unflatten_dict(arrays, sep="/")}, group.latents[:, :, :5, :9]
        video = np.asarray(network.apply(*given, method="decode"))[0]
        expected.append(video[:, :40, :70])
    expected = 255 * (np.clip(np.concatenate(expected)[: len(got)], -1, 1) + 1) / 2
    assert got.std() > 10 and np.abs(got - expected).max() < 0.51

    alone = PretrainedVAE(model.vae_config, model.vae, model.mean, model.std)
    frames = np.stack(list(with_light_decoder(alone, tmp_path).decode_frames(given[1])))
    assert np.abs(frames - 255 * (np.clip(video, -1, 1) + 1) / 2).max() < 0.51

    light = with_light_decoder(model, tmp_path)
    assert light.fingerprints == model.fingerprints
    save_model(tmp_path / "light.safetensors", light)
    again = load_model(tmp_path / "light.safetensors")
    assert again.decoder_config == sizes
    for path, x in leaves_by_path(again.decoder).items():
        np.testing.assert_array_equal(x, arrays[path])
    with pytest.raises(UsageError, match="predicts from the frames that its own VAE decodes"):
        with_light_decoder(tiny_model(motion=True), tmp_path)
    with pytest.raises(UsageError, match="normalises latents unlike the decoder in"):
        with_light_decoder(dataclasses.replace(model, mean=model.mean + 1), tmp_path)


WRONG = [
    ("encode absent.mp4 o.gnvc", 66, "absent.mp4"),
    ("encode empty.mp4 o.gnvc", None, "empty.mp4"),
    ("encode text.mp4 o.gnvc", 65, "text.mp4"),
    ("encode dot.gif o.gnvc", 65, "dot.gif: the frame size (width x height) is 1x1"),
    ("encode clip.mp4 o.gnvc --fps 2000", 65, "clip.mp4: the frame rate is 2000/1"),
    ("encode damaged.mkv o.gnvc", 65, "damaged.mkv: damaged:"),
    ("encode clip.mp4 o.gnvc --stream 1", 65, "clip.mp4: has no video stream 1"),
    ("encode . o.gnvc", None, "."),
    ("encode clip.mp4 clip.gnvc", 73, "clip.gnvc"),
    ("encode clip.mp4 clip.mp4 --force", 73, "is the input"),
    ("encode clip.mp4 ./clip.mp4 --force", 73, "is the input"),
    ("encode clip.mp4 .", 73, "is a folder"),
    ("encode clip.mp4 . --force", 73, "is a folder"),
    ("encode clip.mp4 new/", 73, "is a folder"),
    ("decode stream.mkv stream.mkv --force", 73, "is the input"),
    ("encode clip.mp4 nowhere/o.gnvc", 73, "nowhere/o.gnvc"),
    ("encode clip.mp4 o.gnvc --qp 64", 2, "got 64"),
    ("encode clip.mp4 o.gnvc --effort 2", 2, "--effort must be in [0, 1], got 2"),
    ("encode clip.mp4 o.gnvc --qp 20 --max-size 9k", 2, "--qp and --max-size exclude each other"),
    ("encode clip.mp4 o.gnvc --bitrate fast", 2, "--bitrate must be a positive number such as"),
    ("encode clip.mp4 o.gnvc --bpp -1", 2, "a target must be a positive number, got -1"),
    ("encode - o.gnvc --max-size 8M", 2, "an input that can be read again, which stdin cannot"),
    ("encode clip.mp4 o.gnvc --qp 9 --one-pass", 2, "--one-pass needs --bitrate or --bpp"),
    ("encode clip.mp4 o.gnvc --max-size 1", 2, "1 bytes cannot be met; the nearest is"),
    ("encode clip.mp4 o.gnvc --gop 6", 2, "got 6"),
    ("encode clip.mp4 o.gnvc --size 12", 2, "--size must be WIDTHxHEIGHT"),
    ("encode clip.mp4 o.gnvc --devices 99", 2, "needs 99 devices"),
    ("decode clip.gnvc o.mkv --devices 2", 2, "9 columns"),
    ("decode absent.gnvc o.mkv", 66, "absent.gnvc"),
    ("decode clip.mp4 o.mkv", 10, "not a gnvc file"),
    ("decode short.gnvc o.mkv", 20, "short.gnvc"),
    ("decode flipped.gnvc o.mkv", 21, "flipped.gnvc"),
    ("decode swapped.gnvc o.mkv", 22, "swapped.gnvc"),
    ("decode wide.gnvc o.mkv", None, "wide.gnvc"),
    ("decode huge.gnvc o.mkv", 13, "16384x8192"),
    ("decode clip.gnvc o.mkv --max-pixels 2000", 13, "70x40"),
    ("decode clip.gnvc o.mkv --model other.safetensors", 14, "made with codec"),
    ("decode clip.gnvc o.mkv --model absent", 66, "absent"),
    ("decode clip.gnvc o.mkv --model text.mp4", 15, "not a model file"),
    ("decode clip.gnvc o.mkv --t-start 0.5", 2, "--t-start needs --refiner"),
    ("decode clip.gnvc o.mkv --refiner other.safetensors", 2, "this model has no refiner"),
    ("decode clip.gnvc o.mkv --decoder .", 66, "no ported decoder in this folder"),
    ("decode clip.gnvc clip.mp4", 73, "clip.mp4"),
    ("info text.mp4", 10, "not a gnvc file"),
]


@pytest.mark.parametrize(("line", "code", "text"), WRONG, ids=[w[0] for w in WRONG])
def test_errors_are_one_line_and_leave_nothing_behind(place, monkeypatch, capsys, line, code, text):
    monkeypatch.chdir(place)
    before = {p.name: p.stat().st_mtime_ns for p in place.iterdir()}
    command = line.split()
    if command[0] != "info" and "--model" not in command:
        command += ["--model", "m.safetensors"]
    got = run(*command)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert got == code if code else got > 0
    assert error.startswith("gnvc: ") and text in error
    assert {p.name: p.stat().st_mtime_ns for p in place.iterdir()} == before


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--fps 30/0", "must be a positive number such as 25"),
        ("--fps 0", "must be a positive number"),
        ("--fps -25", "must be a positive number"),
        ("--fps nan", "must be a positive number"),
        ("--frames 0", "must be at least 1, got 0"),
        ("--frames -3", "must be at least 1, got -3"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(option, text, capsys):
    name, value = option.split()
    assert run("encode", "clip.mp4", "o.gnvc", f"{name}={value}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"gnvc: clip.mp4: {name} ") and text in error


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("encode a.mp4 o.gnvc --frames 1.5", "--frames"),
        ("encode a.mp4 o.gnvc --qp", "--qp"),
        ("encode a.mp4 o.gnvc --nonsense 3", "--nonsense"),
        ("encode", "INPUT"),
        ("nonsense a.mp4", "nonsense"),
        ("plan --topology v5p:2x2x1", "--config"),
        ("", "encode"),
    ],
)
def test_arguments_that_cannot_be_parsed_exit_with_2(line, text, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*line.split())
    assert caught.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_describes_every_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"Example: gnvc {command} " in text
    module, _, name = cli.COMMANDS[command][0].partition(":")
    function = getattr(importlib.import_module(f"gnvc_jax.commands.{module}"), name)
    described = re.findall(r"^        (\w+): \S", function.__doc__, re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)


def test_help_lists_every_command_and_imports_no_jax():
    code = "import sys; from gnvc_jax.cli import main\n"
    code += "try: main(['--help'])\nfinally: assert not {'jax', 'scipy', 'av'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f" {command} " in done.stdout for command in cli.COMMANDS)


def test_limiting_frames_ignores_damage_after_them(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    model = "--model", "m.safetensors", "--force"
    assert run("encode", "damaged.mkv", "o.gnvc", "--frames", 12, *model) == 0
    assert "12 frames" in capsys.readouterr().err
    assert run("encode", "damaged.mkv", "o.gnvc", "--frames", 13, *model) == 65
    assert run("encode", "damaged.mkv", "o.gnvc", "--tolerant", *model) == EXIT_PARTIAL
    assert "damaged.mkv: damaged: the decoder had to make up" in capsys.readouterr().err
    (place / "o.gnvc").unlink()


def test_encoding_to_a_size(place, tmp_path, capsys):
    """Nothing is larger than a megabyte, so the best level is taken."""
    out, model = tmp_path / "o.gnvc", ("--model", place / "m.safetensors")
    assert run("encode", place / "clip.mp4", out, "--max-size", "1M", *model) == 0
    assert ", qp 0, " in capsys.readouterr().err
    best = tmp_path / "best.gnvc"
    assert run("encode", place / "clip.mp4", best, "--qp", 0, *model) == 0
    assert out.read_bytes() == best.read_bytes()


def test_encoding_in_one_pass_says_what_was_wanted(place, tmp_path, capsys):
    args = "--one-pass", "--bpp", 0.5, "--gop", 5, "--model", place / "m.safetensors"
    assert run("encode", place / "clip.mp4", tmp_path / "o.gnvc", *args) == 0
    assert "bpp, " in (text := capsys.readouterr().err) and ", 0.50000 bpp wanted, " in text
    with StreamReader(tmp_path / "o.gnvc") as reader:
        assert [group.n_frames for group in reader.groups()] == [5, 1]


def test_output_equal_to_input_is_refused_through_links_and_stdin(place, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes((place / "clip.mp4").read_bytes())
    (tmp_path / "soft").symlink_to("clip.mp4")
    os.link(tmp_path / "clip.mp4", tmp_path / "hard")
    for name in ("soft", "hard"):
        assert run("encode", tmp_path / "clip.mp4", tmp_path / name, "--force") == 73
    stdin = os.dup(0)
    try:
        with open(tmp_path / "clip.mp4") as opened:
            os.dup2(opened.fileno(), 0)
        assert run("encode", "-", tmp_path / "hard", "--force") == 73
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert capsys.readouterr().err.count("is the input") == 3
    assert (tmp_path / "clip.mp4").read_bytes() == (place / "clip.mp4").read_bytes()


def test_encoding_into_a_named_pipe(place, tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    args = "--gop", 5, "--qp", 20, "--model", place / "m.safetensors"
    assert run("encode", place / "clip.mp4", pipe, *args) == 0
    reader.join()
    assert got == [(place / "clip.gnvc").read_bytes()] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coding.CountingFile, "write", write)
    assert run("encode", "clip.mp4", "o.gnvc", "--model", "m.safetensors") == 74
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(place.iterdir()) == before


def test_tolerant_decoding_keeps_the_frame_count(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    args = ("decode", "flipped.gnvc", "t.mkv", "--model", "m.safetensors", "--tolerant")
    assert run(*args) == EXIT_PARTIAL
    assert "replaced" in capsys.readouterr().err


def test_tolerant_decoding_of_a_cut_stream_invents_no_frames(place, tmp_path, capsys):
    """The clip of 6 frames has groups of 5 and 1; the file does not say 6 anywhere else."""
    stream = (place / "clip.gnvc").read_bytes()
    with StreamReader(stream) as reader:
        one, two = reader.index()
    for cut, frames in ((one.offset + one.size // 2, 5), (two.offset + two.size - 1, 6)):
        (tmp_path / "cut.gnvc").write_bytes(stream[:cut])
        out = tmp_path / f"{cut}.mkv"
        args = "--model", place / "m.safetensors", "--tolerant"
        assert run("decode", tmp_path / "cut.gnvc", out, *args) == EXIT_PARTIAL
        with av.open(str(out)) as video:
            assert len(list(video.decode(video=0))) == frames
    (tmp_path / "cut.gnvc").write_bytes(stream[: one.offset + 9])
    assert run("decode", tmp_path / "cut.gnvc", tmp_path / "none.mkv", *args) == 20
    assert "missing bytes" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none.mkv").exists()


def test_info_on_a_stream_without_groups(place, tmp_path, capsys):
    with StreamReader(place / "clip.gnvc") as reader, open(tmp_path / "empty", "wb") as file:
        StreamWriter(file, reader.header).close()
    assert run("info", tmp_path / "empty") == 0
    assert "70x40, 0 frames" in capsys.readouterr().out


def test_counting_file_counts_bytes():
    out = coding.CountingFile(io.BytesIO())
    out.write(b"123")
    out.write(b"45")
    assert out.tell() == 5


def test_unexpected_errors_keep_their_traceback(place, monkeypatch):
    error = ValueError("in a kernel")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gnvc_jax.coder.Coder.encode_frames", fail)
    with pytest.raises(ValueError) as caught:
        run("encode", place / "clip.mp4", place / "o.gnvc", "--model", place / "m.safetensors")
    assert caught.value is error and not (place / "o.gnvc").exists()
