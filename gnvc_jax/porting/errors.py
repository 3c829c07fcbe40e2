"""Errors of weights from elsewhere."""

from gnvc_jax.errors import GnvcError


class PortError(GnvcError, ValueError):
    """Weights that cannot be read or do not fit; the message names the file and every problem."""

    exit_code = 25
