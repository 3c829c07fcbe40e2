"""Video input and output: files, raw video, folders of images and pipes, as RGB frames.

`reader.open_video` reads, `writer.open_writer` writes, and `search.find_videos` searches folders.
`colour` converts between YUV and RGB, and `errors` lists what can go wrong.
"""
