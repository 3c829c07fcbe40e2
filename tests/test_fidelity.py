"""Change of blocks by a refiner, its limits, and its map."""

import imageio.v3 as imageio
import numpy as np
import pytest

from gnvc_jax import cli
from gnvc_jax.fidelity import block_change, change_map, limit_change
from gnvc_jax.pretrained import Codec


@pytest.fixture
def frames():
    """A frame of an odd size and a refined one whose change differs from block to block."""
    rng = np.random.default_rng(0)
    decoded = rng.integers(60, 196, (41, 70, 3), np.uint8)
    strength = rng.uniform(0, 30, (3, 5)).repeat(16, 0).repeat(16, 1)[:41, :70, None]
    refined = np.clip(decoded + strength * rng.normal(size=decoded.shape), 0, 255)
    return decoded, refined.astype(np.uint8)


def test_change_is_the_root_mean_square_of_each_block(frames):
    decoded, refined = frames
    change = block_change(decoded, refined)
    assert change.shape == (3, 5)
    for i, row in enumerate(change):
        for j, value in enumerate(row):
            place = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            difference = refined[place].astype(float) - decoded[place]
            assert value == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-5)


@pytest.mark.parametrize("most", [0.0, 1.0, 8.0, 20.0])
def test_no_block_changes_more_than_the_limit(frames, most):
    limited = limit_change(*frames, most)
    assert block_change(frames[0], limited).max() <= most
    # Nothing goes beyond what the refiner did, or the other way.
    kept, whole = (x.astype(int) - frames[0] for x in (limited, frames[1]))
    assert (kept * whole >= 0).all()
    assert (np.abs(kept) <= np.abs(whole)).all()


def test_a_limit_that_nothing_reaches_changes_nothing(frames):
    np.testing.assert_array_equal(limit_change(*frames, 1000.0), frames[1])


def test_the_share_that_is_kept_has_no_edges_at_blocks():
    decoded = np.full((64, 64, 3), 100, np.uint8)
    refined = decoded.copy()
    # One strongly changed block in a weakly changed frame.
    refined[...] += 8
    refined[16:32, 16:32] += 100
    kept = limit_change(decoded, refined, 8.0).astype(int) - decoded
    # Along a row above the block: the share falls towards it and rises again, step by step.
    assert np.abs(np.diff(kept[8, :, 0])).max() <= 1
    assert kept[60, 60, 0] == 8


def test_map_shows_change_as_grey():
    decoded = np.full((20, 30, 3), 100, np.uint8)
    refined = decoded.copy()
    refined[:16, 16:] += 16
    refined[16:] -= 99
    drawn = change_map(decoded, refined)
    assert drawn.shape == (20, 30, 3)
    assert (drawn[:16, :16] == 0).all() and (drawn[:16, 16:] == 128).all()
    assert (drawn[16:] == 255).all()


@pytest.fixture(scope="module")
def decode(tmp_path_factory, tiny_model):
    """Decodes a stream by the command line, with options; returns the frames.

    A second stream of the same video is marked "do not refine".
    """
    folder = tmp_path_factory.mktemp("fidelity")
    video = np.random.default_rng(1).integers(0, 256, (6, 40, 70, 3), np.uint8)
    (folder / "source").mkdir()
    for i, frame in enumerate(video):
        imageio.imwrite(folder / "source" / f"{i}.png", frame)

    def run(*options: str, stream: str = "plain") -> np.ndarray:
        out = folder / "out.mkv"
        assert cli.main(["decode", str(folder / f"{stream}.gnvc"), str(out), "-y", *options]) == 0
        return read(out)

    run.folder = folder
    # One codec for all commands, which then share its compiled programs.
    codec = Codec(tiny_model(refiner=True, motion=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gnvc_jax.pretrained.load_pretrained", lambda name: codec)
        for name, *more in (("plain",), ("marked", "--no-refine")):
            given = ["encode", str(folder / "source"), str(folder / f"{name}.gnvc"), "--gop", "5"]
            assert cli.main([*given, *more]) == 0
        yield run


def read(path) -> np.ndarray:
    return np.stack([frame for frame in imageio.imiter(path, plugin="pyav")])


def test_strength_goes_from_decoded_to_refined(decode):
    none, all_of_it = decode("--steps", "0").astype(int), decode().astype(int)
    np.testing.assert_array_equal(decode("--strength", "0"), none)
    np.testing.assert_array_equal(decode("--strength", "1"), all_of_it)
    # Where nothing is clipped, frames of a linear VAE are linear in the latents, up to rounding.
    inside = (all_of_it > 0) & (all_of_it < 255)
    half = decode("--strength", "0.5")
    assert np.abs(half - (none + all_of_it) / 2)[inside].max() <= 1
    assert np.abs(all_of_it - none).max() > 4


def test_guard_and_map(decode):
    plain, refined = decode("--steps", "0"), decode()
    path = decode.folder / "map.mkv"
    guarded = decode("--guard", "1.5", "--map", str(path), "--force")
    for given in zip(plain, refined, guarded, read(path), strict=True):
        np.testing.assert_array_equal(given[2], limit_change(given[0], given[1], 1.5))
        np.testing.assert_array_equal(given[3], change_map(given[0], given[2]))
    assert block_change(plain[3], refined[3]).max() > 1.5


def test_a_mark_in_the_stream_keeps_the_refiner_out_unless_asked_for(decode, capsys):
    np.testing.assert_array_equal(decode(stream="marked"), decode("--steps", "0"))
    assert 'is marked "do not refine"' in capsys.readouterr().err
    np.testing.assert_array_equal(decode("--steps", "1", stream="marked"), decode())


@pytest.mark.parametrize(
    "options, message",
    [
        ("--strength 1.5", "--strength must be in [0, 1], got 1.5"),
        ("--guard -1", "--guard must be at least 0"),
        ("--steps 0 --guard 3", "--guard and --map need refinement"),
        ("--map out.mkv", "--map out.mkv is the output"),
    ],
)
def test_wrong_options_are_refused(decode, capsys, monkeypatch, options, message):
    monkeypatch.chdir(decode.folder)
    assert cli.main(["decode", "plain.gnvc", "out.mkv", *options.split()]) == 2
    assert message in capsys.readouterr().err
