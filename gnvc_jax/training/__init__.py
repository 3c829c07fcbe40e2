"""Training: experiments, stages, the step, the loop, checkpoints and metrics."""
