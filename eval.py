"""Measures a model on videos: quality against the size of real files, beside standard codecs.

`eval.py compare A.json B.json` puts two runs side by side (`eval.py compare --help`).
"""

import argparse
import functools
import math
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from gnvc_jax.arguments import MAX_STEPS
from gnvc_jax.data.left_out import MAX_SHARE
from gnvc_jax.errors import GnvcError
from gnvc_jax.evaluation import paper
from gnvc_jax.evaluation.anchors import ANCHORS
from gnvc_jax.evaluation.clips import find_clips, read_clip
from gnvc_jax.evaluation.compare import ResultsError, compare, read_results
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.evaluation.points import AutoencoderPoint, FilePoint
from gnvc_jax.evaluation.quality import DEFAULT, METRICS, WITH_WEIGHTS, Meter
from gnvc_jax.evaluation.report import write_report
from gnvc_jax.evaluation.sweep import Sweep
from gnvc_jax.evaluation.tables import write_results
from gnvc_jax.evaluation.workers import run_in_processes
from gnvc_jax.files import is_same_file, write_whole
from gnvc_jax.runtime import use_compilation_cache

EXIT_LEFT_OUT = 3

EXAMPLE = """example:
  python eval.py --model small --data clips/ --qp 8,24,40,56 --vae --anchors x264,x265 --out results

Options may also stand in a file, given as @FILE and quoted as in a shell; lines that begin with #
are comments. configs/evaluation/gnvc_vd.txt has those of the paper's experiments.

Records are kept in OUT/records; the same command again goes on where it stopped. The table is
printed and written to OUT/results.md, beside results.json, results.csv and plots/. To look at it
all, open OUT/report.html.
Exit status: 0 good, 1 something failed, 2 wrong use, 3 all is measured but for clips that could not
be read, at most a tenth of all; they are listed among the failures."""

COMPARE_EXAMPLE = """example:
  python eval.py compare before/results.json after/results.json --out compare.md

Exit status: 0 good, 1 nothing in common, 2 wrong use."""


def names(choices):
    """Reader of a comma-separated list of names, or 'all'."""

    def read(text: str) -> tuple[str, ...]:
        values = choices if text == "all" else tuple(filter(None, text.split(",")))
        if unknown := [value for value in values if value not in choices]:
            raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(choices)}")
        return tuple(values)

    return read


def numbers(last: int):
    """Reader of a comma-separated list of numbers 0..last."""

    def read(text: str) -> tuple[int, ...]:
        try:
            values = tuple(map(int, filter(None, text.split(","))))
        except ValueError:
            values = (-1,)
        if not all(0 <= value <= last for value in values):
            raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers 0 to {last}")
        return values

    return read


def multiples(text: str) -> tuple[float, ...]:
    """Reader of a comma-separated list of positive numbers."""
    try:
        values = tuple(map(float, filter(None, text.split(","))))
    except ValueError:
        values = (0.0,)
    if not values or not all(0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of positive numbers")
    return values


def weights(text: str) -> tuple[str, Path]:
    """Reader of METRIC=FILE."""
    name, _, file = text.partition("=")
    if name not in WITH_WEIGHTS or not file:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no METRIC=FILE with a metric of {', '.join(WITH_WEIGHTS)}"
        )
    return name, Path(file)


def plain(value):
    """The value of an option as JSON takes it."""
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = lambda line: (
        [] if line.lstrip().startswith("#") else shlex.split(line)
    )
    add = parser.add_argument
    add("--model", default="small", help="name or path of a model (default: %(default)s)")
    add("--data", nargs="+", type=Path, required=True, help="videos, or folders with videos")
    add(
        "--set",
        choices=paper.SEQUENCES,
        help="of sequences in --data, told by their names; beside the results stands what the "
        "paper of GNVC-VD published for it",
    )
    add("--qp", type=numbers(63), default=(8, 24, 40, 56), help="levels (default: 8,24,40,56)")
    add(
        "--steps",
        type=numbers(MAX_STEPS),
        default=(None,),
        help="of refinement, as 0,1,5 (default: what gnvc decode does by itself)",
    )
    add("--vae", action="store_true", help="also the autoencoder alone")
    add("--anchors", type=names(ANCHORS), default=(), help=f"of {','.join(ANCHORS)}, or all")
    add(
        "--anchor-rates",
        type=multiples,
        default=(1.0,),
        help="of the anchors, as multiples of the rate of each of our files (default: 1); BD-rates "
        "need rates at which the qualities of both meet",
    )
    add(
        "--metrics",
        type=names(METRICS),
        default=DEFAULT,
        help=f"of {','.join(METRICS)}, or all (default: {','.join(DEFAULT)}; "
        "lpips_vgg and dists take seconds a frame without an accelerator)",
    )
    add(
        "--weights",
        nargs="+",
        type=weights,
        default=[],
        metavar="METRIC=FILE",
        help=f"your .safetensors for {', '.join(WITH_WEIGHTS)}",
    )
    add(
        "--flow",
        type=Path,
        metavar="DIR",
        help="flow of yours for e_warp: DIR/CLIP/forward_00000.flo, backward_00000.flo, ...",
    )
    add(
        "--range",
        choices=("file", "full"),
        default="file",
        help="range of YUV: what the file says, or full as in DCVC's figures (default: file)",
    )
    add("--frames", type=int, default=96, help="first frames of each video (default: 96)")
    add("--gop", type=int, default=25, help="frames of a group, 1 + 4k (default: 25)")
    add("--processes", type=int, default=1, help="clips at once (default: 1)")
    add("--out", type=Path, required=True, help="folder for records and results")
    add("--force", action="store_true", help="measure again what is on record")
    options = parser.parse_args(arguments)
    if options.frames < 1:
        parser.error("--frames must be positive")
    if options.processes < 1:
        parser.error("--processes must be positive")
    if options.gop < 1 or (options.gop - 1) % 4:
        parser.error(f"--gop {options.gop} is not 1 + 4k")
    if unused := [name for name, _ in options.weights if name not in options.metrics]:
        parser.error(f"--weights for {unused[0]}, which is not among --metrics")
    if options.flow and "e_warp" not in options.metrics:
        parser.error("--flow, but e_warp is not among --metrics")
    if options.flow and not options.flow.is_dir():
        parser.error(f"--flow {options.flow}: no such folder")
    return options


def compare_runs(arguments) -> int:
    parser = argparse.ArgumentParser(
        prog="eval.py compare",
        description="Two runs side by side: their differences for every clip and point in common.",
        epilog=COMPARE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="results.json of the first run")
    parser.add_argument("b", type=Path, metavar="B.json", help="of the second")
    parser.add_argument("--out", type=Path, help="file for the table, which is printed in any case")
    options = parser.parse_args(arguments)
    paths = options.a, options.b
    if options.out and any(is_same_file(path, options.out) for path in paths):
        parser.error(f"--out {options.out}: is one of the inputs")
    try:
        text, common = compare(*map(read_results, paths), list(map(str, paths)))
        if options.out:
            write_whole(options.out, text)
    except ResultsError as error:
        print(f"eval.py compare: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return int(not common)


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    # The evaluation takes options only, so a first word that is none must be a subcommand.
    if arguments[:1] == ["compare"]:
        return compare_runs(arguments[1:])
    options = parse(arguments)
    use_compilation_cache()
    try:
        paths = find_clips(options.data)
        if options.set:
            paths = paper.sequences(options.set, paths)
    except (GnvcError, FileNotFoundError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    clips = {
        name: functools.partial(read_clip, path, name, options.frames, options.range == "full")
        for name, path in paths.items()
    }
    meter = Meter(options.metrics, dict(options.weights))
    points = [
        FilePoint(options.model, qp, steps, options.gop)
        for qp in options.qp
        for steps in options.steps
    ]
    points += [AutoencoderPoint(options.model)] * options.vae
    anchored = len(options.qp) * len(options.anchors) * len(options.anchor_rates)
    total = len(clips) * (len(points) + anchored)
    with tqdm(total=total, unit="point", disable=None) as bar:

        def progress(label: str, status: str) -> None:
            bar.set_description(label)
            bar.update()
            if bar.disable or status == "failed":  # not a terminal, or worth keeping in sight
                bar.write(f"{label}: {status}", file=sys.stderr)

        settings = options.force, progress, options.flow, options.anchor_rates
        sweep = Sweep(options.out, meter, *settings)
        if options.processes > 1:
            records = run_in_processes(options.processes, sweep, clips, points, options.anchors)
        else:
            records = sweep.run(clips, points, options.anchors)
    published = None
    if options.set:
        published = paper.beside(records, options.set, options.range == "full")
    given = {name: plain(value) for name, value in vars(options).items()}
    text = write_results(options.out, records, sys.argv, environment(), published, given)
    print(text, end="")
    results = read_results(options.out / "results.json")
    print(f"report: {write_report(options.out, results)}", file=sys.stderr)
    failed = [record for record in records if record["status"] != "ok"]
    unread = [record for record in failed if not record["point"]]
    if len(failed) == len(unread) <= MAX_SHARE * len(clips):
        return EXIT_LEFT_OUT if unread else 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
