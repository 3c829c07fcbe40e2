"""Stage II for the sizes and the numbers of steps that a decoder meets.

gnvc train --config wan_1_3b_plus/pixel --data.path CLIPS

100,000 steps. What differs from `wan_1_3b/pixel`, and why:

- The last 20,000 steps are on 25 frames of 512x832. The paper trains on at most 13 frames of
  256x256, which are 1,024 tokens of the DiT, and decodes 25 frames of 1080p, which are 57,120;
  Wan2.1-1.3B itself was trained at 480p. 480 rows are not whole hyperlatents: encoders pad them to
  512, as smaller videos are padded here. Such a clip has 11,648 tokens and 12.5 times the pixels of
  the clips before, so plan that shape; `--optim.accumulate 2` goes through the batch clip by clip.
- 1 to 5 steps of refinement are drawn alike, where the paper takes 5. One model then serves all.
- Quality levels differ within a group, see `models.py`.

`pixel_dists`, `pixel_features` and `pixel_adversarial` add one loss each. Not run yet: no
accelerator was at hand.
"""

import dataclasses

from configs.wan_1_3b import pixel as paper
from configs.wan_1_3b_plus.latent import experiment as latent
from configs.wan_1_3b_plus.models import CODEC, HIERARCHY
from gnvc_jax.training.config import RunConfig

experiment = dataclasses.replace(
    paper.experiment,
    codec=CODEC,
    init=dataclasses.replace(paper.experiment.init, run=latent.run.out),
    loss=dataclasses.replace(paper.experiment.loss, **HIERARCHY, fewest_steps=1, single=0.0),
    data=dataclasses.replace(
        paper.experiment.data,
        clip_length_schedule=((80_000, 25),),
        size_schedule=((80_000, 512, 832),),
    ),
    run=RunConfig(out="runs/wan_1_3b_plus/pixel"),
)
