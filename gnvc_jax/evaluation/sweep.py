"""Rate-distortion sweeps: code real files, decode them, measure them, and keep records.

`Sweep.run` goes through all clips; `Sweep.measure` gives the record of one point on one clip, from
disk if nothing that determines it has changed. Failures are records, too: a sweep of days goes on,
and the tables show what is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gnvc_jax.evaluation import records as rec
from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.pictures import Pictures, View
from gnvc_jax.evaluation.points import AnchorPoint, CodingError, Point
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.evaluation.records import Records


class Sweep:
    """Measures points on clips, one record each; what is on record is not measured again."""

    def __init__(
        self,
        out: Path,
        meter: QualityMeter,
        force: bool = False,
        progress: Callable[[str, str], None] = lambda label, status: None,
        flow: Path | None = None,
        anchor_rates: Sequence[float] = (1.0,),
    ):
        """Prepares a sweep.

        Args:
            out: Folder for records.
            meter: Metrics.
            force: Whether to measure again what is on record.
            progress: Function that is called with a label and "kept", "ok" or "failed" after every
                point.
            flow: Folder with a folder of optical flow for each clip, see
                `metrics.warping.flow_of_files`.
            anchor_rates: Rates of standard codecs as multiples of the rates of our points.
        """
        self.records, self.meter, self.force, self.progress = Records(out), meter, force, progress
        self.flow, self.anchor_rates = flow, anchor_rates
        self.pictures = Pictures(out)

    def run(
        self,
        clips: Mapping[str, Callable[[], Clip]],
        points: Sequence[Point],
        anchors: Sequence[str] = (),
        anchor_point: Callable[[str, str, int], Point] = AnchorPoint,
    ) -> list[dict]:
        """Measures every point on every clip, then each anchor at `anchor_rates` of each point.

        Args:
            clips: Functions that read the clips, by name.
            points: Ways of coding. Points without a file get no anchors; points of the same size
                share them.
            anchors: Names of standard codecs.
            anchor_point: Function from (codec, label of the point to match, its bytes) to a point.

        Returns:
            All records, including failures; a clip that cannot be read is a single failure.
        """
        result = []
        for name, read in clips.items():
            try:
                clip = read()
            except Exception as error:
                result.append({"clip": name, "point": "", "status": "failed", "error": str(error)})
                self.progress(name, "failed")
                continue
            own = [self.measure(clip, point) for point in points]
            result += own
            # Points that differ only in refinement have the same file, hence the same anchors.
            like: dict[int, str] = {}  # the first point of each size
            for record in own:
                size = (record.get("rate") or {}).get("bytes")
                if size is not None:
                    like.setdefault(size, record["point"])
            result += [
                self.measure(clip, anchor_point(codec, name, round(rate * size)))
                for size, label in like.items()
                for rate in self.anchor_rates
                for name in [label if rate == 1 else f"{rate:g}x-{label}"]
                for codec in anchors
            ]
        return result

    def measure(self, clip: Clip, point: Point) -> dict:
        """Returns the record of one point on one clip, from disk if it is there."""
        label = f"{clip.name} {point.label}"
        # Whatever changes the result is in the key; a record with another key is measured again.
        key = {"source": clip.sha256, "codec": {}, **self.meter.identity()}
        if clip.colour.full_range:
            key["range"] = "full"
        if flow := self._flow(clip):
            key["flow"] = [[p.name, p.stat().st_mtime] for p in sorted(flow.glob("*"))]
        try:
            key["codec"] = point.identity()
            view = self.pictures.view(clip)
            # A record counts as finished only with its pictures, which the report shows.
            seen = self.pictures.complete(clip.name, point.label, view)
            if not self.force and seen and (record := self.records.load(clip, point, key)):
                self.progress(label, "kept")
                return record
            record = self._measure(clip, point, key, view)
        except Exception as error:  # one bad point must not end the run
            record = rec.failed(key, clip, point, error)
        self.records.save(clip, point, record)
        self.progress(label, record["status"])
        return record

    def _measure(self, clip: Clip, point: Point, key: dict, view: View) -> dict:
        coded = point.code(clip)
        if coded.frames.shape != clip.frames.shape:
            raise CodingError(f"{clip.frames.shape} went in, {coded.frames.shape} came out")
        # The size is that of the file on disk, not an estimate.
        size = None
        if coded.bitstream is not None:
            path = self.records.save_bitstream(clip, point, coded.bitstream)
            size = path.stat().st_size
        quality = self.meter(clip.frames, coded.frames, coded.starts, self._flow(clip), clip.colour)
        self.records.save_frames(clip, point, quality.frames)
        self.pictures.save(clip.name, point.label, view, coded.frames)
        return rec.finished(key, clip, point, coded, size, quality)

    def _flow(self, clip: Clip) -> Path | None:
        return self.flow and self.flow / clip.name
