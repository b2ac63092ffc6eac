"""Jobs for the pool of ranks: checkpoints that several processes read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loaded_and_saved(source: str, target: str, layout: dict[str, Any]) -> None:
    """Write what is loaded in a layout as a sharded checkpoint of that layout."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint.open import save_network
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    save_network(DiffusionGemma.from_checkpoint(source), target, "sharded")


def converted_by_all(source: str, directory: str) -> list[str]:
    """Convert there and back in small files -> those that this rank has written."""
    from unittest import mock

    from nemo_diffgemma.checkpoint import huggingface, manifest, streamed_files, streaming

    written: list[str] = []
    opened = manifest.HashedFile.__init__

    def noted(self: Any, path: Path) -> None:
        if path.suffix in (".safetensors", ".distcp"):
            written.append(f"{path.parent.name}/{path.name}")
        opened(self, path)

    with (
        mock.patch.object(huggingface, "SHARD_BYTES", 40_000),
        mock.patch.object(streamed_files, "SHARDED_BYTES", 40_000),
        mock.patch.object(manifest.HashedFile, "__init__", noted),
    ):
        streaming.convert(source, f"{directory}/sharded", "sharded")
        streaming.convert(f"{directory}/sharded", f"{directory}/back", "huggingface")
    return written


def verified(directories: list[str]) -> list[str] | str:
    """Verify the directory of this rank -> the files that it has read, or what it says."""
    from unittest import mock

    import torch.distributed as dist

    from nemo_diffgemma.checkpoint import manifest, sharded

    directory, read, digest = Path(directories[dist.get_rank()]), [], manifest._digest

    def noted(file: Path) -> Any:
        read.append(str(file.relative_to(directory)))
        return digest(file)

    with mock.patch.object(manifest, "_digest", noted):
        try:
            sharded.verify(directory)
        except Exception as error:
            return str(error)
    return read
