"""Public Wan2.1 weights in, diffusers folders out."""
