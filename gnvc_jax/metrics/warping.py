"""Warping error: how much a clip flickers along the motion of its source.

Lai et al., "Learning Blind Video Temporal Consistency", ECCV 2018, with the flow of OpenCV's DIS
(medium preset), which needs no weights, in place of FlowNet2, or with flow of the user's:

    E_warp = mean over t of sum_p M_t |V_t - W(V_{t+1}, F_t)|^2 / sum_p M_t

W is bilinear backward warping, V on 0..1, squares are means over channels. Flow F_t (t to t + 1)
and mask M_t come from the source and are used for source and output alike. M_t excludes pixels that
move out of the frame, occluded pixels (where forward and backward flow disagree) and the borders of
motion. A blurred video has a lower E_warp than its source, so the ratio to that of the source says
more: 1 is ideal, larger values are flicker.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Float32, UInt8

MIN_SIDE = 16


def warping_error(
    source: np.ndarray, output: np.ndarray, flow: Path | None = None
) -> dict[str, float]:
    """Warping errors of a clip and of its source.

    Args:
        source: (t, h, w, 3) uint8, at least 2 frames and sides of at least 16.
        output: Clip of the same shape.
        flow: Folder with flow of the source, see `flow_of_files`; if None, DIS computes the flow.

    Returns:
        e_warp, e_warp_source, and e_warp_ratio, their quotient. The ratio is infinite if the source
        is still and the output is not, and 1 if both are still.

    Raises:
        ValueError: If the clip is too small, or the flow does not fit it.
        FileNotFoundError: If a file with flow is missing.
    """
    if len(source) < 2 or min(source.shape[1:3]) < MIN_SIDE:
        raise ValueError(
            f"e_warp needs 2 frames with sides of at least {MIN_SIDE}, got {source.shape}"
        )
    flows = flow_of_dis(source) if flow is None else flow_of_files(flow, source.shape)
    # Source and output go together, (2, 2, h, w, 3): which clip, which frame of the pair.
    errors = [
        _errors(np.stack([clip[t : t + 2] for clip in (source, output)]), forward, backward)
        for t, (forward, backward) in enumerate(flows)
    ]
    of_source, of_output = map(float, np.mean(np.asarray(errors, np.float64), axis=0))
    ratio = of_output / of_source if of_source else (1.0 if not of_output else np.inf)
    return {"e_warp": of_output, "e_warp_source": of_source, "e_warp_ratio": ratio}


def flow_of_dis(
    source: UInt8[np.ndarray, "t h w 3"],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Forward and backward flow (h, w, 2: x, y) in pixels of each pair of frames."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    result: Any = None  # DIS allocates it; OpenCV's stubs do not allow None
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in source]
    for before, after in itertools.pairwise(gray):
        yield dis.calc(before, after, result), dis.calc(after, before, result)


def flow_of_files(folder: Path, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads what `flow_of_dis` computes from Middlebury .flo files of any other method.

    Args:
        folder: Folder with forward_00000.flo (from frame 0 to frame 1), backward_00000.flo (from
            frame 1 to frame 0), and so on.
        shape: Shape of the clip, (t, h, w, ...).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not a .flo file, or of another size.
    """

    def read(path: Path) -> np.ndarray:
        if not path.is_file():
            raise FileNotFoundError(f"file {path} missing")
        flow = cv2.readOpticalFlow(str(path))
        if flow is None or flow.shape != (*shape[1:3], 2):
            found = "no .flo file" if flow is None else f"flow of {flow.shape[1]}x{flow.shape[0]}"
            raise ValueError(f"{path}: {found}, the clip is {shape[2]}x{shape[1]}")
        return flow

    for t in range(shape[0] - 1):
        yield read(folder / f"forward_{t:05d}.flo"), read(folder / f"backward_{t:05d}.flo")


@jax.jit
def _errors(
    pairs: UInt8[Array | np.ndarray, "n 2 h w 3"],
    forward: Float32[Array | np.ndarray, "h w 2"],
    backward: Float32[Array | np.ndarray, "h w 2"],
) -> Float32[Array, " n"]:
    """Masked mean squared errors (n,) of n pairs of adjacent frames (n, 2, h, w, 3) uint8."""
    # Source and output have the flow and the mask in common, so that only what they show differs.
    pairs = pairs.astype(jnp.float32) / 255
    keep = valid(forward, backward).astype(jnp.float32)
    warped = jax.vmap(warp, in_axes=(0, None))(pairs[:, 1], forward)
    squares = jnp.square(pairs[:, 0] - warped).mean(-1)
    return (keep * squares).sum((1, 2)) / jnp.maximum(keep.sum(), 1.0)


def warp(
    image: Float[Array | np.ndarray, "h w c"], flow: Float[Array | np.ndarray, "h w 2"]
) -> Float[Array, "h w c"]:
    """Samples an image (h, w, c) bilinearly at each pixel plus its flow (h, w, 2: x, y)."""
    rows, columns = _places(flow)
    channels = [
        map_coordinates(image[..., c], [rows, columns], order=1, mode="nearest")
        for c in range(image.shape[-1])
    ]
    return jnp.stack(channels, axis=-1)


def valid(
    forward: Float[Array | np.ndarray, "h w 2"], backward: Float[Array | np.ndarray, "h w 2"]
) -> Bool[Array, "h w"]:
    """Mask (h, w) of the pixels of a frame that can be found in the next one; flows (h, w, 2)."""
    rows, columns = _places(forward)
    h, w = rows.shape
    inside = (rows >= 0) & (rows <= h - 1) & (columns >= 0) & (columns <= w - 1)
    # Where both flows agree, going there and back ends where it began. Thresholds here and below
    # are those of Sundaram, Brox and Keutzer (ECCV 2010).
    # The flow back, looked up where the flow there leads.
    back = warp(backward, forward)
    size = jnp.square(forward).sum(-1)
    occluded = jnp.square(forward + back).sum(-1) > 0.01 * (size + jnp.square(back).sum(-1)) + 0.5
    # Squared gradients of both components of the flow, (h, w); large ones are borders of motion.
    slopes = sum(
        jnp.square(jnp.diff(forward, axis=axis, append=forward.take(jnp.array([-1]), axis))).sum(-1)
        for axis in (0, 1)
    )
    return inside & ~occluded & (slopes <= 0.01 * size + 0.002)


def _places(
    flow: Float[Array | np.ndarray, "h w 2"],
) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    h, w, _ = flow.shape
    return jnp.arange(h)[:, None] + flow[..., 1], jnp.arange(w)[None, :] + flow[..., 0]
