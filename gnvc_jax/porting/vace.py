"""VACE's adapter in a file of its own, joined with the text-to-video DiT that it was made for.

Such a file has only `vace_blocks` and `vace_patch_embedding` of a VACE model, whose other tensors
are those of the text-to-video model.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gnvc_jax.porting.architectures import count_blocks
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.names import dit_tensors
from gnvc_jax.porting.sources import Source, open_sources
from gnvc_jax.refiner import DiTConfig


def add_adapter(sources: Sequence[Source], path: str | Path) -> list[Source]:
    """Adds VACE's adapter to the DiT among sources.

    Args:
        sources: Sources, one of them a DiT without an adapter.
        path: File or folder with the adapter alone, in either naming scheme.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        PortError: If one of the two parts is missing, or the DiT has an adapter already.
    """
    modules = open_sources(path)
    if [module.component for module in modules] != ["vace"]:
        raise PortError(f"{path}: expected the tensors of VACE's adapter alone")
    if not any(source.component == "dit" for source in sources):
        places = ", ".join(str(source.path) for source in sources)
        raise PortError(f"{places}: no text-to-video DiT, which the adapter of {path} is added to")
    return [join(s, modules[0]) if s.component == "dit" else s for s in sources]


def join(base: Source, module: Source) -> Source:
    """Joins a text-to-video DiT and an adapter, whose tensors are renamed to the scheme of the DiT.

    Raises:
        PortError: If both have a tensor of the same name.
    """
    # A DiT with as many context blocks as the adapter has names them all, whatever its sizes.
    blocks = DiTConfig(layers=count_blocks(module, "vace_blocks"), context_every=1)
    names = {t.name(module.scheme): t.name(base.scheme) for t in dit_tensors(blocks)}
    # A name that is not known stays, and is reported with all that does not fit.
    entries = {names.get(name, name): entry for name, entry in module.entries.items()}
    if both := base.entries.keys() & entries.keys():
        raise PortError(f"{base.path} and {module.path} both hold {min(both)}")
    return dataclasses.replace(base, entries=base.entries | entries)
