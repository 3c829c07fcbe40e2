"""Quality metrics as pure functions of two videos, one module each.

- `psnr`, `ms_ssim`: pixels, on uint8 frames or values up to 255.
- `lpips`, `dists`: features of an image network, with weights from `backbones`.
- `temporal`, `warping`: change from frame to frame, flicker, seams between groups.
- `clip`: CLIP-F and CMMD, on embeddings of CLIP's image encoder.

Each takes the source first and the output second. Functions are imported from their modules
(`from gnvc_jax.metrics.lpips import lpips`), since most modules carry the name of the function they
define. `gnvc_jax.evaluation.quality` runs all of them on a clip.
"""
