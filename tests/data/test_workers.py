"""Worker processes of data sets end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, multiprocessing, time
import numpy as np
from gnvc_jax.data.clips import RandomRead, endless_batches

@dataclasses.dataclass(frozen=True)
class Numbers(RandomRead):
    count: int = 100
    left_out: None = None

    def read(self, element, rng):
        return np.array(element)

if __name__ == "__main__":
    batches = iter(endless_batches(100, Numbers(), batch=2, seed=0, num_workers=1))
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended; one that nobody waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_is_left_after_sigkill(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    try:
        assert workers and all(map(is_running, workers))
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while any(map(is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(map(is_running, workers))
    finally:
        process.kill()
        process.stdout.close()
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
