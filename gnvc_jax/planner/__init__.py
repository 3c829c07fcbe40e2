"""Costs of training and coding on a pod, read from the compiled programs, without the pod.

`training` plans the train step of an experiment, `coding` the programs that encode or decode a
video. Both compile ahead of time for devices that are not attached, with shapes in place of arrays:
nothing is loaded or run. `flops` counts operations in the traced program; `hlo` reads communication
and memory traffic from the compiled text; `program` combines them with the memory that the compiler
reports; `chips` holds the published figures of the hardware, and `gpus` describes GPUs to the
compiler.

Of these, `flops`, `hlo`, `chips` and `gpus` import no other package of the project, so that
training can use them for its own metrics.
"""
