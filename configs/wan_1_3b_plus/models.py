"""The model of `wan_1_3b` with hierarchical quality: encoders give some latents better levels.

The paper (GNVC-VD, arXiv 2512.05016) codes all latents of a group alike. Its successor GVCHR (arXiv
2608.11618) codes the first one better, and later ones in a period of four, since others are
predicted from them. The offsets are a start: none has been measured.
"""

import dataclasses

from configs.wan_1_3b import models as paper

CODEC = dataclasses.replace(paper.CODEC, intra_offset=8, level_pattern=(0, 2, 0, 4))

# For the losses of all stages. Half of the clips have the pattern, and the first latent is better
# by anything up to twice the offset, so that other offsets can be tried without training anew.
HIERARCHY = {"intra_offset": (0, 16), "pattern": CODEC.level_pattern, "pattern_prob": 0.5}
