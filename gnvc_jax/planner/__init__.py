"""What training and coding cost on a pod, from the compiled programs and without the pod.

The train step of an experiment, or the programs that coding a video consists of, are compiled ahead
of time for devices that are not there; memory, communication and memory traffic are read from the
programs, operations are counted before. Nothing is loaded, all arrays are shapes.
"""

from gnvc_jax.planner.coding import coding_for, coding_report, plan_coding
from gnvc_jax.planner.program import bytes_per_device, too_large
from gnvc_jax.planner.training import abstract_arguments, plan, plan_for, report, sweep, table

__all__ = [
    "abstract_arguments",
    "bytes_per_device",
    "coding_for",
    "coding_report",
    "plan",
    "plan_coding",
    "plan_for",
    "report",
    "sweep",
    "table",
    "too_large",
]
