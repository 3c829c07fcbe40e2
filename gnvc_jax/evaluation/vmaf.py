"""VMAF by the libvmaf of ffmpeg: model v0.6.1, and its variant without enhancement gain (NEG)."""

import json

import numpy as np

from gnvc_jax.evaluation.anchors import AnchorError, run_ffmpeg, to_raw
from gnvc_jax.media.colour import BT709, Colour

MODELS = {"vmaf": "vmaf_v0.6.1", "vmaf_neg": "vmaf_v0.6.1neg"}
MIN_SIDE = 16


def vmaf(source: np.ndarray, output: np.ndarray, colour: Colour = BT709) -> dict[str, np.ndarray]:
    """VMAF of every frame, computed on 8-bit YUV 4:2:0.

    Scores assume 1080p seen from a distance of three heights; smaller videos score too high.

    Args:
        source: (t, h, w, 3) uint8.
        output: Clip of the same shape.
        colour: Colour space of the YUV.

    Returns:
        vmaf and vmaf_neg, each (t,), from 0 to 100.

    Raises:
        ValueError: If a side is below 16, or ffmpeg has no libvmaf.
    """
    t, h, w, _ = source.shape
    if min(h, w) < MIN_SIDE:
        raise ValueError(f"vmaf needs sides of at least {MIN_SIDE}, got {(h, w)}")
    # libvmaf takes the distorted clip first; the rate of 25 has no influence on scores.
    size = f"-f rawvideo -pix_fmt yuv420p -s {w + w % 2}x{h + h % 2} -r 25"
    models = "|".join(f"version={model}\\:name={name}" for name, model in MODELS.items())
    graph = f"[0:v][1:v]libvmaf=model='{models}':log_fmt=json:log_path=vmaf.json"
    arguments = f"{size} -i output.yuv {size} -i source.yuv -lavfi {graph} -f null -".split()
    inputs = {"output.yuv": to_raw(output, colour), "source.yuv": to_raw(source, colour)}
    try:
        log = json.loads(run_ffmpeg(arguments, inputs, "vmaf.json"))
    except (AnchorError, json.JSONDecodeError) as error:
        raise ValueError(f"libvmaf of ffmpeg: {error}") from error
    frames = [frame["metrics"] for frame in log["frames"]]
    if len(frames) != t:
        raise ValueError(f"libvmaf of ffmpeg: {t} frames went in, {len(frames)} came out")
    return {name: np.array([frame[name] for frame in frames]) for name in MODELS}
