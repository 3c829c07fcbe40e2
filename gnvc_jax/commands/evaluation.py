"""Commands that measure: rate and quality of a model on videos, and two such runs side by side."""

import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm
from tyro.conf import Positional, arg

from gnvc_jax.commands.options import (
    EXIT_PARTIAL,
    MAX_STEPS,
    Force,
    check_range,
    names,
    numbers,
)
from gnvc_jax.data.left_out import MAX_SHARE
from gnvc_jax.errors import UsageError
from gnvc_jax.evaluation import paper
from gnvc_jax.evaluation.anchors import ANCHORS
from gnvc_jax.evaluation.clips import find_clips, read_clip
from gnvc_jax.evaluation.compare import ResultsError, compare, read_results
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.evaluation.points import AutoencoderPoint, FilePoint, refiner_identity
from gnvc_jax.evaluation.quality import DEFAULT, METRICS, WITH_WEIGHTS, QualityMeter
from gnvc_jax.evaluation.report import write_report
from gnvc_jax.evaluation.sweep import Sweep
from gnvc_jax.evaluation.tables import write_results
from gnvc_jax.evaluation.workers import run_in_processes
from gnvc_jax.files import is_same_file, write_whole

EXIT_FAILED = 1


def metric_files(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Converts METRIC=FILE arguments.

    Raises:
        ValueError: If a metric needs no weights.
    """
    pairs = []
    for text in texts:
        name, _, file = text.partition("=")
        if name not in WITH_WEIGHTS or not file:
            metrics = ", ".join(WITH_WEIGHTS)
            raise ValueError(f"expected METRIC=FILE with a metric of {metrics}, got {text!r}")
        pairs.append((name, Path(file)))
    return tuple(pairs)


Numbers = Annotated[tuple[int, ...], numbers(int, "N,N,...")]
Factors = Annotated[tuple[float, ...], numbers(float, "X,X,...")]
Anchors = Annotated[tuple[str, ...], names(ANCHORS)]
Metrics = Annotated[tuple[str, ...], names(METRICS)]
MetricFiles = Annotated[
    tuple[tuple[str, Path], ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="METRIC=FILE [METRIC=FILE ...]",
        instance_from_str=metric_files,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [f"{name}={file}" for name, file in value],
    ),
]


def evaluate(
    *,
    data: tuple[Path, ...],
    out: Path,
    model: str = "small",
    refiner: str | None = None,
    t_start: float | None = None,
    sequences: Annotated[
        Literal[tuple(paper.SEQUENCES)] | None, arg(name="set")  # type: ignore[valid-type]
    ] = None,
    qp: Numbers = (8, 24, 40, 56),
    steps: Numbers | None = None,
    vae: bool = False,
    anchors: Anchors = (),
    anchor_rates: Factors = (1.0,),
    metrics: Metrics = DEFAULT,
    weights: MetricFiles = (),
    flow: Path | None = None,
    yuv_range: Annotated[Literal["file", "full"], arg(name="range")] = "file",
    frames: int = 96,
    gop: int = 25,
    processes: int = 1,
    force: Force = False,
) -> int:
    """Measure rate and quality of a model on videos, beside standard codecs.

    Example: gnvc eval --data clips --qp 8,24,40,56 --vae --anchors x264,x265 --out results

    Rates are those of whole files, which are decoded in processes of their own. The tables are
    printed and written to OUT/results.md, results.json and results.csv; OUT/report.html shows
    curves and pictures. Records are kept in OUT/records: rerun the same command to resume.

    Options can also be read from a file, given as @FILE or as the @NAME of a shipped one:
    @evaluation/gnvc_vd has those of the experiments of the paper.

    Exit codes: 0 success; 1 something failed; 2 usage error; 3 everything was measured except clips
    that could not be read, at most a tenth of all.

    Args:
        data: Videos, or folders with videos.
        out: Folder for records and results.
        model: Name of a shipped model, or path of a model file.
        refiner: Refiner to evaluate in place of the model's: a folder made by `gnvc port` with a
            DiT of the model's VAE, a model file, or a run.
        t_start: Flow time at which --refiner begins, see `gnvc decode`.
        sequences: Test set that --data holds, recognised by file names; the figures that the
            GNVC-VD paper published for it are put beside the results.
        qp: Quality levels to evaluate.
        steps: Refinement steps to evaluate, for example 0,1,5; if not given, the default of
            `gnvc decode`.
        vae: Also evaluate the autoencoder alone, without coding.
        anchors: Standard codecs to compare with: x264, x265, svtav1, vvc, or "all".
        anchor_rates: Rates of the anchors as multiples of the rate of each file of the model.
            BD-rates need rates at which the qualities of both overlap.
        metrics: Metrics to compute, or "all". lpips_vgg and dists take seconds per frame without an
            accelerator.
        weights: Your own weights (.safetensors) for metrics that need them.
        flow: Folder with your own optical flow for e_warp: CLIP/forward_00000.flo,
            CLIP/backward_00000.flo, and so on.
        yuv_range: Range of YUV samples: as the file says, or "full" as in the figures of DCVC.
        frames: Maximum number of frames per video.
        gop: Frames per group, 1 + 4k.
        processes: Number of clips to evaluate at the same time.
        force: Measure again what is already on record.
    """
    # First of all: here `locals()` holds the options and nothing else. The report lists them.
    given = {name: json_ready(value) for name, value in locals().items()}
    check_range("--frames", frames, 1)
    check_range("--processes", processes, 1)
    for level in qp:
        check_range("--qp", level, 0, 63)
    for count in steps or ():
        check_range("--steps", count, 0, MAX_STEPS)
    if gop < 1 or (gop - 1) % 4:
        raise UsageError(f"--gop must be 1 + 4k, got {gop}")
    if not anchor_rates or not all(0 < factor < float("inf") for factor in anchor_rates):
        raise UsageError("--anchor-rates must be positive numbers")
    if unused := [name for name, _ in weights if name not in metrics]:
        raise UsageError(f"--weights names {unused[0]}, which is not among --metrics")
    if t_start is not None and refiner is None:
        raise UsageError("--t-start needs --refiner")
    if t_start is not None and not 0 <= t_start < 1:
        raise UsageError(f"--t-start must be in [0, 1), got {t_start:g}")
    if flow and "e_warp" not in metrics:
        raise UsageError("--flow needs e_warp among --metrics")
    if flow and not flow.is_dir():
        raise UsageError(f"--flow {flow}: no such folder")
    # Only to see that there is one: a wrong path should fail now, not once for every point.
    if refiner is not None:
        try:
            refiner_identity(refiner)
        except FileNotFoundError as error:
            raise UsageError(f"--refiner {error}") from error
    try:
        paths = find_clips(data)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    if sequences:
        paths = paper.sequences(sequences, paths)

    # Read when their turn comes: a test set does not fit into memory. Partials, unlike lambdas, can
    # be sent to worker processes.
    clips = {
        name: functools.partial(read_clip, path, name, frames, yuv_range == "full")
        for name, path in paths.items()
    }
    # Every level with every number of steps; None leaves the number to the decoder.
    points = [
        FilePoint(model, level, count, gop, refiner, t_start)
        for level in qp
        for count in steps or (None,)
    ]
    points += [AutoencoderPoint(model)] * vae
    total = len(clips) * (len(points) + len(qp) * len(anchors) * len(anchor_rates))
    with tqdm(total=total, unit="point", disable=None) as bar:

        def progress(label: str, status: str) -> None:
            bar.set_description(label)
            bar.update()
            if bar.disable or status == "failed":  # not a terminal, or worth keeping in sight
                bar.write(f"{label}: {status}", file=sys.stderr)

        sweep = Sweep(
            out, QualityMeter(metrics, dict(weights)), force, progress, flow, anchor_rates
        )
        if processes > 1:
            records = run_in_processes(processes, sweep, clips, points, anchors)
        else:
            records = sweep.run(clips, points, anchors)
    published = None
    if sequences:
        published = paper.beside(records, sequences, yuv_range == "full")
    print(write_results(out, records, sys.argv, environment(), published, given), end="")
    print(f"report: {write_report(out, read_results(out / 'results.json'))}", file=sys.stderr)

    failed = [record for record in records if record["status"] != "ok"]
    unread = [record for record in failed if not record["point"]]  # clips, before any point
    # A few videos that cannot be read are forgiven; a point that failed never is.
    if len(failed) == len(unread) <= MAX_SHARE * len(clips):
        return EXIT_PARTIAL if unread else 0
    return EXIT_FAILED


def compare_runs(a: Positional[Path], b: Positional[Path], *, out: Path | None = None) -> int:
    """Compare two evaluations: differences for every clip and point that both have.

    Example: gnvc compare before/results.json after/results.json --out compare.md

    Exit codes: 0 success; 1 nothing in common; 2 usage error.

    Args:
        a: results.json of the first run.
        b: results.json of the second run.
        out: File to write the table to; it is printed in any case.
    """
    if out and any(is_same_file(path, out) for path in (a, b)):
        raise UsageError(f"--out {out}: is one of the inputs")
    try:
        text, common = compare(read_results(a), read_results(b), [str(a), str(b)])
    except ResultsError as error:
        raise UsageError(str(error)) from error
    if out:
        write_whole(out, text)
    print(text, end="")
    return 0 if common else EXIT_FAILED


def json_ready(value: Any) -> Any:
    """The value of an option as JSON can hold it."""
    if isinstance(value, list | tuple):
        return [json_ready(x) for x in value]
    return str(value) if isinstance(value, Path) else value
