"""A patch discriminator: a small network that judges whether frames are decoded or real.

It is a part of the parameters that train, "discriminator", beside those of the model, so that it is
sharded, averaged, saved and resumed as they are; its moments are its own, and its gradient is
clipped apart from theirs. `adversarial_loss` gives both sides of the game in one step: the
generator sees a fixed discriminator, and the discriminator fixed frames.

Sources: Isola et al. (arXiv 1611.07004) for judging patches, Lim and Ye (arXiv 1705.02894) for the
hinge loss.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import reduce
from flax import linen as nn
from jaxtyping import Array, Float

from gnvc_jax.arrays import Tree
from gnvc_jax.training import losses
from gnvc_jax.training.settings import check_range

NAME = "discriminator"  # of the part
SLOPE = 0.2  # of leaky ReLUs
GROUP = 16  # channels that are normalised together


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """Settings of the adversarial loss.

    Attributes:
        weight: Weight of the loss; 0 for none, and then there is no discriminator.
        start: Step from which the discriminator trains; before, it costs nothing.
        warmup: Steps after `start` in which the discriminator trains alone.
        width: Channels of the first convolution; the next two have twice and four times as many.
        downscale: Factor by which frames are reduced before they are judged.
    """

    weight: float = 0.0
    start: int = 0
    warmup: int = 1000
    width: int = 64
    downscale: int = 1

    def __post_init__(self) -> None:
        steps = dict.fromkeys(("weight", "start", "warmup"), (0, math.inf))
        sizes = {"width": (1, math.inf), "downscale": (1, 8)}
        check_range("loss.adversarial", self, **steps, **sizes)


class Discriminator(nn.Module):
    """Judges patches of images by convolutions, four of stride 2 and 4x4 pixels among them.

    Attributes:
        config: Sizes.
    """

    config: AdversarialConfig

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n h2 w2"]:
        """Gives each patch of images in [-1, 1] a number, larger for real ones."""
        scale, width = self.config.downscale, self.config.width
        x = reduce(images, "n (h a) (w b) c -> n h w c", "mean", a=scale, b=scale)
        for i, channels in enumerate((width, 2 * width, 4 * width, 4 * width)):
            x = nn.Conv(channels, (4, 4), strides=2, padding=1)(x)
            # Not after the first one, which would hide how bright and colourful patches are.
            if i:
                x = nn.GroupNorm(num_groups=None, group_size=math.gcd(GROUP, channels))(x)
            x = nn.leaky_relu(x, SLOPE)
        return nn.Conv(1, (3, 3))(x)[..., 0]


class AdversarialLoss(NamedTuple):
    """Both sides of the game.

    Attributes:
        generator: Loss of the generator, (b,), without its weight. Its gradient does not reach the
            discriminator.
        discriminator: Loss of the discriminator, a scalar. Its gradient reaches nothing else.
    """

    generator: Array
    discriminator: Array

    @property
    def training(self) -> Array:
        """The discriminator's loss with value 0, to add to the loss of a stage.

        It has its gradient, and leaves the value that is logged as the loss of the model.
        """
        return self.discriminator - jax.lax.stop_gradient(self.discriminator)

    @property
    def metrics(self) -> dict[str, Array]:
        """Metrics for the log."""
        return {"generator": self.generator.mean(), NAME: self.discriminator}


def init_discriminator(config: AdversarialConfig, key: Array) -> Tree:
    """Draws random parameters, as the part of a model; no part if the loss has no weight.

    Args:
        config: Settings.
        key: Key of the model that the part belongs to.
    """
    if not config.weight:
        return {}
    # Convolutions have parameters of the same shapes for images of any size.
    side = 32 * config.downscale
    images = jnp.zeros((1, side, side, 3))
    # A key of its own: the networks of the model are the same with and without a discriminator.
    return {NAME: Discriminator(config).init(jax.random.fold_in(key, 1), images)["params"]}


def trainable(config: AdversarialConfig) -> tuple[str, ...]:
    """Patterns of the parameters that train because of this loss."""
    return (f"{NAME}/",) if config.weight else ()


def adversarial_loss(
    config: AdversarialConfig,
    params: Tree,
    output: Float[Array, "b t h w 3"],
    video: Float[Array, "b t h w 3"],
    step: Array,
) -> AdversarialLoss:
    """Computes the hinge loss of a batch of frames; zeros before it starts.

    Args:
        config: Settings.
        params: Parameters of the discriminator.
        output: Decoded frames in [-1, 1].
        video: Frames of the source, same shape.
        step: Number of steps done.
    """
    network = Discriminator(config)

    def judge(params: Tree, frames: Array) -> Array:
        b, t = frames.shape[:2]
        patches = network.apply({"params": params}, frames.reshape(b * t, *frames.shape[2:]))
        return jnp.asarray(patches).reshape(b, -1)

    def play(args: tuple[Tree, Array, Array]) -> AdversarialLoss:
        params, output, video = args
        fixed = jax.lax.stop_gradient
        on = step >= config.start + config.warmup
        generator = losses.hinge_generator(judge(fixed(params), output)) * on
        decoded, real = judge(params, fixed(output)), judge(params, video)
        return AdversarialLoss(generator, losses.hinge_discriminator(real, decoded).mean())

    def wait(args: tuple[Tree, Array, Array]) -> AdversarialLoss:
        return AdversarialLoss(jnp.zeros(len(args[1])), jnp.zeros(()))

    # A condition runs one branch only, forward and backward.
    args = params, output, video
    return jax.lax.cond(step >= config.start, play, wait, args) if config.start else play(args)
