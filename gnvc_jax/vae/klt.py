"""The transform of a linear VAE: the Karhunen-Loeve transform (KLT) of blocks of pixels.

A block is what one latent stands for: stride x stride pixels of the first frame of a clip, or of
`temporal_stride` frames after it. Its principal components are the best linear code there is, known
from statistics at once, where a small convolutional encoder needs many thousand steps to get as
far. The transform keeps distances, so a squared error of latents is one of pixels, and its exact
inverse gives the frames that motion is compensated from.

`BlockTransform` is the module. Its parameters come from `fit`, after `moments_of_blocks` and
`count_blocks` have gathered statistics of training clips.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from gnvc_jax.arrays import AnyArray, ArrayT
from gnvc_jax.moments import Moments

# `fit` relies on this order.
KINDS = ("first", "later")  # blocks of the first frame of a clip, and of the frames after it

# Encoding, and all of a linear VAE, run in full float32: by default JAX multiplies in bfloat16 on
# TPUs and in TF32 on GPUs. The codec would spend bits on errors of latents, and motion is
# compensated from the frames of a linear VAE.
EXACT = "highest"


def to_blocks(
    video: Float[ArrayT, "b t h w c"], frames: int, size: int
) -> Float[ArrayT, "b t//{frames} h//{size} w//{size} {frames}*{size}*{size}*c"]:
    """Moves blocks of `frames` x `size` x `size` pixels into channels."""
    return rearrange(video, "b (t f) (h i) (w j) c -> b t h w (f i j c)", f=frames, i=size, j=size)


def from_blocks(
    blocks: Float[ArrayT, "b t h w c"], frames: int, size: int
) -> Float[ArrayT, "b t*{frames} h*{size} w*{size} c2"]:
    """Undoes `to_blocks`."""
    return rearrange(blocks, "b t h w (f i j c) -> b (t f) (h i) (w j) c", f=frames, i=size, j=size)


class BlockTransform(nn.Module):
    """Transforms blocks of pixels to latents and back by a fixed basis, which has no gradient.

    Parameters, each for "first" and "later" blocks: a basis (values per block, latent_channels)
    with orthonormal columns, an offset (values per block,) and a scalar scale;
    latents = (block - offset) basis scale.

    Attributes:
        latent_channels: Number of components that are kept.
        stride: Height and width of a block in pixels.
        temporal_stride: Number of frames of a later block.
    """

    latent_channels: int
    stride: int
    temporal_stride: int

    def setup(self) -> None:
        self.frames = {"first": 1, "later": self.temporal_stride}
        self.fixed = {kind: self._parameters(kind) for kind in KINDS}

    def _parameters(self, kind: str) -> tuple[Array, ...]:
        """Basis, offset and scale of one kind of block."""
        # Values of a block: RGB of all its pixels.
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
    def forward(
        self, video: Float[AnyArray, "b t h w 3"], first: bool
    ) -> Float[Array, "b t2 h2 w2 z"]:
        """Transforms a video to latents.

        Args:
            video: Video whose sizes are multiples of the strides, with one frame more if it starts
                a clip.
            first: Whether the video starts a clip.
        """

        def transform(kind: str, part: Array) -> Array:
            # (b, t2, h2, w2, values) @ (values, z)
            basis, offset, scale = self.fixed[kind]
            return (to_blocks(part, self.frames[kind], self.stride) - offset) @ basis * scale

        return _by_kind(transform, jnp.asarray(video), first)

    def inverse(
        self, latents: Float[AnyArray, "b t2 h2 w2 z"], first: bool
    ) -> Float[Array, "b t h w 3"]:
        """Transforms latents to a video; undoes `forward` but for the components that it drops."""
        return self._inverse(latents, first, offset=True)

    def change(
        self, latents: Float[AnyArray, "b t2 h2 w2 z"], first: bool
    ) -> Float[Array, "b t h w 3"]:
        """Transforms a change of latents to the change of the video; `inverse` is affine."""
        return self._inverse(latents, first, offset=False)

    @jax.default_matmul_precision(EXACT)
    def _inverse(self, latents: AnyArray, first: bool, offset: bool) -> Array:
        def transform(kind: str, part: Array) -> Array:
            # The columns of the basis are orthonormal: its transpose undoes it, but for what they
            # do not span.
            basis, mean, scale = self.fixed[kind]
            blocks = part / scale @ basis.T
            return from_blocks(blocks + mean if offset else blocks, self.frames[kind], self.stride)

        return _by_kind(transform, jnp.asarray(latents), first)

    @jax.default_matmul_precision(EXACT)
    def mean_change(self, latents: Float[AnyArray, "b h w z"]) -> Float[Array, "b t h w 3"]:
        """Means over each block and frame of the `change` that later latents make."""
        basis, _, scale = self.fixed["later"]
        frames = {"t": self.frames["later"], "c": 3}
        # Means of the basis, (t * 3, z): much less to compute than frames.
        means = reduce(basis, "(t ij c) z -> (t c) z", "mean", **frames)
        blocks = jnp.asarray(latents) / scale @ means.T
        return rearrange(blocks, "b h w (t c) -> b t h w c", **frames)


def _by_kind(transform: Callable[[str, Array], Array], x: Array, first: bool) -> Array:
    """Applies `transform` to the first frame or latent of a clip and to the others separately."""
    if not first:
        return transform("later", x)
    # The number of frames is static, and streaming passes the first frame alone.
    head = transform("first", x[:, :1])
    return jnp.concatenate([head, transform("later", x[:, 1:])], axis=1) if x.shape[1] > 1 else head


def moments_of_blocks(stride: int, temporal_stride: int) -> dict[str, Moments]:
    """Makes empty moments for `count_blocks`, for the blocks of first and of later latents."""
    size = 3 * stride**2
    return {"first": Moments(size), "later": Moments(size * temporal_stride)}


def count_blocks(
    moments: dict[str, Moments],
    video: Float[np.ndarray, "b t h w 3"],
    stride: int,
    temporal_stride: int,
) -> None:
    """Adds the blocks of clips to moments.

    Args:
        moments: Moments from `moments_of_blocks`, which are changed in place.
        video: Clips of 1 + temporal_stride * k frames in [-1, 1]. Every temporal_stride-th frame
            serves as an example of a first frame.
        stride, temporal_stride: See `BlockTransform`.
    """
    moments["first"].add(to_blocks(video[:, ::temporal_stride], 1, stride))
    moments["later"].add(to_blocks(video[:, 1:], temporal_stride, stride))


def fit(moments: dict[str, Moments], latent_channels: int) -> dict[str, np.ndarray]:
    """Makes the parameters of a `BlockTransform` from statistics of blocks.

    The basis of first frames is rotated within its span (orthogonal Procrustes problem), so that a
    still scene has about the same latents in both kinds. Later latents get a root mean square of 1.

    Args:
        moments: Moments from `count_blocks`, of more blocks than a block has values.
        latent_channels: Number of components to keep.

    Returns:
        Parameters by name.
    """
    components, params = {}, {}
    for kind in KINDS:
        variances, vectors = moments[kind].principal_components()
        components[kind] = vectors[:, :latent_channels]
        params[f"{kind}_offset"] = moments[kind].mean
    energy = variances[:latent_channels].mean()  # of the later blocks, the last in KINDS

    size = len(components["first"])
    frames = len(components["later"]) // size
    # The latents of a frame that is repeated: the basis summed over its frames.
    still = components["later"].reshape(frames, size, latent_channels).sum(0)
    # The rotation u vt minimises the distance of first @ rotation from still. A rotation
    # within the span of the basis changes no reconstruction.
    u, _, vt = np.linalg.svd(components["first"].T @ still)
    components["first"] = components["first"] @ (u @ vt)
    # A repeated frame has a norm sqrt(frames) times that of the single one; first latents get the
    # same factor.
    for kind, gain in zip(KINDS, (frames**0.5, 1.0)):
        params[f"{kind}_basis"] = components[kind]
        params[f"{kind}_scale"] = np.asarray(gain / energy**0.5)
    return {name: value.astype(np.float32) for name, value in params.items()}
