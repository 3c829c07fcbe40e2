"""All metrics of a decoded clip at once, compiled for one batch shape and timed."""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.evaluation.vmaf import vmaf
from gnvc_jax.media.colour import BT709, Colour, rgb_to_yuv420
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.clip import clip_measures, load_clip
from gnvc_jax.metrics.dists import dists, load_dists
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.metrics.ms_ssim import ms_ssim
from gnvc_jax.metrics.psnr import decibels, mean_squared_error, psnr
from gnvc_jax.metrics.temporal import drift, seam, temporal
from gnvc_jax.metrics.warping import warping_error

FIELDS = {  # metric: what it adds to a record
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
TEMPORAL = (
    "temporal",
    "e_warp",
    "clip",
)  # values of a whole clip, the others have one for each frame
WITH_WEIGHTS = ("lpips_alex", "lpips_vgg", "dists", "clip")  # metrics that take a file of the user
DEFAULT = ("psnr", "ms_ssim", "lpips_alex", "temporal")
BATCH = 8
_BATCH_PIXELS = 2**21  # bounds the activations of VGG to about half a gigabyte a layer


@dataclasses.dataclass(frozen=True)
class Quality:
    """What was measured on one clip; JSON-ready.

    quality, temporal: numbers for the whole clip, None where not measured; frames: the same for
    every frame; seconds, compile_seconds: by metric, compilation apart; missing: why a metric was
    not measured.
    """

    quality: dict[str, float | None]
    temporal: dict[str, float | None]
    frames: dict[str, list[float]]
    seconds: dict[str, float]
    compile_seconds: dict[str, float]
    missing: dict[str, str]


class Meter:
    """Measures clips; weights are loaded once, programs are compiled once for each frame size."""

    def __init__(self, metrics: Sequence[str] = DEFAULT, weights: Mapping[str, Path] | None = None):
        """metrics: names from METRICS; weights: a .safetensors file for some of WITH_WEIGHTS.

        Raises ValueError for other names. A file that is not there, or not what it should be, is
        found when its metric is measured, and becomes the reason why it is missing.
        """
        weights = dict(weights or {})
        for names, known in ((metrics, METRICS), (weights, WITH_WEIGHTS)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"unknown metric '{unknown[0]}', expected {', '.join(known)}")
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.weights = {name: weights[name] for name in self.metrics if name in weights}
        self._programs: dict[tuple, Callable] = {}

    def identity(self) -> dict:
        """All that decides what is measured, JSON-ready: metrics, SHA-256 of weights by metric."""
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
        """Measures `output` against `source`, both (t, h, w, 3) uint8.

        starts: first frames of the groups that the output was coded in, for the measure of seams;
        flow: folder with flow of the source, for e_warp; colour: of the YUV 4:2:0 that metrics of
        YUV make of the frames.
        A metric that this frame size or this installation does not allow is listed in `missing`.
        Raises ValueError where the clips differ in shape or are not uint8.
        """
        if source.shape != output.shape or source.dtype != np.uint8 or output.dtype != np.uint8:
            raise ValueError(
                f"cannot compare {source.shape} {source.dtype} with {output.shape} {output.dtype}"
            )
        result = Quality({}, {}, {}, {}, {}, {})
        given = {"e_warp": flow, "vmaf": colour, "psnr_yuv": colour}
        for name in self.metrics:
            try:
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
        if "psnr" in self.metrics:
            along = drift(result.frames["psnr_rgb"])
            result.temporal.update({k: _finite(v) for k, v in along.items()})
        return result

    def _by_batch(self, result: Quality, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(t,) values; the last batch is filled up with its last frame."""
        most = max(1, min(BATCH, _BATCH_PIXELS // math.prod(x.shape[1:3])))
        batch = -(-len(x) // -(-len(x) // most))  # equal shares, which leaves least to fill up
        values = []
        for start in range(0, len(x), batch):
            index = np.minimum(np.arange(start, start + batch), len(x) - 1)
            values.append(self._timed(result, name, (x[index], y[index])))
        return np.concatenate(values)[: len(x)].astype(np.float64)

    def _weights_of(self, name: str):
        return _weights(name, self.weights.get(name))

    def _timed(self, result: Quality, name: str, clips: tuple[np.ndarray, np.ndarray]):
        arguments = (self._weights_of(name), *clips)
        key = (name, clips[0].shape)
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = jax.jit(_FUNCTIONS[name]).lower(*arguments).compile()
            result.compile_seconds[name] = time.perf_counter() - start
        start = time.perf_counter()
        values = jax.device_get(self._programs[key](*arguments))
        result.seconds[name] = result.seconds.get(name, 0.0) + time.perf_counter() - start
        return values


def _lpips(params, x, y):
    return lpips(params, x.astype(jnp.float32) / 127.5 - 1, y.astype(jnp.float32) / 127.5 - 1)


_FUNCTIONS = {  # (weights, source, output) -> a value for each frame, or a dict for the clip
    "psnr": lambda _, x, y: mean_squared_error(x, y),
    "ms_ssim": lambda _, x, y: ms_ssim(x, y),
    "lpips_alex": _lpips,
    "lpips_vgg": _lpips,
    "dists": lambda p, x, y: dists(p, x.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255),
    "temporal": lambda _, x, y: temporal(x, y),
}


def _psnr_yuv(x: np.ndarray, y: np.ndarray, colour: Colour) -> dict[str, np.ndarray]:
    """PSNR of 8-bit YUV 4:2:0 planes, frame by frame, and their mean with weights 6:1:1 (JVET)."""
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


@functools.cache
def _weights(name: str, path: Path | None):
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
    """None where there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summarise(result: Quality, by_name: dict[str, np.ndarray]) -> None:
    """Means over frames. The decibel forms of means stand beside the means of decibels."""
    for name, values in by_name.items():
        if name == "psnr":
            decibel_values = np.asarray(decibels(values), np.float64)
            result.frames["psnr_rgb"] = decibel_values.tolist()
            result.quality["psnr_rgb"] = float(decibel_values.mean())
            result.quality["apsnr_rgb"] = float(decibels(values.mean()))
        elif name == "ms_ssim":
            result.frames["ms_ssim_rgb"] = values.tolist()
            result.quality["ms_ssim_rgb"] = mean = float(values.mean())
            result.quality["ms_ssim_rgb_db"] = -10 * math.log10(max(1 - mean, 1e-10))
        else:
            result.frames[name] = values.tolist()
            result.quality[name] = float(values.mean())


def _finite(value) -> float | None:
    return float(value) if np.isfinite(value) else None
