"""VAE and refiner of a model as objects, for notebooks and for code of your own.

    vae = gnvc_jax.load_vae("small")            # or a model file, a run, a folder of `gnvc port`
    latents = vae.encode(video)                 # normalised, (b, n, h / 8, w / 8, c)
    frames = vae.decode(latents)

    refiner = gnvc_jax.load_refiner("weights")  # a folder of `gnvc port`, a model file or a run
    refined = refiner.refine(decoded, features, q_index=32, steps=5)

    codec = Codec(with_refiner(model, "weights"))       # a model with another refiner
    codec = Codec(with_light_decoder(model, "weights")) # a model with a light decoder

Each object holds a configuration and a tree of parameters, and calls pure functions with them:
`gnvc_jax.vae.encode_clip` and `decode_clip`, the Flax module `gnvc_jax.refiner.Refiner` and
`gnvc_jax.refiner.refine`. To differentiate, shard or train, use these with `params`. The whole
codec, from video to bytes and back, is `gnvc_jax.load_pretrained`.
"""

from gnvc_jax.api.parts import with_light_decoder, with_refiner
from gnvc_jax.api.refiner import PretrainedRefiner, load_refiner
from gnvc_jax.api.vae import PretrainedVAE, load_vae

__all__ = [
    "PretrainedRefiner",
    "PretrainedVAE",
    "load_refiner",
    "load_vae",
    "with_light_decoder",
    "with_refiner",
]
