"""Evaluation during training: held-out clips are coded, and the best model so far is kept.

Every `evaluate.every` steps, and after the last one, the averaged weights become the model that
`gnvc release` would make of them. It encodes each clip at four quality levels and decodes it again.
Rates are those of the streams, headers and motion included. For each level it logs

    eval_bpp_qp21     bits per pixel
    eval_psnr_qp21    dB, mean over frames
    eval_lpips_qp21   LPIPS (AlexNet), mean over frames

as means over clips, and `eval_score`, see `score`. The model of the highest score is kept as
`best.safetensors` in the run's folder, beside `best.json`, which says what was best; both outlive
restarts.

TensorBoard gets the last frame of each clip as it is and as decoded from each level, large ones cut
to their middle.
"""

import itertools
import json
import math
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from gnvc_jax.arrays import Tree
from gnvc_jax.buckets import AnyPath, as_path
from gnvc_jax.data.index import find_videos
from gnvc_jax.errors import UsageError
from gnvc_jax.files import write_json
from gnvc_jax.frames import to_float
from gnvc_jax.media.reader import open_video
from gnvc_jax.metrics.backbones import MIN_SIDE, load_weights
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.metrics.psnr import psnr
from gnvc_jax.model import Model
from gnvc_jax.model_file import save_model
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.pretrained import Codec
from gnvc_jax.training import latent_statistics, partition, stages, weights
from gnvc_jax.training.config import EvaluationConfig
from gnvc_jax.training.hooks import Hook, TrainingRun
from gnvc_jax.training.metrics import say
from gnvc_jax.training.release import model_of_parts
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.weights import Statistics

# Both ends of the range, and its thirds.
QPS = (0, 21, 42, 63)

SHOWN = 512  # largest height and width of the frames in TensorBoard

# What a doubling of the rate is worth, roughly as measured along the curves of codecs. The score
# compares models of one run, whose rates differ little at the same level.
WORTH_OF_DOUBLING = {"psnr": 3.0, "lpips": 0.1}


class Evaluator(Hook):
    """Codes held-out clips and keeps the best model.

    All processes of a run code the same clips, each on one of its devices; the first one writes.
    """

    def __init__(self, stage: Stage, statistics: Statistics):
        """Reads the clips, and what the model has beside the parameters that train.

        Args:
            stage: Stage with a VAE and a codec.
            statistics: Statistics that the stage measured when the run began.

        Raises:
            UsageError: If the stage has no codec, or there is no clip.
            MediaError: If a clip cannot be read.
            FileNotFoundError: If `evaluate.best_by` is "lpips", and there are no weights for it.
        """
        experiment = stage.experiment
        self.experiment, self.config = experiment, experiment.evaluate
        shapes = stages.model_shapes(stage)
        if not {"vae", "codec"} <= shapes.keys():
            raise UsageError(
                f"evaluate.every: the stage `{experiment.stage}` has no codec to evaluate, use 0"
            )
        # All that the model needs is read now, so that an error comes before training and not after
        # it.
        self.statistics = latent_statistics.complete(experiment, statistics)
        # As a release reads them. The train step has them too, but on all devices.
        self.fixed = weights.load(experiment, stages.stored_shapes(stage), self.statistics)
        self.clips = read_clips(self.config)
        self.lpips = load_lpips(self.config, self.clips)
        self.best = BestModel(as_path(experiment.run.out), self.config)
        self.frames: dict[str, np.ndarray] = {}  # by name, as of the last evaluation

    def after_step(self, run: TrainingRun) -> None:
        """Evaluates if it is time."""
        if run.stopped or not (run.finished or run.step % self.config.every == 0):
            return
        with run.paused():
            began = time.perf_counter()
            # A collective in a run of several processes, so all of them take part.
            averaged = on_host(run.state.ema)  # on the mesh of the run; coding uses one device
            with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.local_devices()[:1])):
                model = self.model(averaged)
                found = self.measure(model)
            if jax.process_index() == 0:
                self.best.offer(model, run.step, found["eval_score"])
            run.write(found | {"eval_s": time.perf_counter() - began})
            run.writer.show(run.step, self.frames)

    def model(self, averaged: Tree) -> Model:
        """Builds the model of averaged weights."""
        parts = partition.assemble(self.fixed, averaged)
        name = as_path(self.experiment.run.out).name
        return model_of_parts(self.experiment, name, parts, self.statistics)

    def measure(self, model: Model) -> dict[str, float]:
        """Measures rates, qualities and the score of a model, under the names in the log."""
        codec = Codec(model)
        found = {}
        for i, clip in enumerate(self.clips):
            self.frames[f"clip{i}/source"] = middle(clip[-1])
        for qp in QPS:
            measured = []
            for i, clip in enumerate(self.clips):
                figures, decoded = self.measure_clip(codec, clip, qp)
                measured.append(figures)
                # The last frame, since errors add up from latent to latent.
                self.frames[f"clip{i}/qp{qp}"] = middle(decoded[-1])
            for name in measured[0]:
                # Means over clips of values that are means over frames.
                found[f"eval_{name}_qp{qp}"] = float(np.mean([one[name] for one in measured]))
        return {"eval_score": score(found, self.config.best_by)} | found

    def measure_clip(
        self, codec: Codec, clip: np.ndarray, qp: int
    ) -> tuple[dict[str, float], np.ndarray]:
        """Measures rate and quality of one clip, uint8 (t, h, w, 3), at one level.

        Returns:
            The figures, and the decoded clip.
        """
        stream = codec.encode(clip, qp=qp)
        decoded = codec.decode(stream)
        found = {
            # Bits of the whole file over the pixels of all frames, t * h * w.
            "bpp": 8 * len(stream) / math.prod(clip.shape[:3]),
            "psnr": float(np.mean(psnr(clip, decoded))),
        }
        if self.lpips is not None:
            pairs = zip(to_float(clip)[:, None], to_float(decoded)[:, None], strict=True)
            found["lpips"] = float(np.mean([frame_lpips(self.lpips, a, b) for a, b in pairs]))
        return found, decoded


frame_lpips = jax.jit(lpips)  # frame by frame, which takes little memory


def score(found: dict[str, float], measure: str) -> float:
    """Scores a model; a higher score is better, and comparable between models of one run.

    It is the mean over levels of the distance of quality from a straight line over the logarithm of
    the rate: PSNR - 3 log2(bpp) in dB, or -(LPIPS + 0.1 log2(bpp)). Moving along its own curve of
    rate and quality hardly changes the score of a codec; moving the curve does.

    Args:
        found: Means over clips, as they are logged.
        measure: "psnr" or "lpips".
    """
    sign = {"psnr": 1.0, "lpips": -1.0}[measure]
    values = [
        sign * found[f"eval_{measure}_qp{qp}"]
        - WORTH_OF_DOUBLING[measure] * math.log2(found[f"eval_bpp_qp{qp}"])
        for qp in QPS
    ]
    return float(np.mean(values))


def middle(frame: np.ndarray) -> np.ndarray:
    """Cuts the middle out of a frame (h, w, 3) that is larger than SHOWN."""
    starts = (max(0, side - SHOWN) // 2 for side in frame.shape[:2])
    return frame[tuple(slice(start, start + SHOWN) for start in starts)]


class BestModel:
    """The best model of a run, kept in its folder.

    Args:
        folder: Run folder.
        config: Settings of evaluation.

    Attributes:
        best: Score of the best model; None if there is none yet, or if it was found on other clips
            or by another measure.
    """

    def __init__(self, folder: AnyPath, config: EvaluationConfig):
        self.path, self.record = folder / "best.safetensors", folder / "best.json"
        # What scores depend on beside the model.
        self.settings = {
            "data": config.data,
            "frames": config.frames,
            "clips": config.clips,
            "best_by": config.best_by,
        }
        self.best = self.read()

    def read(self) -> float | None:
        """Reads the best score so far, if the model is there and settings have not changed.

        Raises:
            UsageError: If the record is damaged.
        """
        try:
            record = json.loads(self.record.read_text())
            same = record["settings"] == self.settings and self.path.is_file()
            return record["score"] if same else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.record}: damaged ({error}), remove it") from None

    def offer(self, model: Model, step: int, score: float) -> None:
        """Keeps a model if its score is better than the best so far."""
        if not score > (-math.inf if self.best is None else self.best):  # NaN is not
            return
        self.best = score
        save_model(self.path, model)
        write_json(self.record, {"step": step, "score": score, "settings": self.settings})


def read_clips(config: EvaluationConfig) -> list[np.ndarray]:
    """Reads the held-out clips, uint8 (t, h, w, 3) each.

    Raises:
        UsageError: If there is no clip.
        MediaError: If a clip cannot be read.
    """
    paths = sorted(set(find_videos(as_path(config.data or ""))))[: config.clips]
    if not paths:
        raise UsageError(f"evaluate.data: {config.data} holds no video")
    clips = []
    for path in paths:
        with open_video(path) as video:
            clips.append(np.stack(list(itertools.islice(video, config.frames))))
    return clips


def load_lpips(config: EvaluationConfig, clips: list[np.ndarray]) -> Tree | None:
    """Loads the weights of LPIPS.

    Returns:
        The weights, or None, with a message, if they are missing or a clip is too small for LPIPS.

    Raises:
        FileNotFoundError, UsageError: If the best model is chosen by LPIPS, which needs them.
    """
    try:
        if min(min(clip.shape[1:3]) for clip in clips) < MIN_SIDE:
            raise UsageError(f"a clip of evaluate.data has a side below {MIN_SIDE}")
        return load_weights("alex")
    except (FileNotFoundError, UsageError) as error:
        if config.best_by == "lpips":
            raise
        say(f"evaluation without LPIPS: {error}")
        return None


def on_host(tree: Tree) -> Tree:
    """Copies whole arrays to the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
