"""The latent codec: normalised latents of a VAE <-> integer symbols.

`model` is the codec as a whole, `entropy` the part that predicts probabilities, `scales` the
integer network inside it that decides how a stream is parsed. `layers`, `quality` and `quantise`
are the building blocks, `density` the rates, `config` the sizes, and `fit` the start of training
from statistics. `gnvc_jax.model` puts the codec into a model file, `gnvc_jax.bitstream` its symbols
into a stream.
"""
