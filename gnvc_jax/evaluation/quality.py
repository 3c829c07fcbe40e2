"""All metrics of a decoded clip, compiled once per batch shape and timed.

`QualityMeter` runs the metrics that it is asked for: on the device in batches of frames, or on the
host for those that need OpenCV or ffmpeg. What cannot be measured is listed with the reason.
"""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.evaluation.vmaf import vmaf
from gnvc_jax.frames import to_float
from gnvc_jax.media.colour import BT709, Colour, rgb_to_yuv420
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.clip import clip_measures, load_clip
from gnvc_jax.metrics.dists import dists, load_dists
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.metrics.ms_ssim import ms_ssim
from gnvc_jax.metrics.psnr import decibels, mean_squared_error, psnr
from gnvc_jax.metrics.temporal import drift, seam, temporal
from gnvc_jax.metrics.warping import warping_error

FIELDS = {  # metric: fields that it adds to a record
    "psnr": ("psnr_rgb", "apsnr_rgb"),
    "psnr_yuv": ("psnr_yuv", "psnr_y", "psnr_u", "psnr_v"),
    "ms_ssim": ("ms_ssim_rgb", "ms_ssim_rgb_db"),
    "lpips_alex": ("lpips_alex",),
    "lpips_vgg": ("lpips_vgg",),
    "dists": ("dists",),
    "vmaf": ("vmaf", "vmaf_neg"),
    "temporal": ("tpsnr", "ti_ratio", "pulse", "seam"),
    "e_warp": ("e_warp", "e_warp_source", "e_warp_ratio"),
    "clip": ("clip_f", "clip_f_source", "cmmd"),
}
METRICS = tuple(FIELDS)
TEMPORAL = ("temporal", "e_warp", "clip")  # one value per clip; all others have one per frame
WITH_WEIGHTS = ("lpips_alex", "lpips_vgg", "dists", "clip")  # metrics that take a weight file
DEFAULT = ("psnr", "ms_ssim", "lpips_alex", "temporal")
BATCH = 8
_BATCH_PIXELS = 2**21  # limits activations of VGG to about half a gigabyte per layer


@dataclasses.dataclass(frozen=True)
class Quality:
    """Results of one clip, JSON-ready.

    Attributes:
        quality: Fidelity of the whole clip by field, None if not measured.
        temporal: Temporal fidelity of the whole clip by field, None if not measured.
        frames: Values of every frame by field.
        seconds: Time by metric, without compilation.
        compile_seconds: Compilation time by metric.
        missing: Reason why a metric was not measured, by metric.
    """

    quality: dict[str, float | None]
    temporal: dict[str, float | None]
    frames: dict[str, list[float]]
    seconds: dict[str, float]
    compile_seconds: dict[str, float]
    missing: dict[str, str]


class QualityMeter:
    """Measures clips; weights are loaded once, programs are compiled once for each frame size."""

    def __init__(self, metrics: Sequence[str] = DEFAULT, weights: Mapping[str, Path] | None = None):
        """Chooses metrics.

        Args:
            metrics: Names out of METRICS.
            weights: .safetensors files by metric, for some of WITH_WEIGHTS. A missing or unsuitable
                file is noticed when its metric is measured, and reported as the reason why it is
                missing.

        Raises:
            ValueError: If a name is unknown.
        """
        weights = dict(weights or {})
        for names, known in ((metrics, METRICS), (weights, WITH_WEIGHTS)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"unknown metric '{unknown[0]}', expected {', '.join(known)}")
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.weights = {name: weights[name] for name in self.metrics if name in weights}
        self._programs: dict[tuple, Callable] = {}

    def identity(self) -> dict:
        """Everything that determines the results, JSON-ready: metrics, SHA-256 of weight files."""
        facts: dict = {"metrics": list(self.metrics)}
        if self.weights:
            facts["weights"] = {name: _sha256(path) for name, path in self.weights.items()}
        return facts

    def __call__(
        self,
        source: np.ndarray,
        output: np.ndarray,
        starts: Sequence[int] = (),
        flow: Path | None = None,
        colour: Colour = BT709,
    ) -> Quality:
        """Measures a clip.

        Args:
            source: (t, h, w, 3) uint8.
            output: Decoded clip of the same shape.
            starts: First frames of the groups that the output was coded in, for the seam metric.
            flow: Folder with optical flow of the source, for e_warp.
            colour: Colour space of the YUV 4:2:0 that YUV metrics compute on.

        Returns:
            The results; `missing` lists metrics that frame size or installation do not allow.

        Raises:
            ValueError: If the clips differ in shape or are not uint8.
        """
        if source.shape != output.shape or source.dtype != np.uint8 or output.dtype != np.uint8:
            raise ValueError(
                f"cannot compare {source.shape} {source.dtype} with {output.shape} {output.dtype}"
            )
        result = Quality({}, {}, {}, {}, {}, {})
        given = {"e_warp": flow, "vmaf": colour, "psnr_yuv": colour}
        for name in self.metrics:
            try:
                # On the host, or on the device: the whole clip, or batches of frames.
                if name in _ON_HOST:
                    start = time.perf_counter()
                    more = given[name] if name in given else self._weights_of(name)
                    values = _ON_HOST[name](source, output, more)
                    result.seconds[name] = time.perf_counter() - start
                elif name == "temporal":
                    values = self._timed(result, name, (source, output))
                    values["seam"] = seam(values.pop("changes"), starts)
                else:
                    values = {name: self._by_batch(result, name, source, output)}
                if name in TEMPORAL:
                    result.temporal.update({k: _finite(v) for k, v in values.items()})
                else:
                    _summarise(result, values)
            except (ValueError, FileNotFoundError) as error:
                result.missing[name] = str(error)
                section = result.temporal if name in TEMPORAL else result.quality
                section.update(dict.fromkeys(FIELDS[name]))
        # Slope and change of the PSNR over the frames: whether errors add up along the clip.
        if "psnr" in self.metrics:
            along = drift(result.frames["psnr_rgb"])
            result.temporal.update({k: _finite(v) for k, v in along.items()})
        return result

    def _by_batch(self, result: Quality, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values (t,) of a metric; the last batch is padded by repeating its last frame."""
        most = max(1, min(BATCH, _BATCH_PIXELS // math.prod(x.shape[1:3])))
        batch = -(-len(x) // -(-len(x) // most))  # equal batches need the least padding
        values = []
        for start in range(0, len(x), batch):
            index = np.minimum(np.arange(start, start + batch), len(x) - 1)
            values.append(self._timed(result, name, (x[index], y[index])))
        return np.concatenate(values)[: len(x)].astype(np.float64)

    def _weights_of(self, name: str) -> Any:
        return _weights(name, self.weights.get(name))

    def _timed(self, result: Quality, name: str, clips: tuple[np.ndarray, np.ndarray]) -> Any:
        arguments = (self._weights_of(name), *clips)
        # Compiled ahead, so that compilation is timed apart from measuring.
        key = (name, clips[0].shape)
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = jax.jit(_FUNCTIONS[name]).lower(*arguments).compile()
            result.compile_seconds[name] = time.perf_counter() - start
        start = time.perf_counter()
        values = jax.device_get(self._programs[key](*arguments))
        result.seconds[name] = result.seconds.get(name, 0.0) + time.perf_counter() - start
        return values


def _lpips(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return lpips(params, to_float(x), to_float(y))


_FUNCTIONS = {  # (weights, source, output) -> value per frame, or dictionary for the clip
    "psnr": lambda _, x, y: mean_squared_error(x, y),
    "ms_ssim": lambda _, x, y: ms_ssim(x, y),
    "lpips_alex": _lpips,
    "lpips_vgg": _lpips,
    "dists": lambda p, x, y: dists(p, x.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255),
    "temporal": lambda _, x, y: temporal(x, y),
}


def _psnr_yuv(x: np.ndarray, y: np.ndarray, colour: Colour) -> dict[str, np.ndarray]:
    """PSNR per frame of 8-bit YUV 4:2:0 planes, and their mean with weights 6:1:1 (JVET)."""
    planes = ([np.stack(p) for p in zip(*(rgb_to_yuv420(f, colour) for f in v))] for v in (x, y))
    pairs = zip("yuv", *planes)
    values = {name: np.asarray(psnr(a[..., None], b[..., None])) for name, a, b in pairs}
    mean = (6 * values["y"] + values["u"] + values["v"]) / 8
    return {"psnr_yuv": mean} | {f"psnr_{name}": value for name, value in values.items()}


_ON_HOST = {  # (source, output, weights, flow or colour) -> values by field
    "psnr_yuv": _psnr_yuv,
    "vmaf": vmaf,
    "e_warp": warping_error,
    "clip": lambda x, y, encoder: clip_measures(encoder, x, y),
}


# One network serves all clips of a process.
@functools.cache
def _weights(name: str, path: Path | None) -> Any:
    if name not in WITH_WEIGHTS:
        return None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"file {path} missing")
    if name == "clip":
        if path is None:
            raise FileNotFoundError("no file given with --weights clip=FILE")
        return load_clip(path)
    if name == "dists":
        return load_dists(path)
    return load_weights(name.removeprefix("lpips_"), path)


@functools.cache
def _sha256(path: Path) -> str | None:
    """SHA-256 of a file; None if it does not exist."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summarise(result: Quality, by_name: dict[str, np.ndarray]) -> None:
    """Adds means over frames: means of decibels, and decibels of means where both are common."""
    for name, values in by_name.items():
        if name == "psnr":
            decibel_values = np.asarray(decibels(jnp.asarray(values)), np.float64)
            result.frames["psnr_rgb"] = decibel_values.tolist()
            result.quality["psnr_rgb"] = float(decibel_values.mean())
            # PSNR of the mean error, as against the mean of PSNRs above it.
            result.quality["apsnr_rgb"] = float(decibels(jnp.asarray(values.mean())))
        elif name == "ms_ssim":
            result.frames["ms_ssim_rgb"] = values.tolist()
            # In dB because MS-SSIM crowds near 1, where -10 log10(1 - x) spreads it.
            result.quality["ms_ssim_rgb"] = mean = float(values.mean())
            result.quality["ms_ssim_rgb_db"] = -10 * math.log10(max(1 - mean, 1e-10))
        else:
            result.frames[name] = values.tolist()
            result.quality[name] = float(values.mean())


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
