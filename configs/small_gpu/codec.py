"""First stage of the small model at twice the width, for one accelerator of 80 GB.

gnvc train --config small_gpu/codec --data.path CLIPS

As `small/codec`, with eight times the clips, of four times the area. Motion is searched on the
host, hence the workers; `data_wait` in the log says whether they keep up. Not run yet: no
accelerator was at hand.
"""

import dataclasses

from configs.small.codec import experiment as small
from configs.small_gpu.models import CODEC

experiment = dataclasses.replace(
    small,
    codec=CODEC,
    data=dataclasses.replace(small.data, size=(256, 256), batch=64, workers=16),
    optim=dataclasses.replace(small.optim, steps=20_000),
    run=dataclasses.replace(small.run, out="runs/small_gpu/codec"),
)
