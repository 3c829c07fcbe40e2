"""Statistics of vectors: what principal components are made of."""

import numpy as np


class Moments:
    """Mean and covariance of vectors that come in batches, in float64."""

    def __init__(self, size: int):
        self.count, self.sum, self.outer = 0, np.zeros(size), np.zeros((size, size))

    def add(self, vectors: np.ndarray) -> None:
        """Counts vectors (..., size)."""
        x = np.asarray(vectors, np.float64).reshape(-1, len(self.sum))
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    @property
    def mean(self) -> np.ndarray:
        return self.sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        """(size, size), around the mean."""
        return self.outer / self.count - np.outer(self.mean, self.mean)

    def principal_components(self) -> tuple[np.ndarray, np.ndarray]:
        """Variances (size,), largest first, and orthonormal directions (size, size) in columns."""
        variances, vectors = np.linalg.eigh(self.covariance)
        return np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
