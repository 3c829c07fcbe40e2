"""How much of a frame a refiner made, block by block, and limits to it.

A refiner adds detail that was not transmitted. The measure of it is the change of a block of 16x16
pixels, the root mean square of refined minus decoded frame over its pixels and colours, in 8-bit
steps. Frames are uint8 RGB (h, w, 3) in NumPy.
"""

import numpy as np
from jaxtyping import Float32, UInt8

BLOCK = 16  # pixels
WHITE = 32.0  # 8-bit steps of change that are white in a map


def block_change(
    decoded: UInt8[np.ndarray, "h w 3"], refined: UInt8[np.ndarray, "h w 3"]
) -> Float32[np.ndarray, "rows columns"]:
    """Measures the change of each block in 8-bit steps; blocks at the edges may be smaller."""
    squared = ((refined.astype(np.float32) - decoded) ** 2).mean(-1)
    height, width = squared.shape
    rows, columns = np.arange(0, height, BLOCK), np.arange(0, width, BLOCK)
    sums = np.add.reduceat(np.add.reduceat(squared, rows, 0), columns, 1)
    pixels = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))
    return np.sqrt(sums / pixels).astype(np.float32)


def limit_change(
    decoded: UInt8[np.ndarray, "h w 3"], refined: UInt8[np.ndarray, "h w 3"], most: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Takes back as much of the refinement as leaves no block with a larger change than `most`.

    The share that is kept varies smoothly over the frame, so that no edges of blocks appear.

    Args:
        decoded: Frame as the codec decodes it.
        refined: The same frame after refinement.
        most: Largest change of a block in 8-bit steps; 0 gives the decoded frame.
    """
    change = block_change(decoded, refined)
    share = np.minimum(1.0, most / np.maximum(change, 1e-6))
    # No larger than in any neighbour: then the interpolation below, a mean over neighbours, keeps
    # within the limit of every block.
    rows, columns = share.shape
    around = np.lib.stride_tricks.sliding_window_view(np.pad(share, 1, mode="edge"), (3, 3))
    share = around.min((2, 3))

    def weights(pixels: int, blocks: int) -> np.ndarray:
        """Linear interpolation between centres of blocks, (pixels, blocks)."""
        at = np.clip((np.arange(pixels) + 0.5) / BLOCK - 0.5, 0, blocks - 1)
        return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(blocks)))

    height, width, _ = decoded.shape
    smooth = weights(height, rows) @ share @ weights(width, columns).T
    # Rounded towards the decoded frame, which can only make the change smaller.
    kept = np.trunc(smooth[..., None] * (refined.astype(np.float32) - decoded))
    return (decoded + kept).astype(np.uint8)


def change_map(
    decoded: UInt8[np.ndarray, "h w 3"], refined: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws the change of blocks as a grey frame: black is none, white 32 8-bit steps or more."""
    height, width, _ = decoded.shape
    change = block_change(decoded, refined)
    grey = np.minimum(255.0, change * (255.0 / WHITE)).round().astype(np.uint8)
    grey = grey.repeat(BLOCK, 0).repeat(BLOCK, 1)[:height, :width]
    return np.repeat(grey[..., None], 3, -1)
