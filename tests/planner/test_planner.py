"""Counts of operations, communication and memory against what is known of small programs."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from gnvc_jax import cli
from gnvc_jax.functions import CodecFunctions
from gnvc_jax.parallel import MeshConfig, make_mesh, rules
from gnvc_jax.planner import chips, coding, flops, hlo, program, training
from gnvc_jax.refiner import VACE_1_3B, DiT, DiTConfig
from gnvc_jax.refiner.attention import exchanged_heads
from gnvc_jax.training import inputs
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig
from gnvc_jax.training.stages import Stage, make_stage
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.refine import RefineLoss
from gnvc_jax.training.stages.transform import TransformLoss
from gnvc_jax.training.stages.vae import VAELoss
from gnvc_jax.training.state import init_state
from gnvc_jax.training.step import jit_step

WIDTH = 64


def layers_stage(experiment):
    """Four scanned layers on frames of eight pixels, and a fixed one."""

    def init(key):
        layers = jax.random.normal(key, (4, WIDTH, WIDTH))
        return {"layers": layers, "last": jnp.zeros((WIDTH, WIDTH))}

    def loss(params, constants, batch, key, step):
        x = batch.reshape(batch.shape[0], -1)[:, :WIDTH].astype(jnp.float32)
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean((x @ params["last"]) ** 2), {}

    return Stage(experiment, init, loss, inputs.clips(experiment), trainable=("layers",))


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.setattr(rules, "SMALL", 0)
    return Experiment(
        f"{__name__}:layers_stage", data=DataConfig(frames=1, size=(8, 8), batch=1024)
    )


def plans(experiment, **mesh):
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(**mesh))
    return training.plan_for(experiment, jax.devices(), chips.CHIPS["v5p"])


def test_plan_of_a_step_with_known_cost(experiment):
    found = plans(experiment, data=1, fsdp=8)
    assert found["parameters"] == {"trained": 4 * WIDTH**2, "frozen": WIDTH**2}
    # Weights, average and two moments of four layers; the last; 128 clips; two counters and a key.
    expected = (4 * 4 + 1) * WIDTH**2 * 4 / 8 + 128 * 8 * 8 * 3
    assert expected <= found["argument_bytes"] <= expected + 16
    # Forward, then gradients of activations, and of the weights that are not frozen.
    product = 2 * 1024 * WIDTH**2
    assert found["flops"]["model"] == (5 + 5 + 4) * product
    assert found["fits"] and found["mfu_bound"] <= 1
    gathered = next(c for c in found["collectives"] if c["kind"] == "all-gather")
    assert gathered["sent"] >= 2 * 4 * WIDTH**2 * 4 * 7 / 8  # each layer, forward and backward
    json.dumps(found)


def test_memory_per_device_falls_with_the_number_of_devices(experiment):
    copied, spread = plans(experiment, data=8), plans(experiment, data=1, fsdp=8)
    batch = 128 * 8 * 8 * 3  # on each device in both
    before, after = (found["argument_bytes"] - batch for found in (copied, spread))
    assert before / after == pytest.approx(8, rel=0.01)
    assert not any(c["kind"] == "all-gather" for c in copied["collectives"])


def test_planned_memory_equals_that_of_the_training_step(experiment):
    """Real arrays on simulated devices: what lies there, and what the compiler says of the step."""
    mesh = MeshConfig(data=2, fsdp=4)
    found = plans(experiment, **dataclasses.asdict(mesh))
    stage, mesh = layers_stage(experiment), make_mesh(mesh)
    shapes = training.abstract_arguments(stage, mesh, experiment.data.largest)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (shapes[0].params, *shapes[1:]))
    params, frozen, batch = zeros
    state = init_state(experiment.optim, params, jax.random.key(0))
    arguments = jax.device_put((state, frozen, batch), jax.tree.map(lambda x: x.sharding, shapes))
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arguments))
    assert found["argument_bytes"] == here
    with jax.set_mesh(mesh):
        step = jit_step(stage, mesh, *arguments[:2])
        stats = step.lower(*arguments).compile().memory_analysis()
    assert found["temp_bytes"] == stats.temp_size_in_bytes > 128 * WIDTH * 4  # one activation
    assert found["peak_bytes"] >= here + stats.temp_size_in_bytes


def test_plan_of_decoding(tiny_codec, tiny_model):
    """On four devices that share each frame: parameters whole on each, the rest in columns."""
    model = tiny_model(refiner=True)
    experiment = Experiment(
        "latent",
        vae=model.vae_config,
        codec=tiny_codec,
        refiner=model.refiner_config,
        train=("refiner/",),
        init=InitConfig(run="a codec"),
        loss=LatentLoss(),
        data=DataConfig(frames=9, size=(64, 128)),
    )
    devices, chip = jax.devices()[:4], chips.CHIPS["v5p"]
    found = coding.coding_for(experiment, devices, chip, "decode", steps=3)
    parts = found["programs"]
    # Three latents, refined in two windows of two.
    assert {name: one["times"] for name, one in parts.items()} == {
        "reconstruct": 3,
        "decode_latents": 3,
        "velocity": 3 * 2,
    }
    functions = CodecFunctions(model)
    loaded = functions.vae_params, functions.codec_params, functions.refiner_params
    loaded = sum(x.nbytes for x in jax.tree.leaves(loaded))
    for one in parts.values():
        assert one["peak_bytes"] >= loaded + one["temp_bytes"]
    assert any(c["kind"] == "collective-permute" for c in parts["decode_latents"]["collectives"])
    assert parts["velocity"]["flops"] == model.refiner_config.dit.flops(2, 8, 16)
    low, high = found["frames_per_s"]
    assert (
        0
        < low
        < high
        == 9 / sum(x["times"] * max(x["roofline_s"].values()) for x in parts.values())
    )
    assert found["fits"] and "velocity" in coding.coding_report(found | {"topology": ""})
    with pytest.raises(ValueError, match="`vae` has no codec"):
        vae = dataclasses.replace(experiment, stage="vae", codec=None, loss=VAELoss())
        coding.coding_for(vae, devices, chip, "decode")
    with pytest.raises(ValueError, match="over 3 devices"):
        coding.coding_for(experiment, jax.devices()[:3], chip, "encode")


@pytest.fixture
def with_motion(tiny_model):
    """An experiment of the stage `transform` with a tiny model."""
    model = tiny_model(motion=True)
    return Experiment(
        "transform",
        vae=model.vae_config,
        codec=model.codec_config,
        loss=TransformLoss(),
        data=DataConfig(frames=5, size=(64, 64), batch=2),
    )


@pytest.mark.slow
def test_plan_of_coding_with_motion(with_motion, tiny_model):
    """Encoder and decoder predict from the frame before; only the encoder analyses."""
    refiner = tiny_model(refiner=True).refiner_config
    experiment = dataclasses.replace(with_motion, refiner=refiner)
    devices, chip = jax.devices()[:2], chips.CHIPS["v5p"]
    shared = {"predict", "reconstruct", "compensate"}
    found = coding.coding_for(experiment, devices, chip, "encode")
    assert set(found["programs"]) == shared | {"encode_video", "analyse"} and found["fits"]
    found = coding.coding_for(experiment, devices, chip, "decode", steps=2)["programs"]
    assert set(found) == shared | {"velocity", "add_latent"}
    assert found["add_latent"]["times"] == found["predict"]["times"] == 2
    # The latent of the predicted frames is one product of their blocks with the basis; so is the
    # inverse, which compensation takes of the latent and of the prediction, beside the head.
    product = 2 * 8 * 8 * (4 * 8 * 8 * 3) * 4
    assert found["predict"]["flops"] == product
    assert found["compensate"]["flops"] > 2 * product
    assert any(c["kind"] == "all-gather" for c in found["predict"]["collectives"])


@pytest.mark.slow
def test_plan_of_training_with_motion(with_motion, monkeypatch):
    """Clips come with their motion, and all of it is divided among devices.

    The step is traced and lowered; the compiler, which takes a minute for it, gives up.
    """

    def give_up(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no time")

    monkeypatch.setattr(jax.stages.Lowered, "compile", give_up)
    spread = dataclasses.replace(with_motion, mesh=MeshConfig(data=2))
    found = training.plan_for(spread, jax.devices()[:2], chips.CHIPS["v5p"])
    arguments = training.abstract_arguments(
        make_stage(spread), make_mesh(spread.mesh), spread.data.largest
    )
    clip = 5 * 64 * 64 * 3 + 4 * 4 * 4 * 2 * 2 + 4 + 4  # frames, vectors, bits, quality level
    assert program.bytes_per_device(arguments[2]) == clip
    assert found["argument_bytes"] == sum(map(program.bytes_per_device, arguments))
    assert found["parameters"]["frozen"] == 2 * 4  # the statistics of the latents
    # Forward and backward, the basis of the VAE alone on source, prediction and decoded frames.
    product = 2 * 8 * 8 * (4 * 8 * 8 * 3) * 4
    assert found["flops"]["model"] > 2 * 3 * product
    assert any("per device: 2/video" in line for line in found["largest"])


def test_what_is_planned_of_refining_frames(with_motion, tiny_model):
    """Only the refiner trains; codec, VAE and the networks of the loss are there besides."""
    refiner = dataclasses.replace(tiny_model(refiner=True).refiner_config, window=3)
    experiment = dataclasses.replace(
        with_motion,
        stage="refine",
        refiner=refiner,
        loss=RefineLoss(),
        init=InitConfig(run="a codec"),
        data=DataConfig(frames=13, size=(64, 64), batch=1),
    )
    mesh = make_mesh(MeshConfig(data=1))
    state, frozen, batch = training.abstract_arguments(
        make_stage(experiment), mesh, experiment.data.largest
    )
    assert set(state.params) == {"refiner"}
    assert set(frozen["fixed"]) == {"vae", "codec"}
    assert {"alex", "dists", "white"} <= set(frozen["constants"])
    assert batch["vectors"].shape == (1, 3, 4, 4, 4, 2)


def test_a_batch_that_does_not_divide_is_refused(experiment):
    with pytest.raises(ValueError, match=r"data\.batch must be a multiple of 5, got 1024"):
        training.plan_for(
            dataclasses.replace(experiment, mesh=MeshConfig(5)),
            jax.devices()[:5],
            chips.CHIPS["v4"],
        )


def test_operations_of_the_dit():
    """The formula of the refiner, whose totals are the published ones."""
    cfg = DiTConfig(96, 256, 2, 3, 8, 4, text_width=12, text_length=8, context_channels=6)
    cfg = dataclasses.replace(cfg, context_every=3)
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2, 8, 8, 4), (1,), (1, 8, 12))]
    inputs.append(jax.ShapeDtypeStruct((1, 2, 8, 8, 6), jnp.float32))
    model = DiT(cfg, attention="xla")
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    found = flops.count(model.apply, params, *inputs)
    time = 2 * (8 * 96 + 96 * 96 + 6 * 96 * 96)  # left out in the formula
    assert found == cfg.flops(2, 8, 8) + time
    assert VACE_1_3B.flops(21, 60, 104) == pytest.approx(427e12, rel=0.003)


def test_operations_of_heads_of_zeros():
    """Eight devices have 12 heads filled up to 16; scores and their products grow by a third."""
    assert [exchanged_heads(12, n) for n in (1, 4, 8, 24)] == [12, 12, 16, None]
    attention = 4 * (2 * 4 * 4) ** 2 * 1536 * (30 + 15)  # of 32 tokens in all blocks
    grown = VACE_1_3B.flops(2, 8, 8, 16) - VACE_1_3B.flops(2, 8, 8)
    assert grown == attention // 3


def test_operations_on_heads_of_zeros_in_training(tiny_codec, tiny_model):
    """Four devices of context fill three heads up to four, so attention grows by a third."""
    model = tiny_model(refiner=True)
    dit = dataclasses.replace(model.refiner_config.dit, width=48, heads=3)
    experiment = Experiment(
        "latent",
        vae=model.vae_config,
        codec=tiny_codec,
        refiner=dataclasses.replace(model.refiner_config, dit=dit),
        train=("refiner/",),
        init=InitConfig(run="a codec"),
        loss=LatentLoss(),
        data=DataConfig(frames=13, size=(64, 128), batch=2),
    )
    stage, devices = make_stage(experiment), jax.devices()[:4]

    def padding(stage, **mesh):
        mesh, shape = make_mesh(MeshConfig(**mesh), devices), stage.experiment.data.largest
        return training.operations_on_padding(stage, mesh, shape)

    assert padding(stage, data=4) == padding(stage, data=1, fsdp=4) == 0
    # A window of two latents of 8x16, so 2 * 4 * 8 tokens; forward once, backward twice.
    tokens, blocks = 64, dit.layers + dit.groups * bool(dit.context_every)
    attention = 4 * tokens**2 * dit.width * blocks
    expected = experiment.data.batch * 3 * attention // 3
    assert padding(stage, data=1, context=4) == expected
    compute = dataclasses.replace(experiment.compute, remat="full")
    again = make_stage(dataclasses.replace(experiment, compute=compute))
    assert padding(again, data=1, context=4) == expected * 4 // 3


def test_a_mesh_is_refused_when_planning_to_code(capsys):
    args = ["plan", "--config", "configs/wan_1_3b/latent.py", "--topology", "v5e:2x4"]
    assert cli.main([*args, "--coding", "decode", "--mesh", "fsdp=8"]) == 2
    assert "each frame is sharded over all devices" in capsys.readouterr().err


def test_operations_of_convolutions():
    def conv(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dims)

    x, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    forward = 2 * 4 * 4 * 5 * 27
    assert flops.count(conv, x, kernel) == forward
    back = flops.count(jax.grad(lambda x: conv(x, kernel).sum()), x)
    assert back - forward == pytest.approx(forward, rel=0.3)  # it counts outputs, cut at the edge


def test_communication_in_a_loop():
    mesh = make_mesh(MeshConfig(data=2, context=4))

    def turn(x, _):
        x = lax.ppermute(x, "context", [(i, (i + 1) % 4) for i in range(4)])
        return lax.psum(x, "data") * 0.5, None

    def body(x):
        return lax.scan(turn, x, None, length=5)[0]

    spec = P(None, "context")
    f = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(f).lower(jnp.zeros((32, 64))).compile().as_text()
    found = {c.kind: c for c in hlo.collectives(text)}
    part = 32 * 16 * 4
    assert set(found) == {"all-reduce", "collective-permute"}
    assert found["collective-permute"].count == found["all-reduce"].count == 5
    assert found["collective-permute"].sent == found["all-reduce"].sent == 5 * part
    assert 5 * 4 * part <= hlo.traffic(text) <= 5 * 12 * part


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,16]<=[64]", 16),
        ("mesh['data'=4,'fsdp'=16,'context'=8] {'fsdp'}", 16),
        ("mesh['data'=4,'fsdp'=16,'context'=8] {'data','context':(1)2}", 8),
        ("mesh['data'=4,'fsdp'=16,'context'=8] {'context':(2)4}, channel_id=7", 4),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={1}", 4),
    ],
)
def test_group_size_of_a_collective(groups, devices):
    """The notations of XLA; `(1)2` is a part of an axis, 2 devices in steps of 1."""
    line = f"  %a = f32[8]{{0}} all-reduce(f32[8]{{0}} %b), replica_groups={groups}"
    assert hlo.Instruction(False, "a", "f32[8]{0}", "all-reduce", line).group == devices


def test_traffic_of_a_loop_over_slices():
    """A layer is read when its turn comes, not all layers each time."""
    layers, x = jnp.zeros((16, 256, 256)), jnp.zeros((4, 256))
    f = jax.jit(lambda layers, x: lax.scan(lambda x, w: (x @ w, None), x, layers)[0])
    read = hlo.traffic(f.lower(layers, x).compile().as_text())
    assert layers.nbytes <= read <= 3.5 * layers.nbytes


def test_communication_between_slices():
    """An all-reduce of 2x4 slices as libtpu compiles it: inside, between, and again inside."""
    text = """
ENTRY %main (p: f32[1024,1024]) -> f32[512,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %a = f32[1024,1024]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %n = token[] after-all()
  %s = (f32[128,1024]{1,0:T(8,128)}, u32[], token[]) send(%a, %n), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %t = (f32[64]{0}, u32[], token[]) send(%a, %n), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,3}x{0:3}",_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %g = f32[512,1024]{1,0} all-gather(%r), replica_groups={{0,2},{1,3}}, dimensions={0}
}
"""  # noqa: E501
    found = {(c.network, c.kind): c for c in hlo.collectives(text)}
    assert list(found) == [
        ("ici", "all-reduce"),
        ("dcn", "all-reduce"),
        ("dcn", "collective-permute"),
    ]
    # Twice three quarters of what four slices reduce, and the whole of what one sends to another.
    assert found["dcn", "all-reduce"].sent == 1.5 * 128 * 1024 * 4
    assert found["dcn", "collective-permute"].sent == 64 * 4
    cost = seconds_of(text)
    assert cost["dcn"] == pytest.approx((1.5 * 128 * 1024 * 4 + 64 * 4) / 6.25e9)
    assert cost["ici"] == pytest.approx(1024 * 1024 * 4 / 200e9)
    # What is small takes the time of its hops: twice half of a ring of 64.
    small = text.replace("1024,1024", "4,4").replace("{{0,1},{2,3}}", "[1,64]<=[64]")
    assert seconds_of(small)["ici"] == pytest.approx(64e-6)


def seconds_of(text):
    return program.roofline(text, 0.0, chips.CHIPS["v5p"])["roofline_s"]


def test_several_slices_are_planned(experiment):
    """Gradients alone travel between slices, each device's own part."""
    pytest.importorskip("libtpu")
    mesh = MeshConfig(data=2, fsdp=4)
    found = training.plan(dataclasses.replace(experiment, mesh=mesh), "2xv5e:2x2")
    assert found["chips"] == found["devices"] == 8
    between = [c for c in found["collectives"] if c["network"] == "dcn"]
    assert [c["kind"] for c in between] == ["all-reduce"]
    gradients = 4 * WIDTH**2 * 4 / 4
    # Rows of 64 take the 128 lanes of a register; a few numbers are sent beside.
    assert gradients <= between[0]["sent"] <= 3 * gradients
    assert found["roofline_s"]["dcn"] == pytest.approx(between[0]["sent"] / 3.125e9)
    assert "over DCN" in training.report(found)
    with pytest.raises(ValueError, match="must be a multiple of the 2 slices"):
        mesh = MeshConfig(data=1, fsdp=8)
        training.plan(dataclasses.replace(experiment, mesh=mesh), "2xv5e:2x2")


def test_topologies_are_parsed():
    assert chips.parse_topology("v5p:4x4x8") == (chips.CHIPS["v5p"], (4, 4, 8), 1)
    assert chips.parse_topology("4xv5e:16x16") == (chips.CHIPS["v5e"], (16, 16), 4)
    assert chips.device_count("4xv5e:16x16") == 1024
    for wrong in ("v9:2x2", "v5p", "v5e:2y2", "v5p:2x2", "0xv5e:2x2", "2xv4:2x2x2", "2v5e:2x2"):
        with pytest.raises(ValueError, match="topology"):
            chips.parse_topology(wrong)


def test_missing_libtpu_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    args = ["plan", "--config", "configs/wan_1_3b/codec.py", "--topology", "v5p:2x2x1"]
    assert cli.main(args) == 2
    assert "needs libtpu: pip install 'gnvc-jax[tpu]'" in capsys.readouterr().err


def test_a_program_that_does_not_fit_is_explained(experiment, monkeypatch):
    """The figure and the largest tensors, from the compiler's own words."""
    words = "the total memory required for HLO temporaries (82.68G) exceeds available HBM (15.75G)."

    def give_up(*_, **__):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: E1000: {words}\nSee a page.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", give_up)
    found = plans(experiment, data=1, fsdp=8) | {"topology": "v5p:2x2x2"}
    assert found["fits"] is False and words in found["reason"]
    assert any(f"x 1024 x {WIDTH} f32" in line for line in found["largest"])
    assert any("per device: 0/params/layers" in line for line in found["largest"])
    assert words in training.report(found)
    assert "does not fit" in training.table([found])
    with pytest.raises(RuntimeError, match="something else"):
        program.too_large("something else\n", "", ())
