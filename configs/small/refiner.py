"""Third stage of the small model: the refiner, one step, on frames; the codec stays as it is.

gnvc train --config small/refiner --data.path CLIPS
"""

import dataclasses

from configs.small.models import REFINER
from configs.small.rollout import experiment as rollout
from gnvc_jax.training.config import EvaluationConfig, InitConfig
from gnvc_jax.training.stages.refine import RefineLoss

experiment = dataclasses.replace(
    rollout,
    stage="refine",
    refiner=REFINER,
    loss=RefineLoss(),
    init=InitConfig(run=rollout.run.out),
    data=dataclasses.replace(rollout.data, batch=2),
    optim=dataclasses.replace(rollout.optim, lr=1e-3, warmup=50, steps=4000, ema=0.997),
    run=dataclasses.replace(rollout.run, out="runs/small/refiner"),
    # PSNR falls as refinement adds detail, so the best refiner is the one with the lowest LPIPS.
    evaluate=EvaluationConfig(best_by="lpips"),
)
