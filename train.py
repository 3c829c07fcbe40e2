"""Train one stage of the codec: python train.py --config configs/tiny/vae.py --optim.lr 1e-3

Everything of the configuration can be changed on the command line; `--help` lists it. The run
folder (`run.out`) receives the resolved configuration, metrics and checkpoints. The same command
continues a run that was interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

import jax

from gnvc_jax.training import config
from gnvc_jax.training.loop import train
from gnvc_jax.training.stages import make_stage


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    args, overrides = parser.parse_known_args()
    if args.config is None:
        sys.exit("usage: python train.py --config configs/NAME.py [--group.key value ...]")

    try:
        experiment = config.override(config.load(args.config), overrides)
        use_compilation_cache()
        device = jax.devices()[0]
        print(f"{experiment.stage} on {jax.device_count()} x {device.device_kind}", flush=True)
        train(experiment, make_stage(experiment))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"train.py: {error}")


def use_compilation_cache() -> None:
    """Keep compiled programs: in JAX_COMPILATION_CACHE_DIR or in the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gnvc_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    main()
