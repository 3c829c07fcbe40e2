"""Commands on weights: port and export those of others.

`port` reads public weights into a checkpoint folder, and `export` writes such a folder back.
`calibrate` makes a codec for a ported VAE from statistics, and `export_programs` turns a model into
programs that run without this package's networks.
"""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from gnvc_jax.commands.options import Source, check_range, names, parse_size
from gnvc_jax.errors import UsageError


def port(
    *,
    source: Source,
    to: str | None = None,
    check: bool = False,
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    prompt: str | None = None,
    heads: int | None = None,
    lora: tuple[str, ...] = (),
    scale: tuple[float, ...] = (1.0,),
    vace: str | None = None,
    low_noise: bool = False,
    no_progress: bool = False,
) -> int:
    """Convert public weights of Wan2.1 or LPIPS to a checkpoint folder.

    Example: gnvc port --from Wan2.1-VACE-1.3B --to weights/vace

    Args:
        source: Weight file, or folder in the layout of Wan-AI or diffusers that holds a VAE, a DiT
            or both; a light decoder (taew2_1.pth); for LPIPS, a folder with the files of
            torchvision and lpips.
        to: Folder to create.
        check: Read and check all weights as for --to, but write nothing.
        dtype: Type of the converted weights; "stored" keeps the type of each tensor.
        prompt: Text condition to store with the DiT, a .npy or .safetensors file.
        heads: Number of attention heads; needed only if config.json is missing.
        lora: LoRA files to merge into the DiT.
        scale: Factor of each LoRA, or one for all.
        vace: File or folder with VACE's adapter alone, to add to a text-to-video DiT.
        low_noise: Port the expert for low noise of a Wan2.2-A14B model, which has two DiTs.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.porting import port as porting
    from gnvc_jax.porting.perceptual import open_perceptual, port_perceptual

    if (to is None) != check:
        raise UsageError("expected either --to FOLDER or --check")
    # One factor serves all files.
    scales = scale * len(lora) if len(scale) == 1 else scale
    if len(scales) != len(lora) or (scale != (1.0,) and not lora):
        raise UsageError(f"--scale has {len(scale)} factors for {len(lora)} files of --lora")
    # Recognised by its files. It has neither prompt, heads nor variants.
    if open_perceptual(source):
        if to is None or prompt or heads is not None or dtype != "stored" or lora or vace:
            raise UsageError("of all options, weights of LPIPS take --from and --to alone")
        print(port_perceptual(source, to))
        return 0
    variant = {"lora": list(zip(lora, scales)), "vace": vace, "low_noise": low_noise}
    for part in porting.port(source, to, dtype, heads, prompt, not no_progress, **variant):
        component = part.architecture.component
        place = f"{component}: can be ported" if to is None else f"{to}/{component}"
        print(
            f"{place}: {part.tensors} tensors, "
            f"{part.parameters} parameters, {part.bytes / 2**30:.2f} GiB, "
            f"from {part.source.path} ({part.source.scheme} names)"
        )
    return 0


def calibrate(
    *,
    vae: str,
    data: str,
    out: str,
    clips: int = 100,
    frames: int = 17,
    size: str = "256x256",
    no_progress: bool = False,
) -> int:
    """Fit a latent codec to a VAE by statistics of its latents, without training.

    Example: gnvc calibrate --vae weights/vace --data clips --out calibrated.safetensors

    The result codes at once (`gnvc encode --model calibrated.safetensors`), and training can go on
    from it (`gnvc train --init.model calibrated.safetensors`).

    Args:
        vae: Folder made by `gnvc port`, run folder of the stage `vae`, name of a shipped model, or
            path of a model file.
        data: Folder of videos, list of videos (.txt), or a single video.
        out: Model file to write.
        clips: Number of random clips to measure.
        frames: Frames per clip, 1 + 4k.
        size: Size of the clips in pixels, WIDTHxHEIGHT.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.calibrate import calibrate as run
    from gnvc_jax.model_file import save_model

    check_range("--clips", clips, 1)
    width, height = parse_size(size)
    model = run(
        data,
        vae,
        clips=clips,
        frames=frames,
        size=(height, width),
        name=Path(out).stem,
        progress=not no_progress,
    )
    save_model(out, model)
    print(out)
    return 0


def export(*, source: Source, to: str, shard_gib: float = 2.0, no_progress: bool = False) -> int:
    """Convert a checkpoint folder back to the model folders of diffusers.

    Example: gnvc export --from weights/vace --to exported

    Args:
        source: Folder made by `gnvc port`.
        to: Folder to create.
        shard_gib: Maximum size of a weight file in GiB.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.porting import export as exporting

    if shard_gib <= 0:
        raise UsageError(f"--shard-gib must be positive, got {shard_gib:g}")
    size = int(shard_gib * 2**30)
    for folder in exporting.export(source, to, size, progress=not no_progress):
        print(folder)
    return 0


def export_programs(
    model: Positional[str],
    out: Positional[str],
    *,
    size: str,
    platforms: Annotated[tuple[str, ...], names(("cpu", "cuda", "rocm", "tpu"))] = (
        "cpu",
        "cuda",
        "tpu",
    ),
) -> int:
    """Write encoder and decoder of a model as serialized StableHLO programs.

    Example: gnvc export-programs small programs --size 256x256

    Args:
        model: Name of a shipped model, or path of a model file.
        out: Folder to create.
        size: Frame size that the programs are made for, WIDTHxHEIGHT.
        platforms: Platforms to export for, separated by commas.
    """
    from gnvc_jax.export_programs import export_model
    from gnvc_jax.pretrained import find_model

    width, height = parse_size(size)
    export_model(find_model(model), out, height, width, platforms)
    print(out)
    return 0
