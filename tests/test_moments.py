"""Statistics that come in batches, against NumPy on all of them."""

import numpy as np

from gnvc_jax.moments import Moments


def test_moments_match_numpy():
    """The covariance of batches is that of all vectors, and so are its eigenvalues."""
    x = np.random.default_rng(1).normal(size=(50, 7)) @ np.diag(np.arange(1.0, 8.0)) + 3.0
    moments = Moments(7)
    for part in np.array_split(x, 4):
        moments.add(part.reshape(1, -1, 7))
    np.testing.assert_allclose(moments.mean, x.mean(0))
    np.testing.assert_allclose(moments.covariance, np.cov(x.T, bias=True))
    variances, vectors = moments.principal_components()
    np.testing.assert_allclose(variances, np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(7), atol=1e-12)
