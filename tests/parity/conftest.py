"""Measured errors, listed at the end of the run."""

import numpy as np
import pytest

LIMIT = 1e-5


@pytest.fixture(scope="session")
def tiny_transformer():
    """Sizes of a small DiT, as diffusers' transformers take them."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 4,
    }


@pytest.fixture
def same(record_property):
    """same(what, ours, theirs): the largest difference is at most 1e-5 of the largest value."""

    def check(what, ours, theirs):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        largest = np.abs(theirs).max()
        assert largest > 0.01
        error = float(np.abs(ours - theirs).max() / largest)
        record_property(what, error)
        assert error <= LIMIT, f"{what}: relative error {error:.1e}"

    return check


def pytest_terminal_summary(terminalreporter):
    rows = [
        (report.nodeid.rpartition("::")[2], *pair)
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, ())
        if "parity" in report.nodeid
        for pair in report.user_properties
    ]
    if rows:
        terminalreporter.section("relative errors against the reference")
        for test, what, error in sorted(rows):
            terminalreporter.line(f"{error:.1e}  {test}: {what}")
