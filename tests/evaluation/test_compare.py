"""eval.py compare: differences by hand, what is not the same, and files that are no results."""

import copy
import json

import pytest

from gnvc_jax.evaluation.compare import ResultsError, compare, read_results


def record(clip, point, size, psnr, lpips=None, sha256="s" * 64, frames=4):
    return {
        "clip": clip,
        "point": point,
        "status": "ok",
        "source": {"width": 8, "height": 6, "frames": frames, "fps": "25", "sha256": sha256},
        "codec": {"model": "m", "model_sha256": "f" * 64},
        "rate": {"bytes": size, "bpp": size / 100, "kbps": size / 10},
        "quality": {"psnr_rgb": psnr, "lpips_alex": lpips},
        "temporal": {},
    }


def results(*records, **env):
    env = {"cpu": "c", "devices": ["d"], "packages": {"jax": "1"}, **env}
    return {"schema": "gnvc-eval/1", "created": "now", "env": env, "records": list(records)}


A = results(
    record("x", "p", 1000, 30.0, 0.5), record("y", "p", 2000, 32.0), record("x", "q", 10, 20.0)
)
NAMES = ("a.json", "b.json")


def row(text, *cells):
    """The cells of the only line that begins with these."""
    start = f"| {' | '.join(cells)} |"
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_and_means():
    b = results(record("x", "p", 900, 30.5, 0.4), record("y", "p", 2000, 31.0, 0.9))
    text, common = compare(A, b, NAMES)
    assert common
    assert "1000 → 900 (-10.0 %)" in row(text, "x", "p")
    assert "30.00 → 30.50 (+0.50)" in row(text, "x", "p")
    assert "32.00 → 31.00 (-1.00)" in row(text, "y", "p")
    mean = row(text, "p", "2")
    assert "1500 → 1450 (-3.3 %)" in mean
    assert "31.00 → 30.75 (-0.25)" in mean
    assert "0.5000 → 0.4000 (-0.1000)" in mean  # of the only clip that both have it of
    assert "Only A has points: q." in text


def test_a_run_equals_itself():
    text, common = compare(A, A, NAMES)
    assert common
    differences = [line for line in text.splitlines() if line.startswith("- ")]
    assert differences == ["- A: a.json, now", "- B: b.json, now"]
    assert "(+0.00)" in text and "(+0.0 %)" in text


def test_differences_in_setup_are_listed():
    b = results(
        record("x", "p", 1000, 30.0, sha256="t" * 64, frames=9),
        {"clip": "y", "point": "p", "status": "failed", "error": "E: broke"},
        record("z|1", "p", 1000, 30.0),
        packages={"jax": "2"},
    )
    text, common = compare(A, b, NAMES)
    assert not common
    for line in (
        "Clip x differs and is not compared: 4 frames of 8×6 at 25 (ssssssss) in A, "
        "9 frames of 8×6 at 25 (tttttttt) in B.",
        "Only A has clips: y.",
        "Only B has clips: z\\|1.",
        "Only A has points: q.",
        "Only A has metrics: LPIPS alex.",
        "Failed in B: y p.",
        "Package jax: 1 in A, 2 in B.",
        "No clip and point in common.",
    ):
        assert line in text
    other = copy.deepcopy(A)
    other["records"][-1] = record("y", "q", 1, 1.0)
    for r in other["records"]:
        r["codec"]["model_sha256"] = "e" * 64
    text, _ = compare(A, other, NAMES)
    assert "Model: m ffffffffffff in A, m eeeeeeeeeeee in B." in text
    assert "Only A has finished: x q." in text
    assert "Only B has finished: y q." in text


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[1]", "schema is None"),
        ('{"schema": "other/2"}', "schema is 'other/2', expected 'gnvc-eval/1'"),
        ('{"schema": "gnvc-eval/1", "created": "", "env": {}}', "lacks 'records'"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_files_that_are_not_results_are_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ResultsError, match=r"r\.json: ") as caught:
        read_results(path)
    assert reason in str(caught.value)
    path.write_text(json.dumps(A))
    assert read_results(path) == A
