"""Trains one stage of the codec: `gnvc train`, from a checkout.

python train.py --config configs/small/codec.py --data.path CLIPS --optim.lr 1e-3

`gnvc_jax.training.loop.train` shows how training goes: mesh, model, restore, hooks, loop.
"""

import sys

from gnvc_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
