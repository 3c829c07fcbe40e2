"""Process setup that the programs share: compilation cache and distributed initialisation."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from gnvc_jax.buckets import cache_folder
from gnvc_jax.errors import UsageError

# Variables in the environment of a process if others were started with it: the number of processes
# and, for Slurm, a variable that `srun` sets and an allocation's shell lacks.
SLURM = ("SLURM_NTASKS", "SLURM_STEP_NODELIST")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE",)
KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")  # of an indexed job
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
GANG_SECONDS = 1800  # in which all processes of a large run start


def join_processes() -> None:
    """Makes the processes of one run one JAX program; call it before anything else of JAX.

    On TPU slices, under Slurm, Open MPI and in Kubernetes jobs JAX finds the others by itself; by
    hand, the variables BY_HAND name HOST:PORT of the first process, the number of processes and
    that of this one. A process that is alone goes on by itself.

    Raises:
        UsageError: If some of the variables are missing.
        RuntimeError: If the other processes do not come.
    """
    address, count, number = (os.environ.get(name) for name in BY_HAND)
    if address or count or number:
        if not (address and count and number):
            raise UsageError(f"set all of {', '.join(BY_HAND)}, or none")
        if int(count) > 1:
            jax.distributed.initialize(
                address, int(count), int(number), initialization_timeout=GANG_SECONDS
            )
        return
    if started_together(os.environ) or on_tpu_host():
        jax.distributed.initialize(initialization_timeout=GANG_SECONDS)


def started_together(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started several processes that JAX can find."""
    several = any(
        all(name in environment for name in names) and int(environment[names[0]]) > 1
        for names in (SLURM, OPEN_MPI)
    )
    return several or all(name in environment for name in KUBERNETES)


def on_tpu_host() -> bool:
    """Whether this machine has TPUs; the hosts of a slice find each other, alone or not."""
    devices = (*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*"))
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
