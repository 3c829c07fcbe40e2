"""Block motion between the last decoded frame and the frames of the next latent.

One latent stands for four frames, and so does one motion field: `search` finds it (in the encoder
only, integers from uint8 frames), `field` defines it and expands it to one vector per 16x16 block
and frame, `coding` turns it into symbols of a stream, and `warp` turns those vectors and the last
decoded frame into a prediction in JAX. Only the integers of `MotionField` travel in a stream;
everything else follows from them.
"""

# Nothing here imports JAX: processes that prepare training data stay light.
from gnvc_jax.motion.field import MotionField, expand, no_motion

__all__ = ["MotionField", "expand", "no_motion"]
