"""What can be wrong with weights from elsewhere."""


class PortError(ValueError):
    """Weights that cannot be read or do not fit; the message names the file and every problem."""

    exit_code = 25
