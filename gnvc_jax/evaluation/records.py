"""The records of a sweep on disk, one JSON file for each clip and point.

A record has a key, everything that determines its result. `Records.load` gives it back only if the
key is still the same, so that a rerun measures what has changed and nothing else.

OUT/records/CLIP__POINT.json     the record: source, codec, rate, quality, temporal, speed, status
OUT/frames/CLIP__POINT.json      the metrics of every frame
OUT/bitstreams/CLIP__POINT.*     the file that was measured
OUT/pictures/                    frames to look at, see `pictures`
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.points import CodedClip, Point
from gnvc_jax.evaluation.quality import Quality
from gnvc_jax.files import write_json, write_whole

SCHEMA = "gnvc-eval/1"


def now() -> str:
    """Current time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Records:
    """Reads and writes the records below one folder."""

    def __init__(self, out: Path):
        self.out = out

    def path(self, kind: str, clip: Clip, point: Point, suffix: str) -> Path:
        """Path of a file of a point; `kind` is the folder, such as "records"."""
        return self.out / kind / f"{clip.name}__{point.label}{suffix}"

    def load(self, clip: Clip, point: Point, key: dict) -> dict | None:
        """Loads the finished record with this key; None if there is none."""
        try:
            record = json.loads(self.path("records", clip, point, ".json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        # The stored key has been through JSON, where tuples become lists.
        same = record.get("key") == json.loads(json.dumps(key))
        return record if same and record.get("status") == "ok" else None

    def save(self, clip: Clip, point: Point, record: dict) -> None:
        """Writes a record."""
        write_json(self.path("records", clip, point, ".json"), record)

    def save_bitstream(self, clip: Clip, point: Point, bitstream: bytes) -> Path:
        """Writes the file of a point and returns its path."""
        path = self.path("bitstreams", clip, point, point.suffix)
        write_whole(path, bitstream)
        return path

    def save_frames(self, clip: Clip, point: Point, frames: dict[str, list[float]]) -> None:
        """Writes the metrics of every frame."""
        write_json(self.path("frames", clip, point, ".json"), frames)


def finished(
    key: dict, clip: Clip, point: Point, coded: CodedClip, size: int | None, q: Quality
) -> dict:
    """Record of a point that was coded and measured.

    Args:
        key: Everything that determines the result.
        clip: Source.
        point: Way of coding.
        coded: Coded clip.
        size: Bytes of the file, None without a file.
        q: Results of the metrics.
    """
    return {
        **_head(key, clip, point),
        "status": "ok",
        "codec": {"label": point.label, **point.identity(), **coded.details},
        "rate": rate(size, clip),
        "quality": q.quality,
        "temporal": q.temporal,
        "not_measured": q.missing,
        "speed": {
            "encode_seconds": coded.encode_seconds,
            "decode_seconds": coded.decode_seconds,
            "metric_seconds": q.seconds,
            "metric_compile_seconds": q.compile_seconds,
        },
    }


def failed(key: dict, clip: Clip, point: Point, error: Exception) -> dict:
    """Record of a point that could not be coded or measured."""
    # Tables have room for one line.
    reason = (str(error).strip().splitlines() or [""])[0]
    return {
        **_head(key, clip, point),
        "status": "failed",
        "error": f"{type(error).__name__}: {reason}",
        "codec": {"label": point.label},
    }


def rate(size: int | None, clip: Clip) -> dict[str, float | None]:
    """Rate of a file of `size` bytes: bytes, bpp (bits per pixel of the source) and kbps."""
    if size is None:
        return {"bytes": None, "bpp": None, "kbps": None}
    count, height, width = clip.frames.shape[:3]
    return {
        "bytes": size,
        "bpp": 8 * size / (count * height * width),
        "kbps": float(8 * size * clip.fps / count / 1000),
    }


def _head(key: dict, clip: Clip, point: Point) -> dict:
    count, height, width = clip.frames.shape[:3]
    return {
        "schema": SCHEMA,
        "created": now(),
        "key": key,
        "clip": clip.name,
        "point": point.label,
        "source": {
            "width": width,
            "height": height,
            "frames": count,
            "fps": str(clip.fps),
            "track": "rgb",
            "sha256": clip.sha256,
        },
    }


def curve_of(record: dict) -> str:
    """Name of the curve that a record belongs to: codec, and refinement steps if given."""
    codec, steps = record["codec"]["codec"], record["codec"].get("steps")
    return codec if steps is None else f"{codec}, {steps} step{'' if steps == 1 else 's'}"


def means(records: Sequence[dict]) -> dict[str, dict]:
    """Plain means over clips for every point.

    Args:
        records: Records of a sweep.

    Returns:
        {point: {"clips": how many finished, section: {field: mean over the clips that have it}}}.
    """
    result = {}
    # In the order in which points were measured.
    for label in dict.fromkeys(r["point"] for r in records if r["status"] == "ok"):
        group = [r for r in records if r["point"] == label and r["status"] == "ok"]
        result[label] = {"clips": len(group)}
        # A clip may lack a field: short ones have no temporal metrics, small ones no LPIPS.
        for section in ("rate", "quality", "temporal"):
            values = {
                field: [v for r in group if (v := r[section].get(field)) is not None]
                for field in group[0][section]
            }
            result[label][section] = {f: sum(v) / len(v) if v else None for f, v in values.items()}
    return result
