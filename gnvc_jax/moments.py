"""Mean, covariance and principal components of vectors that come in batches.

The linear VAE (`gnvc_jax.vae.klt`) and the start of the codec (`gnvc_jax.codec.fit`) take their
bases from such statistics. Batches are added one by one, so the data need not fit into memory.
"""

import numpy as np
from jaxtyping import Float


class Moments:
    """Sums over vectors of one size, in float64.

    Attributes:
        count: Number of vectors added so far.
        sum: Sum of the vectors, (size,).
        outer: Sum of their outer products, (size, size).
    """

    def __init__(self, size: int) -> None:
        self.count, self.sum, self.outer = 0, np.zeros(size), np.zeros((size, size))

    def add(self, vectors: np.ndarray) -> None:
        """Adds vectors (..., size)."""
        # float64: `covariance` subtracts two numbers that may be far larger than their difference.
        x = np.asarray(vectors, np.float64).reshape(-1, len(self.sum))
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    @property
    def mean(self) -> Float[np.ndarray, " size"]:
        """Mean of all vectors."""
        return self.sum / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "size size"]:
        """Covariance matrix."""
        return self.outer / self.count - np.outer(self.mean, self.mean)

    def principal_components(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal components, largest variance first.

        Returns:
            Variances (size,), and orthonormal directions (size, size), one per column.
        """
        variances, vectors = np.linalg.eigh(self.covariance)
        # eigh sorts in ascending order; rounding can make a zero slightly negative.
        return np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
