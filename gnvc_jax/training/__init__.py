"""Training: from an experiment, a frozen dataclass, to a run folder.

What is trained:

- `config`: `Experiment` and all its settings; `hardware` adapts one to a machine.
- `stages`: the stages of training. A stage names its networks, its loss, its data and what trains.
- `losses`: the losses as pure functions; `rollout` and `refinement` run the codec and the refiner
  in the form that losses need.
- `networks`, `weights`, `partition`, `lora`: the networks, where their weights come from, which of
  them train, and low-rank changes of kernels.
- `inputs`, `latent_statistics`: batches, and the statistics by which latents are normalised.

How it is trained:

- `loop`: `train`, the whole run; `startup` prints what it consists of.
- `step`, `state`, `batched_optimizer`: one jitted step, the train state, and the optimizer.
- `hooks`, `evaluator`, `metrics`, `throughput`: what happens around steps, and what is logged.
- `checkpoints`, `run_folder`, `release`: saving and resuming, reading a run for other purposes, and
  the model file of a run.

`gnvc train --config NAME` does all of this; docs/training.md explains it.
"""
