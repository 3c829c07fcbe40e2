"""Plans for GPUs: how communication divides over NVLink and InfiniBand, and the compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from gnvc_jax import cli
from gnvc_jax.parallel import MeshConfig, rules
from gnvc_jax.planner import chips, hlo, program, training
from gnvc_jax.training import inputs
from gnvc_jax.training.config import DataConfig, Experiment
from gnvc_jax.training.stages import Stage

H100 = chips.CHIPS["h100"]
MIB = 1 << 20
PLUGIN = any(
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.xla_cuda{n}")
    for n in (12, 13)
)


def roofline(line):
    """Communication of a program of one collective, on machines of eight GPUs."""
    text = f"""
ENTRY %main (p: f32[512,512]) -> f32[512,512] {{
  %p = f32[512,512]{{1,0}} parameter(0)
  ROOT %a = f32[512,512]{{1,0}} {line}
}}
"""
    found = program.roofline(text, 0.0, H100, per_node=8)
    return {one["network"]: one["sent"] for one in found["collectives"]}, found["roofline_s"]


def test_a_ring_over_two_machines_leaves_each_at_every_gpu():
    """1 MiB on 16 GPUs: each sends 15/8 MiB, an eighth of it over InfiniBand."""
    sent, seconds = roofline("all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add")
    assert sent == {"ici": 15 / 8 * MIB * 7 / 8, "dcn": 15 / 8 * MIB / 8}
    assert seconds["dcn"] == pytest.approx(15 / 64 * MIB / 50e9)
    assert seconds["ici"] == pytest.approx(max(105 / 64 * MIB / 450e9, 16e-6))  # 16 hops


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}",
        "[8,2]<=[2,8]T(1,0)",
        "mesh['data'=2,'fsdp'=8] {'data'}",
        "mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}",
        "mesh['b'=2,'a'=2,'c'=4], device_ids=(0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15) {'b'}",
    ],
)
def test_gradients_along_data_travel_between_machines_alone(groups):
    sent, seconds = roofline(f"all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert sent == {"dcn": MIB}
    assert seconds["ici"] == 0 and seconds["dcn"] == pytest.approx(MIB / 50e9)


@pytest.mark.parametrize(
    "groups",
    [
        "[2,8]<=[16]",
        "mesh['data'=2,'fsdp'=8] {'fsdp'}",
        "mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}",
    ],
)
def test_parameters_along_fsdp_travel_inside_of_a_machine(groups):
    sent, _ = roofline(f"all-gather(%p), replica_groups={groups}, dimensions={{0}}")
    assert sent == {"ici": 7 * MIB}


def test_an_all_to_all_and_a_permutation_over_machines():
    sent, _ = roofline("all-to-all(%p), replica_groups=[1,16]<=[16]")
    assert sent == {"ici": pytest.approx(7 / 16 * MIB), "dcn": pytest.approx(8 / 16 * MIB)}
    inside = ",".join(f"{{{i},{i + 1}}}" for i in range(7))
    assert roofline(f"collective-permute(%p), source_target_pairs={{{inside}}}")[0] == {"ici": MIB}
    across = inside + ",{7,8}"
    assert roofline(f"collective-permute(%p), source_target_pairs={{{across}}}")[0] == {"dcn": MIB}


def test_groups_along_a_part_of_an_axis():
    """An axis of 8 as 2 x 4: the part of size 2, and the one of size 4 that follows it."""
    assert hlo.mesh_groups("'a'=2,'b'=8", None, "'b':(1)2")[0] == [0, 4]
    assert hlo.mesh_groups("'a'=2,'b'=8", None, "'b':(2)4")[0] == [0, 1, 2, 3]
    assert hlo.mesh_groups("'a'=2,'b'=8", None, "'a','b':(1)2")[0] == [0, 4, 8, 12]


def test_topologies_of_gpus():
    assert chips.parse_topology("4xh100:8") == (H100, (8,), 4)
    assert chips.device_count("4xh100:8") == 32
    assert [chips.compact_topology("b200", n) for n in (2, 8, 32)] == [
        *("b200:2", "b200:8"),
        "4xb200:8",
    ]
    with pytest.raises(ValueError, match="write MACHINESxh200:8"):
        chips.parse_topology("h200:16")
    with pytest.raises(ValueError, match="12 h100: must be a multiple of 8"):
        chips.compact_topology("h100", 12)


@pytest.mark.skipif(PLUGIN, reason="JAX's CUDA plugin is installed")
def test_missing_plugin_is_a_usage_error(capsys):
    args = ["plan", "--config", "configs/wan_1_3b/codec.py", "--topology", "h100:8"]
    assert cli.main(args) == 2
    assert "needs JAX's CUDA plugin: pip install 'gnvc-jax[gpu]'" in capsys.readouterr().err


def matrix_stage(experiment):
    """One square matrix on frames of eight pixels by eight."""

    def loss(params, constants, batch, key, step):
        x = batch.reshape(batch.shape[0], -1)[:, :64].astype(jnp.float32)
        return jnp.mean((x @ params["matrix"]) ** 2), {}

    def init(key):
        return {"matrix": jax.random.normal(key, (64, 64))}

    return Stage(experiment, init, loss, inputs.clips(experiment), trainable=("matrix",))


@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("name", ["h100", "b200"])
def test_a_step_is_compiled_for_gpus_of_two_machines(monkeypatch, name):
    monkeypatch.setattr(rules, "SMALL", 0)
    data = DataConfig(frames=1, size=(8, 8), batch=64)
    experiment = Experiment(f"{__name__}:matrix_stage", data=data, mesh=MeshConfig(2, 4))
    found = training.plan(experiment, f"2x{name}:4")
    assert found["chips"] == found["devices"] == 8 and found["machines"] == 2
    # Weights, average and two moments, 8 clips; two counters and a key.
    assert 0 <= found["argument_bytes"] - (4 * 64**2 * 4 / 4 + 8 * 8 * 8 * 3) <= 16
    assert found["fits"] and found["flops"]["model"] == 2 * 2 * 64 * 64**2
    # Gradients of a quarter of the matrix, summed over two machines, and the loss.
    between = sum(one["sent"] for one in found["collectives"] if one["network"] == "dcn")
    assert 64**2 <= between <= 64**2 + 64
    assert sum(one["sent"] for one in found["collectives"] if one["network"] == "ici") > 0
    text = training.report(found)
    assert "sent per device over InfiniBand" in text and "kernels are not tuned" in text
