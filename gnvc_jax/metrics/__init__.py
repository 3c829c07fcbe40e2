"""Quality metrics, one module each: psnr, ms_ssim, lpips, temporal.

Functions are imported from their modules (`from gnvc_jax.metrics.lpips import load_lpips, lpips`),
since most modules carry the name of the function they define.
"""
