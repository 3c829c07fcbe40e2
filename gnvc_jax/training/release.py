"""Make the model file of a trained codec:

python -m gnvc_jax.training.release --config configs/small/codec.py --name small --out FILE

The averaged weights of the run `run.out`, and of the VAE that it was trained under, go in; other
arguments override the configuration as for train.py.
"""

import argparse
import dataclasses
import sys

import jax

from gnvc_jax import model
from gnvc_jax.errors import GnvcError
from gnvc_jax.training import config
from gnvc_jax.training.checkpoints import load_params, load_statistics
from gnvc_jax.training.stages import make_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", required=True)
    args, overrides = parser.parse_known_args()
    try:
        experiment = config.override(config.load(args.config), overrides)
        # Weights of a model file are rounded once, from what was stored.
        experiment = dataclasses.replace(experiment, compute=config.ComputeConfig())
        stage = make_stage(experiment)
        params = load_params(experiment.run.out, jax.eval_shape(stage.init, jax.random.key(0)))
        stage.statistics = load_statistics(experiment.run.out) or stage.statistics
        frozen = stage.frozen()
        parts = stage.model_parts(params, frozen)
        made = model.build(
            args.name,
            experiment.vae,
            experiment.codec,
            parts["vae"],
            parts["codec"],
            frozen["mean"],
            frozen["std"],
            experiment.refiner,
            parts.get("refiner"),
            frozen.get("text"),
            frozen.get("white"),
        )
        model.save_model(args.out, made)
    except (GnvcError, OSError) as error:
        sys.exit(f"release: {error}")
    print(
        f"{args.out}: codec {made.fingerprints[0].hex()[:8]}, VAE {made.fingerprints[1].hex()[:8]}"
    )


if __name__ == "__main__":
    main()
