"""What metrics cost, beside decoding the same clip and beside other libraries.

    python benchmarks/metrics.py [--size 832x480] [--frames 33] [--repeats 3] [--out FILE]

Seconds per frame by metric, without compilation, as eval.py measures them; medians. The clip is a
pan over noise; it is coded by the model at qp 32, and `decode` is what decoding takes. `of decode`
is each metric's share of that. Peers, in the same run: scikit-image (PSNR), pytorch-msssim, and for
LPIPS and DISTS the convolutions of their network alone in PyTorch. Networks see NETWORK_FRAMES.
"""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from coding import scene
from helpers import options
from pytorch_msssim import ms_ssim
from skimage.metrics import peak_signal_noise_ratio

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.evaluation.environment import environment
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.files import write_json
from gnvc_jax.pretrained import load_pretrained

GOP = 17
NETWORK_FRAMES = 4
ALL_FRAMES = ("psnr", "psnr_yuv", "ms_ssim", "temporal", "e_warp")
NETWORKS = {"lpips_alex": "alex", "lpips_vgg": "vgg", "dists": "vgg"}
# Channels and window of a convolution; "M" halves the sides.
LAYERS = {
    "alex": [(64, 11), "M", (192, 5), "M", (384, 3), (256, 3), (256, 3)],
    "vgg": [*2 * [(64, 3)], "M", *2 * [(128, 3)], "M", *3 * [(256, 3)], "M", *3 * [(512, 3)], "M"]
    + 3 * [(512, 3)],
}


def torch_backbone(net: str) -> Callable[[np.ndarray], None]:
    """The convolutions of a network on float frames (b, h, w, 3)."""
    layers, channels = [], 3
    for layer in LAYERS[net]:
        if layer == "M":
            layers.append(torch.nn.MaxPool2d(2 if net == "vgg" else 3, 2))
            continue
        width, window = layer
        stride = 4 if window == 11 else 1
        padding = 2 if window == 11 else window // 2
        conv = torch.nn.Conv2d(channels, width, window, stride, padding)
        layers += [conv, torch.nn.ReLU(inplace=True)]
        channels = width
    backbone = torch.nn.Sequential(*layers)
    return lambda x: backbone(torch.from_numpy(x).permute(0, 3, 1, 2))


def peers() -> dict[str, Callable[[np.ndarray, np.ndarray], None]]:
    """By metric: the same, or a part of it, of uint8 clips (t, h, w, 3) by another library."""

    def torch_ms_ssim(x, y):
        for pair in zip(x, y):
            a, b = (torch.from_numpy(v)[None].permute(0, 3, 1, 2).float() for v in pair)
            ms_ssim(a, b, data_range=255)

    def backbone(net):
        run = torch_backbone(net)

        def both(x, y):
            for frame in (*x, *y):
                run(frame[None] / np.float32(127.5) - 1)

        return both

    return {
        "psnr": lambda x, y: [peak_signal_noise_ratio(*pair) for pair in zip(x, y)],
        "ms_ssim": torch_ms_ssim,
        **{name: backbone(net) for name, net in NETWORKS.items()},
    }


def seconds(run: Callable, *arguments) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def measure(model: str, width: int, height: int, frames: int, repeats: int) -> list[dict]:
    codec, stream = load_pretrained(model), io.BytesIO()
    source = np.stack(list(scene(width, height, frames)))
    header = codec.header(width, height, (25, 1), gop=GOP)
    codec.encode_frames(iter(source), stream, header, 32)
    reader, decoded, decoding = StreamReader(stream.getvalue()), source, []
    for run in range(repeats + 1):
        start = time.perf_counter()
        decoded = np.stack(list(codec.decode_frames(reader)))
        if run:  # the first one compiles
            decoding.append(time.perf_counter() - start)
    decode = statistics.median(decoding) / frames
    rows = [{"metric": "decode", "s_per_frame": decode}]
    print(f"{'decode':11}{decode:12.4f}", flush=True)
    other = peers()
    with torch.inference_mode():
        for name in (*ALL_FRAMES, *NETWORKS):
            count = NETWORK_FRAMES if name in NETWORKS else frames
            pair, meter = (source[:count], decoded[:count]), QualityMeter((name,))
            ours, theirs = [], []
            for _ in range(repeats + 1):
                ours.append(meter(*pair).seconds[name] / count)
                if name in other:
                    theirs.append(seconds(other[name], *pair) / count)
            row = {"metric": name, "s_per_frame": statistics.median(ours[1:])}
            row["of_decode"] = row["s_per_frame"] / decode
            text = f"{name:11}{row['s_per_frame']:12.4f}{row['of_decode']:12.3f}"
            if theirs:
                row["peer_s_per_frame"] = statistics.median(theirs[1:])
                row["speed_ratio"] = row["peer_s_per_frame"] / row["s_per_frame"]
                text += f"{row['peer_s_per_frame']:14.4f}{row['speed_ratio']:8.2f}"
            print(text, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    args = options.parse(__doc__, "metrics", model="small", size="832x480", frames=33, repeats=3)
    print("metric        s/frame   of decode  peer s/frame  faster")
    width, height = map(int, args.size.split("x"))
    rows = measure(args.model, width, height, args.frames, args.repeats)
    facts = {"size": args.size, "frames": args.frames, "repeats": args.repeats, **environment()}
    write_json(args.out, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
