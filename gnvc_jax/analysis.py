"""What passes of the encoder over the same video share.

    analysis = Analysis()
    for qp in (20, 28, 24):
        coder.encode_frames(frames, out, header, qp, analysis=analysis)

The first pass fills it, the later ones are faster by what it holds.
"""

import dataclasses

import numpy as np

from gnvc_jax.motion import MotionField

NEAR = 2  # levels; the price of a bit of motion differs by 11 %


@dataclasses.dataclass
class Analysis:
    """What passes over the same video at several levels have in common.

    Latents of the VAE are kept for whole groups, as long as they fit. Motion depends on the level
    through the price of its bits; a field serves for levels so close that the price hardly differs.

    Attributes:
        limit: Bytes of latents to keep; with 0, nothing is kept.
        latents: Latents of each group by the number of its first frame.
        fields: Motion of each latent by the number of its first frame, with the level that it was
            searched for.
    """

    limit: int = 1 << 30
    latents: dict[int, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    fields: dict[int, tuple[int, MotionField]] = dataclasses.field(default_factory=dict)
    _size: int = 0

    def new_group(self) -> list[np.ndarray] | None:
        """A list for the latents of a group, None if there is no more room for them."""
        return [] if self._size < self.limit else None

    def keep(self, first: int, latents: list[np.ndarray]) -> None:
        """Keeps the latents of the group that begins with frame `first`."""
        if first not in self.latents:
            self.latents[first] = latents
            self._size += sum(x.nbytes for x in latents)

    def field(self, first: int, q_index: int) -> MotionField | None:
        """Motion of the latent that begins with frame `first`, None if it must be searched."""
        known, field = self.fields.get(first, (None, None))
        return field if known is not None and abs(known - q_index) <= NEAR else None

    def keep_field(self, first: int, q_index: int, field: MotionField) -> None:
        """Keeps the motion of a latent; that of another level is replaced."""
        if self.limit:
            self.fields[first] = q_index, field
