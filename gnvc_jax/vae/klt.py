"""The transform of a linear VAE: the Karhunen-Loeve transform (KLT) of blocks of pixels.

A block is what one latent stands for: stride x stride pixels of the first frame of a clip, or of
`temporal_stride` frames after it. Its principal components are the best linear code there is, known
at once, where a small convolutional encoder needs many thousand steps to get as far. It keeps
distances, so that a squared error of latents is one of pixels, and its exact inverse gives the
frames that motion is compensated from.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import lax

from gnvc_jax.moments import Moments

Array = jax.Array
KINDS = ("first", "later")

# Encoding, and all of a linear VAE, are in full float32: by default JAX multiplies in bfloat16 on
# TPUs and in TF32 on GPUs. The codec would spend bits on errors of latents, and motion is
# compensated from the frames of a linear VAE.
EXACT = "highest"


def to_blocks(video: Array, frames: int, size: int) -> Array:
    """(b, t frames, h size, w size, c) -> (b, t, h, w, frames * size * size * c)."""
    return rearrange(video, "b (t f) (h i) (w j) c -> b t h w (f i j c)", f=frames, i=size, j=size)


def from_blocks(blocks: Array, frames: int, size: int) -> Array:
    """Undoes `to_blocks`."""
    return rearrange(blocks, "b t h w (f i j c) -> b (t f) (h i) (w j) c", f=frames, i=size, j=size)


class BlockTransform(nn.Module):
    """Blocks of pixels to latents and back by a fixed basis; gradients do not reach it.

    Parameters, each for "first" and "later" blocks: a basis (values per block, latent_channels)
    with orthonormal columns, an offset and a scalar scale; latents = (block - offset) basis scale.
    """

    latent_channels: int
    stride: int
    temporal_stride: int

    def setup(self):
        self.frames = {"first": 1, "later": self.temporal_stride}
        self.fixed = {kind: self._parameters(kind) for kind in KINDS}

    def _parameters(self, kind: str) -> tuple[Array, Array, Array]:
        size = self.frames[kind] * self.stride**2 * 3
        orthogonal, zeros, ones = (
            nn.initializers.orthogonal(),
            nn.initializers.zeros,
            nn.initializers.ones,
        )
        return lax.stop_gradient(
            (
                self.param(f"{kind}_basis", orthogonal, (size, self.latent_channels)),
                self.param(f"{kind}_offset", zeros, (size,)),
                self.param(f"{kind}_scale", ones, ()),
            )
        )

    @jax.default_matmul_precision(EXACT)
    def forward(self, video: Array, first: bool) -> Array:
        """Video (b, t, h, w, 3) -> latents (b, t', h', w', z); first: it starts a clip."""

        def transform(kind, part):
            basis, offset, scale = self.fixed[kind]
            return (to_blocks(part, self.frames[kind], self.stride) - offset) @ basis * scale

        return _by_kind(transform, video, first)

    @jax.default_matmul_precision(EXACT)
    def inverse(self, latents: Array, first: bool) -> Array:
        """Latents (b, t', h', w', z) -> video (b, t, h, w, 3)."""

        def transform(kind, part):
            basis, offset, scale = self.fixed[kind]
            return from_blocks(part / scale @ basis.T + offset, self.frames[kind], self.stride)

        return _by_kind(transform, latents, first)


def _by_kind(transform, x: Array, first: bool) -> Array:
    if not first:
        return transform("later", x)
    head = transform("first", x[:, :1])
    return jnp.concatenate([head, transform("later", x[:, 1:])], axis=1) if x.shape[1] > 1 else head


def moments_of_blocks(stride: int, temporal_stride: int) -> dict[str, Moments]:
    """Empty moments of the blocks that first and later latents stand for; see `count_blocks`."""
    size = 3 * stride**2
    return {"first": Moments(size), "later": Moments(size * temporal_stride)}


def count_blocks(moments: dict, video: np.ndarray, stride: int, temporal_stride: int) -> None:
    """Adds the blocks of clips, float (b, 1 + temporal_stride * k, h, w, 3) in [-1, 1]."""
    moments["first"].add(to_blocks(video[:, ::temporal_stride], 1, stride))
    moments["later"].add(to_blocks(video[:, 1:], temporal_stride, stride))


def fit(moments: dict[str, Moments], latent_channels: int) -> dict:
    """Parameters of `BlockTransform`: the principal components of blocks.

    The basis of first frames is turned within its span (orthogonal Procrustes), so that a still
    scene has about the same latents in both kinds. Later latents get a root mean square of 1.

    Args:
      moments: of more blocks than a block has values.
      latent_channels: components to keep.
    """
    components, params = {}, {}
    for kind in KINDS:
        variances, vectors = moments[kind].principal_components()
        components[kind] = vectors[:, :latent_channels]
        params[f"{kind}_offset"] = moments[kind].mean
    energy = variances[:latent_channels].mean()

    size = len(components["first"])
    frames = len(components["later"]) // size
    still = components["later"].reshape(frames, size, latent_channels).sum(0)
    u, _, vt = np.linalg.svd(components["first"].T @ still)
    components["first"] = components["first"] @ (u @ vt)
    for kind, gain in zip(KINDS, (frames**0.5, 1.0)):
        params[f"{kind}_basis"] = components[kind]
        params[f"{kind}_scale"] = np.asarray(gain / energy**0.5)
    return {name: value.astype(np.float32) for name, value in params.items()}
