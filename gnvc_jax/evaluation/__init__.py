"""Rate-distortion evaluation: real files, decoded by new processes, beside standard codecs.

`gnvc eval` puts these modules together:

- `clips` finds and reads the sources, `points` are ways of coding one (our codec at a level, the
  VAE alone, an anchor at the same rate), `anchors` runs the standard codecs.
- `quality` measures a decoded clip, `records` keeps the result of each clip and point on disk.
- `sweep` does this for all clips and points, `workers` in several processes.
- `bd_rate`, `tables`, `plots`, `pictures` and `report` turn records into figures and a page;
  `compare` sets two runs side by side, `paper` the figures that were published.

Whatever determines a result is in the key of its record (`Point.identity`, and `identity` of
`QualityMeter`), so a rerun measures only what is missing or has changed.
"""
