"""Speed of the light decoder beside that of Wan2.1's VAE, latent by latent as in `gnvc decode`.

    python benchmarks/light_decoder.py [--size 128x128] [--repeats 3]

Random weights of full size, float32, random latents; --size is rows x columns in pixels. Both are
compiled first and run in turns: a later latent, which gives four frames, with the cache of the one
before. Medians are given, of the time that passed and of the time of the processor, which other
programs disturb less; and the multiplications and additions of each program in its direct form.
"""

import functools
import json
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from helpers import options

from gnvc_jax import convolution
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.planner import flops
from gnvc_jax.vae import VAE, LightDecoder, LightDecoderConfig, VAEConfig, decode_chunk


def make(network, latents):
    """Parameters, the jitted step, and the cache after a first latent."""
    shapes = jax.eval_shape(functools.partial(network.init, method="decode"), jax.random.key(0),
                            latents)["params"]  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), shapes)
    step = functools.partial(decode_chunk, network)
    _, cache = jax.eval_shape(step, params, None, latents)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    with mock.patch.object(convolution, "strategy", lambda: convolution.DIRECT):
        operations = flops.count(step, params, cache, latents)
    return params, jax.jit(step), cache, operations


def main() -> None:
    args = options.parse(__doc__, "light_decoder", size="128x128", repeats=3)
    h, w = (int(side) // 8 for side in args.size.split("x"))
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, h, w, 16)), jnp.float32)
    networks = {"Wan2.1": VAE(VAEConfig()), "light": LightDecoder(LightDecoderConfig())}
    made = {name: make(network, latents) for name, network in networks.items()}
    seconds = {name: [] for name in made}
    for repeat in range(args.repeats + 1):
        for name, (params, step, cache, _) in made.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(params, cache, latents))
            end = time.perf_counter(), time.process_time()
            if repeat:  # the first one compiles
                seconds[name].append([b - a for a, b in zip(start, end)])
    rows, pixels = {}, 4 * 64 * h * w
    for name, (params, _, _, operations) in made.items():
        rows[name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "kilo_operations_per_pixel": operations / pixels / 1000,
            "seconds_per_frame": np.median(seconds[name], axis=0)[0] / 4,
            "cpu_seconds_per_frame": np.median(seconds[name], axis=0)[1] / 4,
        }
        print(name, *(f"{key} {value:.4g}" for key, value in rows[name].items()))
    args.out.write_text(json.dumps({"size": args.size, **rows, **environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
