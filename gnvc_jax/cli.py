"""The program `gnvc`: finds a command, parses its arguments, and reports what goes wrong.

Commands live in `gnvc_jax.commands`. Adding one takes a function there and a line in COMMANDS. Only
the module of the chosen command is imported, so that `gnvc --help` needs no JAX.
"""

import errno
import functools
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from gnvc_jax.errors import GnvcError, UsageError
from gnvc_jax.shipped_configs import find_config

EXIT_MISSING, EXIT_DISK_FULL, EXIT_INTERRUPTED = 66, 74, 130

# Name of each command: its function, and what the list of commands says of it.
COMMANDS = {
    "encode": ("encoding:encode", "Encode a video to a .gnvc stream."),
    "decode": ("coding:decode", "Decode a .gnvc stream to a video."),
    "info": ("coding:info", "Print what a stream contains."),
    "demo": ("coding:demo", "Encode a clip, decode it in a new process, compare."),
    "encode-all": ("datasets:encode_all", "Encode many videos."),
    "eval": ("evaluation:evaluate", "Measure rate and quality of a model on videos."),
    "compare": ("evaluation:compare_runs", "Compare two evaluations."),
    "train": ("training:train", "Train one stage of the codec."),
    "release": ("training:release", "Write the model file of a training run."),
    "cache-latents": ("datasets:cache_latents", "Encode many videos to latents for training."),
    "cache-coded": ("datasets:cache_coded", "Code many videos, to train a refiner on them."),
    "make-shards": ("datasets:make_shards", "Pack many videos into shards for training."),
    "plan": ("training:plan", "Predict the cost of training or coding on a TPU pod."),
    "scaling": ("training:scaling", "Measure and plan a training step on many numbers of chips."),
    "port": ("weights:port", "Convert public weights to a checkpoint folder."),
    "reconstruct": ("networks:reconstruct", "Pass a video through a VAE alone."),
    "generate": ("networks:generate", "Generate a video from the embedding of a prompt."),
    "calibrate": ("weights:calibrate", "Fit a latent codec to a VAE, without training."),
    "export": ("weights:export", "Convert a checkpoint folder to diffusers' layout."),
    "export-programs": ("weights:export_programs", "Write a model as StableHLO programs."),
}

# Commands that compile nothing worth keeping between runs.
WITHOUT_CACHE = ("info", "release", "port", "export", "plan", "compare")

# Packages that an optional feature needs, and the extra that installs them.
EXTRAS = dict.fromkeys(
    ("bjontegaard", "imageio", "imageio_ffmpeg", "jinja2", "matplotlib"), "eval"
) | {"libtpu": "tpu"}

DESCRIPTION = """\
Generative neural video codec.

`gnvc COMMAND --help` describes a command.

Exit codes: 0 success; 2 usage error; 3 success in part: damaged frames, groups or videos were left
out or replaced, or a plan does not fit into memory; 10-24 bad stream or model
(gnvc_jax.bitstream.errors); 25 weights that cannot be ported; 65-74 a video that cannot be read or
written (gnvc_jax.media.errors); 130 interrupted.

Errors are reported on stderr. A command that fails leaves no output behind."""

STYLE = (
    tyro.conf.FlagCreatePairsOff,  # --force, and no --no-force
    tyro.conf.DisallowNone,  # "None" is not a value: leaving the option out is
    tyro.conf.PositionalMetavarFromFieldName,  # INPUT rather than STR
)


def parse(argv: Sequence[str]) -> tuple[str, str | None, Callable[[], int]]:
    """Parses a command line.

    Args:
        argv: Arguments after the name of the program.

    Returns:
        Name of the command, its input if it has one (to name it in messages), and the call to make.

    Raises:
        SystemExit: After printing help (code 0) or a usage error (code 2).
    """
    name, *arguments = argv or [""]
    if name == "eval":
        arguments = expand_files(arguments)
    # --help, a wrong name, or nothing: tyro prints the list of commands, or suggests one.
    if name not in COMMANDS:
        tyro.extras.subcommand_cli_from_dict(
            {name: _described(text) for name, (_, text) in COMMANDS.items()},
            prog="gnvc",
            description=DESCRIPTION,
            args=argv,
            config=STYLE,
        )
        raise AssertionError("unreachable: tyro exits for help and unknown commands")
    module, _, function_name = COMMANDS[name][0].partition(":")
    function = getattr(importlib.import_module(f"gnvc_jax.commands.{module}"), function_name)

    deferred = _deferred(function)
    options: dict[str, Any] = {"prog": f"gnvc {name}", "args": arguments, "config": STYLE}
    if "settings" in inspect.signature(function).parameters:
        # Once an experiment is named, --help is about its settings and answered by them.
        named = any(x.partition("=")[0] == "--config" for x in arguments)
        call, settings = tyro.cli(deferred, return_unknown_args=True, add_help=not named, **options)
        call = functools.partial(call, settings=settings)
    else:
        call = tyro.cli(deferred, **options)
    # Commands that read a file call that parameter `input`.
    bound = inspect.signature(function).bind_partial(*call.args, **call.keywords)
    return name, bound.arguments.get("input"), call


def _deferred(function: Callable[..., int]) -> Callable[..., functools.partial[int]]:
    """Makes a function of the same signature that returns the call instead of making it.

    tyro calls what it parses for, and reports a ValueError from inside as a usage error; a command
    must run outside.
    """

    def deferred(*args: object, **kwargs: object) -> functools.partial[int]:
        return functools.partial(function, *args, **kwargs)

    # tyro would keep the line breaks of long descriptions: join the lines that are indented
    # further. (`functools.wraps` would lead it to the original docstring.)
    deferred.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(function.__doc__ or ""))
    deferred.__annotations__ = function.__annotations__
    deferred.__dict__["__signature__"] = inspect.signature(function)
    return deferred


def expand_files(arguments: Sequence[str]) -> list[str]:
    """Replaces each @FILE by the arguments in the file, quoted as in a shell; # begins a comment.

    FILE may also be the name of a shipped file of arguments, see `gnvc_jax.shipped_configs`.

    Raises:
        UsageError: If a file is not there.
    """
    expanded = []
    for argument in arguments:
        if argument.startswith("@"):
            try:
                text = find_config(argument[1:], ".txt").read_text()
            except OSError as error:
                raise UsageError(str(error)) from error
            expanded += shlex.split(text, comments=True)
        else:
            expanded.append(argument)
    return expanded


def _described(text: str) -> Callable[[], None]:
    """Makes a stand-in for a command in the list of commands, with a description and no options."""

    def command() -> None:
        pass

    command.__doc__ = text
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; usage errors and help exit at once."""
    argv = sys.argv[1:] if argv is None else argv
    name, source = argv[0] if argv else "", None
    try:
        name, source, call = parse(argv)
        if name not in WITHOUT_CACHE:
            from gnvc_jax.runtime import use_compilation_cache

            use_compilation_cache()
        return call()
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except GnvcError as error:
        from gnvc_jax.bitstream import BitstreamError  # not above: it makes --help slower

        # These two do not know which file they are about.
        prefix = f"{source or name}: " if isinstance(error, BitstreamError | UsageError) else ""
        return _fail(f"{prefix}{error}", error.exit_code)
    except BrokenPipeError:
        # The reader has had enough, as in `gnvc decode ... - | head`. Closing stderr keeps Python
        # from reporting the pipe again when it flushes at exit.
        sys.stderr.close()
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        install = f"pip install 'gnvc-jax[{EXTRAS[package]}]'"
        return _fail(f"{name}: needs the package {package}; {install}", UsageError.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:  # raised by us, with a whole message
            return _fail(str(error), EXIT_MISSING)
        code = EXIT_DISK_FULL if error.errno == errno.ENOSPC else EXIT_MISSING
        return _fail(f"{error.filename or source or name}: {error.strerror or error}", code)


def _fail(message: str, code: int) -> int:
    print(f"gnvc: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
