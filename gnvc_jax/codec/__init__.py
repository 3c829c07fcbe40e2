"""The latent codec: normalised latents of a VAE <-> integer symbols.

Read the modules in this order:

- `config`: the sizes of the networks, and the constants that the bitstream shares.
- `model`: the whole codec, `LatentCodec`. It transforms the residual of each latent to y, calls the
  entropy model, and transforms back.
- `entropy`: the entropy model, which turns y into symbols and back, and gives their rates.
- `scales`: the integer network inside it, which chooses the probability table of each symbol and
  so decides how a stream is parsed.
- `density`: the probabilities themselves, as differentiable rates and as tables.
- `layers`, `quality`, `quantise`: building blocks, parameters per quality level, rounding with
  gradients.
- `fit`: parameters from statistics of latents, with which training starts.

`gnvc_jax.model` stores a codec in a model file, `gnvc_jax.bitstream` writes its symbols to streams.
"""
