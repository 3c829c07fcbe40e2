"""A run that is killed again and again ends as one that nobody disturbed."""

import random
import time

import numpy as np
import pytest
from run_processes import finish, losses, start

STEPS, KILLS = 300, 30
MESH = ("--mesh", "data=2,fsdp=2")


def steps_done(out):
    """The last step in the log; 0 if there is none, or if its line is being written."""
    try:
        return max(losses(out), default=0)
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path):
    calm, soaked = tmp_path / "calm", tmp_path / "soaked"
    finish(start(calm, 2, "--optim.steps", STEPS, *MESH))
    chance = random.Random(0)
    for kill in range(KILLS):
        running = start(soaked, 2, "--optim.steps", STEPS, *MESH)
        if chance.random() < 0.3:  # while it starts
            time.sleep(chance.uniform(0, 8))
        else:  # within some steps: while it trains, or writes a checkpoint
            aim = min(STEPS - 1, steps_done(soaked) + chance.randint(1, 2 * STEPS // KILLS))
            while steps_done(soaked) < aim and all(p.poll() is None for p in running):
                time.sleep(0.005)
        # One dies at first, as a lost host does; its cluster then ends the other.
        chance.shuffle(running)
        for process in running:
            process.kill()
            process.communicate()
            time.sleep(chance.choice([0, 0.2]))
        print(f"kill {kill + 1}: after step {steps_done(soaked)}", flush=True)
    finish(start(soaked, 2, "--optim.steps", STEPS, *MESH))
    expected, found = losses(calm), losses(soaked)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)

    def files(out):
        """All files but those of arrays, whose names are drawn at random."""
        return sorted(
            str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "/d/" not in str(p)
        )

    assert files(soaked) == files(calm)
