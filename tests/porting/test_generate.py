"""What `gnvc generate` refuses, before any sampling. Its results are compared in tests/parity."""

import numpy as np

from gnvc_jax import cli
from gnvc_jax.porting.port import port


def test_generate_says_what_is_wrong(public, tmp_path, monkeypatch, capsys):
    public("vae")
    port(public("dit"), tmp_path / "weights", progress=False)
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.zeros((3, 24), np.float32))
    np.save("wide.npy", np.zeros((3, 25), np.float32))
    before = sorted(tmp_path.iterdir())
    both = "--prompt a.npy --negative a.npy"
    for arguments, code, message in (
        ("out.mkv", 2, "weights has no prompt of its own; name one with --prompt FILE"),
        ("out.mkv --prompt a.npy", 2, "--guidance 5 needs --negative FILE"),
        ("out.mkv --prompt absent.npy --guidance 1", 66, "absent.npy"),
        ("out.mkv --prompt wide.npy --negative a.npy", 25, "(1, 3, 25), expected (1, 1 to 512"),
        (f"out.mkv {both} --frames 80", 2, "the number of frames must be 1 + 4k, got 80"),
        (f"out.mkv {both} --size 100x64", 2, "multiples of 16, got 100x64"),
        (f"out.mkv {both} --size 100", 2, "--size must be WIDTHxHEIGHT"),
        (f"out.mkv {both} --steps 0", 2, "--steps must be at least 1, got 0"),
        (f"out.mkv {both} --shift 0 --frames 1 --size 16x16", 2, "a positive shift"),
        (f"out.avi {both}", 73, "the output must be"),
        (f"out.mkv {both} --vae small", 2, "works on latents of 16 channels, those of small have"),
    ):
        assert cli.main(f"generate {arguments} --weights weights".split()) == code, arguments
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert cli.main(f"generate out.mkv {both} --weights public".split()) == 66
    assert "public: no ported dit in this folder" in capsys.readouterr().err
