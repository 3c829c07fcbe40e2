"""Video input and output: files, raw video, folders of images and pipes, as RGB frames.

- `reader.open_video` reads a video frame by frame, `reader.read_clip` some frames of it,
  `reader.probe` says its size; they choose among `container` (what PyAV reads), `raw` (.y4m and
  .yuv) and `folder` (PNG images).
- `writer.open_writer` writes, `search.find_videos` searches folders.
- `packets` counts frames and finds key frames without decoding, `audio` takes a track along.
- `colour` converts between YUV and RGB, `errors` lists what can go wrong.

Frames are uint8 RGB (h, w, 3), rotated as they are shown. Nothing here uses JAX.
"""
