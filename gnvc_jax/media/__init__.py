"""Video in and out: files, raw frames and pipes to RGB frames, and back."""
