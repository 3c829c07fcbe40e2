"""Evaluation during training: real streams, the best model, and what cannot be evaluated."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.media.writer import open_writer
from gnvc_jax.model_file import load_model
from gnvc_jax.pretrained import load_pretrained
from gnvc_jax.training import evaluator, stages
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    InitConfig,
    OptimConfig,
    RunConfig,
)
from gnvc_jax.training.evaluator import QPS, BestModel, Evaluator
from gnvc_jax.training.hooks import TrainingRun
from gnvc_jax.training.loop import train
from gnvc_jax.training.release import release
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.vae import VAELoss
from gnvc_jax.training.state import init_state
from gnvc_jax.training.throughput import Clock
from gnvc_jax.vae import VAEConfig

VAE = VAEConfig(4, (1, 1, 1), 1, 4, (True, True), patch=2, linear=True)
STATISTICS = {
    "mean": np.float32([0.1, 0.0, -0.1, 0.2]),
    "std": np.float32([1.0, 2.0, 0.5, 1.0]),
    "white": np.ones((2, 4), np.float32),
}
CLIP = np.random.default_rng(7).integers(0, 256, (7, 64, 80, 3), np.uint8)


class Log:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.lines, self.images = [], {}

    def write(self, step, values):
        self.lines.append({"step": step} | dict(values))

    def show(self, step, images):
        self.images[step] = dict(images)

    def close(self):
        pass


def random_params(stage, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: stages.init_trained(stage, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)


def run_after(stage, step, log):
    """A run after a step, with weights of zero whose average is not."""
    params, average = jax.tree.map(jnp.zeros_like, random_params(stage)), random_params(stage)
    state = init_state(stage.experiment.optim, params, jax.random.key(0))
    state = dataclasses.replace(state, ema=average)
    return TrainingRun(stage, state, STATISTICS, None, Clock(0.0), log, step)


@pytest.fixture
def stage(tiny_codec, tmp_path):
    """A stage `codec` on the VAE of another run, with two held-out clips."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, frames in (("a", CLIP[::-1]), ("b", CLIP[:1]), ("c", CLIP)):
        with open_writer(clips / f"{name}.y4m", 80, 64, 25) as out:
            for frame in frames:
                out.write(frame)
    vae = Experiment("vae", VAE, loss=VAELoss(lpips=0.0), run=RunConfig(out=str(tmp_path / "vae")))
    vae_stage = make_stage(vae)
    checkpoints = Checkpoints(vae)
    checkpoints.save(1, init_state(vae.optim, random_params(vae_stage), jax.random.key(0)), {})
    checkpoints.close()
    return make_stage(
        Experiment(
            "codec",
            VAE,
            tiny_codec,
            init=InitConfig(vae=vae.run.out),
            loss=CodecLoss(),
            data=DataConfig(frames=5, size=(64, 64), batch=8),
            optim=OptimConfig(steps=5),
            run=RunConfig(out=str(tmp_path / "run")),
            evaluate=EvaluationConfig(every=2, data=str(clips), frames=6, clips=1),
        )
    )


def test_logged_figures_are_those_of_the_released_model(stage, tmp_path):
    log, step = Log(), 2
    run = run_after(stage, step, log)
    evaluated = Evaluator(stage, STATISTICS)
    assert len(evaluated.clips) == 1
    evaluated.after_step(run)
    (line,) = log.lines

    checkpoints = Checkpoints(stage.experiment)
    checkpoints.save(step, run.state, {}, STATISTICS)
    checkpoints.close()
    release(stage.experiment.run.out, tmp_path / "released.safetensors")
    codec = load_pretrained(tmp_path / "released.safetensors")
    (clip,) = evaluated.clips  # six frames of the first file, through 4:2:0
    assert clip.shape == (6, 64, 80, 3)
    for qp in QPS:
        stream = codec.encode(clip, qp=qp)
        assert line[f"eval_bpp_qp{qp}"] == 8 * len(stream) / (6 * 64 * 80)
        decoded = codec.decode(stream)
        np.testing.assert_array_equal(log.images[step][f"clip0/qp{qp}"], decoded[-1])
        errors = (decoded.astype(float) - clip) ** 2
        psnr = 10 * np.log10(255**2 / errors.mean((1, 2, 3)))
        assert line[f"eval_psnr_qp{qp}"] == pytest.approx(psnr.mean(), rel=1e-5)
        assert 0 < line[f"eval_lpips_qp{qp}"] < 2
    np.testing.assert_array_equal(log.images[step]["clip0/source"], clip[-1])
    expected = [line[f"eval_psnr_qp{q}"] - 3 * np.log2(line[f"eval_bpp_qp{q}"]) for q in QPS]
    assert line["eval_score"] == pytest.approx(np.mean(expected))
    best = load_model(tmp_path / "run" / "best.safetensors")
    assert best.name == "run" and best.fingerprints == codec.model.fingerprints


def test_large_frames_are_shown_by_their_middle():
    frame = np.arange(600 * 20 * 3).reshape(600, 20, 3)
    np.testing.assert_array_equal(evaluator.middle(frame), frame[44:556])


def test_evaluation_is_every_so_many_steps_and_at_the_end(stage, monkeypatch):
    monkeypatch.setattr(Evaluator, "model", lambda self, averaged: None)
    monkeypatch.setattr(Evaluator, "measure", lambda self, model: {"eval_score": 0.0})
    monkeypatch.setattr(BestModel, "offer", lambda self, model, step, score: None)
    log, hook = Log(), Evaluator(stage, STATISTICS)
    run = run_after(stage, 0, log)
    for run.step in range(1, 6):
        hook.after_step(run)
    run.step, run.stopped = 4, True
    hook.after_step(run)  # a run that is asked to stop does
    assert [line["step"] for line in log.lines] == [2, 4, 5]


def test_only_a_better_model_replaces_the_best_also_after_a_restart(tiny_model, tmp_path):
    config = EvaluationConfig(every=2, data="clips")
    models = [tiny_model(seed) for seed in range(4)]

    def kept():
        record = json.loads((tmp_path / "best.json").read_text())
        fingerprints = load_model(tmp_path / "best.safetensors").fingerprints
        (number,) = [i for i, model in enumerate(models) if model.fingerprints == fingerprints]
        return number, record["step"], record["score"]

    best = BestModel(tmp_path, config)
    best.offer(models[0], 10, -5.0)
    assert kept() == (0, 10, -5.0)
    best.offer(models[1], 20, -5.5)
    best.offer(models[1], 30, -5.0)
    best.offer(models[1], 40, float("nan"))
    assert kept() == (0, 10, -5.0)

    resumed = BestModel(tmp_path, dataclasses.replace(config, every=7))
    resumed.offer(models[1], 50, -5.1)
    assert kept() == (0, 10, -5.0)
    resumed.offer(models[2], 60, -4.9)
    assert kept() == (2, 60, -4.9)

    # Scores on other clips are no comparison.
    BestModel(tmp_path, dataclasses.replace(config, data="others")).offer(models[3], 70, -9.0)
    assert kept() == (3, 70, -9.0)
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(UsageError, match=r"best\.json: damaged"):
        BestModel(tmp_path, config)


def test_a_first_score_that_is_not_finite_is_not_kept(tiny_model, tmp_path):
    best = BestModel(tmp_path, EvaluationConfig(every=2, data="clips"))
    best.offer(tiny_model(0), 10, float("nan"))
    assert best.best is None and not (tmp_path / "best.safetensors").exists()


def test_a_score_is_the_distance_from_the_line_of_equal_worth():
    """Twice the rate for 3 dB, or for an LPIPS lower by 0.1, is no better and no worse."""

    def points(rate, psnr, lpips):
        return {
            f"eval_{name}_qp{qp}": x
            for qp in QPS
            for name, x in {"bpp": rate, "psnr": psnr, "lpips": lpips}.items()
        }

    for measure in ("psnr", "lpips"):
        first = evaluator.score(points(0.25, 30.0, 0.4), measure)
        assert evaluator.score(points(0.5, 33.0, 0.3), measure) == pytest.approx(first)
        assert evaluator.score(points(0.2, 30.0, 0.4), measure) > first
    assert evaluator.score(points(0.25, 31.0, 0.4), "psnr") > 36.0
    assert evaluator.score(points(0.25, 30.0, 0.3), "lpips") == pytest.approx(-0.1)


def test_lpips_without_weights_is_left_out_unless_it_decides(monkeypatch, capsys):
    def missing(net):
        raise FileNotFoundError("no LPIPS weights: install them")

    monkeypatch.setattr(evaluator, "load_weights", missing)
    config = EvaluationConfig(every=2, data="clips")
    assert evaluator.load_lpips(config, [CLIP]) is None
    assert capsys.readouterr().out == "evaluation without LPIPS: no LPIPS weights: install them\n"
    assert evaluator.load_lpips(config, [CLIP[:, :16]]) is None
    assert "a clip of evaluate.data has a side below 32" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no LPIPS weights"):
        evaluator.load_lpips(dataclasses.replace(config, best_by="lpips"), [CLIP])


def test_what_cannot_be_evaluated_is_said_at_the_start(stage, tmp_path):
    with pytest.raises(UsageError, match=r"evaluate\.every: the stage `codec` has no codec"):
        init = stage.init
        no_codec = dataclasses.replace(
            stage, init=lambda key: {"vae": init(key)["vae"]}, trainable=()
        )
        Evaluator(no_codec, STATISTICS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"evaluate\.data: .*empty holds no video"):
        evaluator.read_clips(EvaluationConfig(every=1, data=str(tmp_path / "empty")))


def test_training_makes_the_evaluator_before_its_first_step(tmp_path):
    base = toy_stage.experiment()
    experiment = dataclasses.replace(
        base,
        codec=CodecConfig(),
        run=dataclasses.replace(base.run, out=str(tmp_path / "run")),
        evaluate=EvaluationConfig(every=1, data=str(tmp_path)),
    )
    with pytest.raises(UsageError, match=r"the stage `toy_stage:toy_stage` has no codec"):
        train(toy_stage.toy_stage(experiment))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
