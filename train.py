"""Train one stage of the codec: python train.py --config configs/small/codec.py --optim.lr 1e-3

Everything of the configuration can be changed on the command line; `--help` lists it. The run
folder (`run.out`) receives the resolved configuration, metrics and checkpoints. The same command
continues a run that was interrupted.
"""

import argparse
import sys

import jax

from gnvc_jax.errors import GnvcError
from gnvc_jax.runtime import join_processes, use_compilation_cache
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
        join_processes()
        use_compilation_cache()
        device = jax.devices()[0]
        if jax.process_index() == 0:
            print(f"{experiment.stage} on {jax.device_count()} x {device.device_kind}", flush=True)
        train(make_stage(experiment))
    except (GnvcError, OSError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
