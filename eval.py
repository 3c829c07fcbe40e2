"""Measures a model on videos: `gnvc eval`, from a checkout.

python eval.py --model small --data CLIPS --qp 8,24,40,56 --anchors x264,x265 --out results
python eval.py compare before/results.json after/results.json
"""

import sys

from gnvc_jax.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(arguments if arguments[:1] == ["compare"] else ["eval", *arguments]))
