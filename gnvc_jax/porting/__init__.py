"""Public weights of Wan2.1 and LPIPS: converted to checkpoint folders, and back to diffusers.

`port.port` and `export.export` do what the commands of the same names do. `sources` opens public
files, `lora` and `vace` change what is in them, `architectures` and `names` know what must be in
them and what it becomes, and `checkpoint.load_weights` loads the result.
"""
