"""Quality metrics, one module each: psnr, ms_ssim, lpips, dists, temporal.

Functions are imported from their modules (`from gnvc_jax.metrics.lpips import lpips`),
since most modules carry the name of the function they define.
"""
