"""Rate-distortion evaluation: real files, decoded by new processes, beside standard codecs."""
