"""Sizes of the larger small model: twice the width of the codec, ten times the refiner."""

import dataclasses

from configs.small import models as small

VAE = small.VAE
CODEC = dataclasses.replace(small.CODEC, intra_width=192, width=192)
REFINER = dataclasses.replace(
    small.REFINER,
    dit=dataclasses.replace(
        small.REFINER.dit,
        width=512,
        ffn_width=2048,
        heads=8,
        layers=16,
        context_every=8,
        window=16,  # tokens: the 256x256 pixels of a training crop
    ),
    features=CODEC.width,
)
