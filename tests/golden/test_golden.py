"""A stream and its model, made once: every arithmetic must read the same integers from it.

`symbols.sha256` was written by the plain reader: Python integers and the NumPy int64 network.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.bitstream import EntropyCoder, PlainCoder, StreamReader
from gnvc_jax.codec import scales
from gnvc_jax.coder import Coder
from gnvc_jax.model_file import load_model

FOLDER = Path(__file__).parent
EXPECTED = (FOLDER / "symbols.sha256").read_text().strip()


def digest(coder: Coder) -> str:
    """SHA-256 of all integers of the stream: z, y and index of each latent, then its motion."""
    sha = hashlib.sha256()
    with StreamReader(str(FOLDER / "stream.gnvc")) as reader:
        coder.check(reader.header)
        for group in reader.groups():
            for s in coder.symbols(reader.header, group):
                for array in (s.z, s.y, s.index):
                    sha.update(np.ascontiguousarray(array).tobytes())
            for field in coder.fields(reader.header, group):
                for array in field:
                    sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


@pytest.fixture
def coder():
    return Coder(load_model(FOLDER / "model.safetensors"))


def test_golden_stream_has_nontrivial_symbols(coder):
    with StreamReader(str(FOLDER / "stream.gnvc")) as reader:
        frames = list(coder.decode_frames(reader))
        symbols = [s for g in reader.groups() for s in coder.symbols(reader.header, g)]
        fields = [f for g in reader.groups() for f in coder.fields(reader.header, g)]
    assert len(frames) == 11 and frames[0].shape == (80, 120, 3)
    assert len(symbols) == 5 and all(np.any(s.y) for s in symbols)
    assert any(np.any(s.z) for s in symbols)
    assert any(np.any(f.coarse) for f in fields) and any(np.any(f.split) for f in fields)
    assert len(np.unique([s.index for s in symbols[:3]])) > 10


@pytest.mark.parametrize(
    ("dtype", "jitted"),
    [(jnp.float32, True), (jnp.bfloat16, True), (jnp.int32, True), (jnp.float32, False)],
)
def test_every_arithmetic_reads_the_golden_stream(coder, dtype, jitted):
    def network(tables, q_index, *integers):
        integers = (jnp.asarray(v, jnp.int32) for v in integers)
        return np.asarray(coder.functions._scale_index(tables, q_index, *integers, dtype=dtype))

    coder.functions._network = network
    with jax.disable_jit(not jitted):
        assert digest(coder) == EXPECTED


def test_numpy_and_plain_coder_read_the_golden_stream(coder):
    coder.entropy = EntropyCoder(coder.model.tables, PlainCoder)
    coder.functions._network = lambda tables, q_index, *v: scales.scale_index_numpy(
        coder.model.codec_config, tables, q_index, *v
    )
    assert digest(coder) == EXPECTED


def test_process_with_one_device_reads_the_golden_stream():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import test_golden as t, jax; "
    script += "assert jax.device_count() == 1; "
    script += "print(t.digest(t.Coder(t.load_model(t.FOLDER / 'model.safetensors'))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == EXPECTED, done.stderr
