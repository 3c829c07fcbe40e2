"""Sizes of the video DiT and of the refiner, and what a forward pass costs.

Both go into model files and checkpoint folders as JSON, so their field names are part of these
formats. The presets WAN_1_3B, WAN_14B, VACE_1_3B and VACE_14B are the public models' sizes.
"""

import dataclasses
import math

from gnvc_jax.errors import UsageError
from gnvc_jax.refiner.flow import START

PATCH = 2  # latents per token in each spatial direction; one latent frame in time
MASKS = 64  # mask channels of VACE: one per pixel of a latent


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Architecture of the DiT; the defaults are Wan2.1-T2V-1.3B's (1,418,996,800 parameters).

    Attributes:
        width: Width of the tokens.
        ffn_width: Width of the hidden layer of each feed-forward.
        heads: Number of attention heads.
        layers: Number of blocks.
        frequencies: Width of the sinusoidal embedding of time.
        channels: Channels of the latents.
        text_width, text_length: Width and number of the rows of the text condition; a length of 0
            leaves out cross-attention.
        context_every: 0 for a plain DiT, s for VACE's adapter with one context block per s blocks,
            the first before block 0.
        context_channels: Channels of the adapter's condition, on the grid of the latents.
        window: Tokens per side of the neighbourhood that self-attention sees in each latent, even;
            0 for all tokens. See `gnvc_jax.refiner.attention.windowed_attention`.

    Raises:
        UsageError: If a size is not a multiple of another that must divide it.
    """

    width: int = 1536
    ffn_width: int = 8960
    heads: int = 12
    layers: int = 30
    frequencies: int = 256
    channels: int = 16
    text_width: int = 4096
    text_length: int = 512
    context_every: int = 0
    context_channels: int = 96
    window: int = 0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise UsageError(
                f"width must be a multiple of 2 * heads, got {self.width} for {self.heads} heads"
            )
        if self.window % 2 or self.window < 0:
            raise UsageError(f"window must be an even number of tokens, got {self.window}")
        if self.frequencies % 2:
            raise UsageError(f"frequencies must be even, got {self.frequencies}")
        if self.layers % self.group_size:
            raise UsageError(
                f"layers must be a multiple of context_every ({self.context_every}), "
                f"got {self.layers}"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def group_size(self) -> int:
        """Blocks per context block; 1 without an adapter."""
        return max(1, self.context_every)

    @property
    def groups(self) -> int:
        """Number of groups of blocks, each with one context block if there is an adapter."""
        return self.layers // self.group_size

    def tokens(self, t: int, h: int, w: int) -> int:
        """Number of tokens that latents (t, h, w) become."""
        return t * (h // PATCH) * (w // PATCH)

    def flops(self, t: int, h: int, w: int, heads: int | None = None) -> int:
        """Operations (a multiply-add counts as two) of one forward pass on latents (t, h, w).

        Only matrix products count, for a batch of 1. The result agrees with the published counts of
        Wan2.1 to three digits.

        Args:
            t, h, w: Size of the latents.
            heads: Number of heads that self-attention works on, if its own are padded.
        """
        n, m, d = self.tokens(t, h, w), self.text_length, self.width
        attended = (heads or self.heads) * self.head_width
        # Keys that each token attends to: all, or those of a spatial window in every latent.
        seen = t * math.prod(min(side // PATCH, self.window or side) for side in (h, w))
        # A product of (n, a) by (a, b) costs 2 n a b operations.
        # Four projections, scores and weighted sum, two layers of the feed-forward.
        block = 8 * n * d**2 + 4 * n * seen * attended + 4 * n * d * self.ffn_width
        if m:  # cross-attention: q and o of the tokens, k and v of the text
            block += 4 * (n + m) * d**2 + 4 * n * m * d
        # Embedding and head, between the 4c numbers of a patch and the width.
        patches = 2 * n * d * PATCH**2 * 2 * self.channels
        # The text passes two layers: text_width -> d -> d.
        total = patches + 2 * m * d * (self.text_width + d) + self.layers * block
        if self.context_every:
            # The adapter: one projection into the context branch and one hint per context block.
            projections = 2 * n * d**2 * (self.groups + 1)
            embedding = 2 * n * d * PATCH**2 * self.context_channels
            total += self.groups * block + projections + embedding
        return total


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """A DiT with an adapter for decoded latents and features of the codec.

    Attributes:
        dit: Sizes of the DiT. Its context has VACE's 96 channels, or as many as latents have
            (decoded latents alone). Without context blocks it is a prior of videos, which sees
            the decoded latents only in the state that refinement begins with.
        features: Channels of the codec's features.
        window: Number of latents that are refined together.
        overlap: Number of latents that neighbouring windows share.
        start: Flow time at which refinement begins (t_N of GNVC-VD).
        noise: Standard deviation of the noise in the starting state: 1 for an ordinary flow, 0 for
            a deterministic refiner of one step.
        deviation: 0 where the DiT gives the velocity itself, as Wan's does. Otherwise the standard
            deviation of coding errors, for which the DiT corrects `flow.linear_velocity`; small
            models need this.
        steps: Number of steps that decoding takes, for which the refiner was trained.

    Raises:
        UsageError: If the DiT's adapter does not suit, or `steps` or `overlap` are out of range.
    """

    dit: DiTConfig = dataclasses.field(default_factory=lambda: DiTConfig(context_every=2))
    features: int = 256  # the codec's width
    window: int = 7  # 25 frames, if later latents stand for 4 frames each
    overlap: int = 2
    start: float = START
    noise: float = 1.0
    deviation: float = 0.0
    steps: int = 1

    def __post_init__(self) -> None:
        known = self.dit.channels, self.vace_channels
        if self.dit.context_every and self.dit.context_channels not in known:
            raise UsageError(
                f"the refiner needs context blocks with {known[0]} or {known[1]} channels, got "
                f"{self.dit.context_channels} channels every {self.dit.context_every} blocks"
            )
        if self.steps < 1:
            raise UsageError(f"steps must be positive, got {self.steps}")
        if not 0 <= self.overlap < self.window:
            raise UsageError(
                f"overlap must be in [0, window), got {self.overlap} for windows of {self.window}"
            )

    @property
    def vace_channels(self) -> int:
        """Channels of VACE's condition: two latents and a mask."""
        return 2 * self.dit.channels + MASKS

    @property
    def vace_layout(self) -> bool:
        """Whether the DiT's context is VACE's, rather than the decoded latents alone."""
        return self.dit.context_every > 0 and self.dit.context_channels == self.vace_channels


WAN_1_3B = DiTConfig()
WAN_14B = DiTConfig(width=5120, ffn_width=13824, heads=40, layers=40)
VACE_1_3B = dataclasses.replace(WAN_1_3B, context_every=2)  # 15 context blocks
VACE_14B = dataclasses.replace(WAN_14B, context_every=5)  # 8 context blocks
