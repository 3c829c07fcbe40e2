"""Eight simulated devices for every test, and compiled programs kept between runs."""

import dataclasses
import gc
import os
from pathlib import Path

import numpy as np
import pytest

# Before JAX initialises; processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = {"--xla_force_host_platform_device_count": "8"}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the time of the suite is compilation of programs that run once, on tiny arrays. With
    # little optimisation and the simpler code generator that takes a quarter of the time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags["--xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
added = [f"{flag}={value}" for flag, value in flags.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
cache = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tracing makes very many small objects, few of them in cycles: collecting garbage as often as
# Python does by default takes a fifth of the time of tracing.
gc.set_threshold(50_000, 50, 100)


@pytest.fixture(scope="session")
def tiny_codec():
    """The smallest sensible latent codec."""
    from gnvc_jax.codec.config import CodecConfig

    return CodecConfig(
        latent_channels=4,
        intra_width=8,
        width=8,
        intra_analysis=1,
        intra_synthesis=1,
        y_channels=8,
        z_channels=4,
        scale_width=8,
        entropy_width=16,
    )


@pytest.fixture(scope="session")
def start():
    """Draws parameters of which some are as at the start of training.

    start(init, *kept) has what init(key) draws wherever a name in the path is among `kept`, and
    random values elsewhere: compiling the draws of a whole codec takes most of a minute.
    """
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    def draw(init, *kept: str, seed: int = 0):
        rng, key = np.random.default_rng(seed), jax.random.key(seed)

        @jax.jit  # the compiler leaves out what is not returned
        def real(key):
            return {path: x for path, x in flatten_dict(init(key)).items() if {*path} & {*kept}}

        def fill(x):
            scale = 0.7 * np.prod(x.shape[:-1]) ** -0.5 if len(x.shape) > 1 else 0.1
            return rng.normal(0, scale, x.shape).astype(np.float32)

        shapes = flatten_dict(jax.eval_shape(init, key))
        params = {path: fill(x) for path, x in shapes.items()}
        return unflatten_dict(params | jax.device_get(real(key)))

    return draw


# Names in a codec's parameters: the linear transform, gains, tables, and layers that start at zero.
CODEC_START = (
    *("basis", "inverse", "whitening", "log_gain", "scales", "density"),
    *("merge", "out", "first_mean", "later_mean", "detail"),
)


@pytest.fixture(scope="session")
def start_codec(start):
    """start_codec(codec): parameters of an untrained codec, with hidden layers of any values."""
    from gnvc_jax.codec.model import init_codec

    return lambda codec, seed=0: start(lambda key: init_codec(codec, key), *CODEC_START, seed=seed)


@pytest.fixture(scope="session")
def tiny_model(tiny_codec):
    """Makes a `gnvc_jax.model.Model` from a seed: random weights that have something to code.

    make(seed, refiner=True) has a refiner with windows of two latents, too; motion=True: a linear
    VAE and block motion.
    """
    import jax

    from gnvc_jax import model as models
    from gnvc_jax.codec import scales
    from gnvc_jax.codec.model import LatentCodec, init_codec
    from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig, init_refiner
    from gnvc_jax.vae import VAE, VAEConfig, init_vae

    vae_config = VAEConfig(base=4, multipliers=(1, 1, 1, 1), blocks=1, latent_channels=4)
    codec_config = tiny_codec
    linear_config = VAEConfig(latent_channels=4, linear=True, head=4)
    motion_config = dataclasses.replace(codec_config, motion="blocks", k_skip=0)
    starts = {layer.name: layer.start for layer in scales.scale_layers(codec_config)}

    def init(k, vae, codec):
        return {"vae": init_vae(VAE(vae), k), "codec": init_codec(LatentCodec(codec), k)}

    dit = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)
    refiner_config = RefinerConfig(dit, codec_config.width, 2, 1, deviation=0.3)

    def shapes_of(*configs):
        return jax.eval_shape(lambda k: init(k, *configs), jax.random.key(0))

    shapes = {
        False: shapes_of(vae_config, codec_config),
        True: shapes_of(linear_config, motion_config),
    }
    refiner_shapes = jax.eval_shape(
        lambda k: init_refiner(Refiner(refiner_config), k), jax.random.key(0)
    )

    def make(seed: int = 0, refiner: bool = False, motion: bool = False) -> models.Model:
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            name, fan_in = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
            if any(p.key == "scales" for p in path):
                if name.endswith("bias"):
                    return np.full(leaf.shape, starts[name[:2]], np.float32)
                scale = 0.25 if name.endswith("kernel") else 0.01
            else:
                scales_of = {"kernel": 0.7 * fan_in**-0.5, "log_gain": 0.2, "gamma": 0.2}
                scales_of |= {"basis": 0.25, "inverse": 0.25}
                scale = scales_of.get(name, 0.1)
            return rng.normal(name in ("gamma", "whitening"), scale, leaf.shape).astype(np.float32)

        params = jax.tree_util.tree_map_with_path(draw, shapes[motion])
        configs = (linear_config, motion_config) if motion else (vae_config, codec_config)
        extra = {}
        if refiner:
            extra["refiner_config"] = refiner_config
            extra["refiner"] = jax.tree_util.tree_map_with_path(draw, refiner_shapes)
        mean, std = np.zeros(4), np.full(4, 0.3)
        return models.build("test", *configs, **params, mean=mean, std=std, **extra)

    return make


@pytest.fixture(scope="session")
def wan_tensor():
    """Random weights by public name and shape, the same on every machine and in every framework.

    Nothing is trivial: gains are about 1, and what training starts at zero is not.
    """
    import zlib

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            return np.float32(1 + 0.2 * noise)
        if name.endswith("weight"):
            return np.float32(noise * int(np.prod(shape[1:])) ** -0.5)
        return np.float32(0.2 * noise)

    return make


@pytest.fixture(scope="session")
def to_original():
    """Renames tensors from the scheme of diffusers to that of Wan-AI, by the tables in `names/`.

    A VAE of Wan2.2 is told by the modules that sample down.
    """
    import csv
    import re

    patterns = {}
    for table in ("vae", "vae-2.2", "vace-1.3b"):
        patterns[table] = []
        with open(Path(__file__).parent / "porting" / "names" / f"{table}.csv") as file:
            for row in csv.DictReader(file):
                pattern = re.escape(row["diffusers"]).replace(r"\{i\}", r"(\d+)")
                patterns[table].append((re.compile(pattern), row["original"].replace("{i}", r"\1")))

    def rename(tensors: dict) -> dict:
        vae = "vae-2.2" if any(".downsampler." in name for name in tensors) else "vae"
        known = patterns[vae] + patterns["vace-1.3b"]
        renamed = {}
        for name, value in tensors.items():
            (new,) = {m.expand(o) for p, o in known if (m := p.fullmatch(name))}
            renamed[new] = value
        return renamed

    return rename
