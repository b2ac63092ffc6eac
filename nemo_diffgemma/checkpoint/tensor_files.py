"""Which tensors a released-format directory holds, and where. Needs neither Megatron nor process groups.

As in transformers, `model.safetensors` is the checkpoint where it exists, else what `model.safetensors.index.json`
names. Without either, all safetensors files together are. The same tensor in two of the files is an error.

Some tensors are one weight under several names: the head is the table of embeddings, and the encoder shares all but its
layer scalars with the decoder. `files` has such a weight once, under the decoder's name; `copies` are the others.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_diffgemma.config_keys import QUANTISED
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import brief, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # a file's names of those that the network holds exactly, so that writing gives the same bytes back
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
_COMPARED = 1 << 24  # elements of two copies that are compared at a time

# What quantising tools (compressed-tensors, ModelOpt, GPTQ, AWQ, bitsandbytes, transformers' fp8) put beside a weight.
_OF_QUANTISERS = re.compile(
    r"[._]((weight|input|output|k|v)_(scale|scale_inv|scale_2|scale_inverse|zero_point|packed|shape|global_scale|g_idx)"
    r"|qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\S*|SCB|amax|_amax)$"
)
_SHARED_BY_ENCODER = re.compile(r"^model\.encoder\.language_model\.(?!layers\.\d+\.layer_scalar$)(.+)$")


_OF_MACHINE = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.ENOLCK),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR),
}


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file or tensor and what to do."""


def is_fault_of_machine(error: BaseException) -> bool:
    """Whether a disk, a network or a limit failed: then no file is to blame, and another try may succeed."""
    return isinstance(error, OSError) and error.errno in _OF_MACHINE


def tied_to(name: str) -> str | None:
    """Name of the weight that tensor `name` is another name of, or None."""
    if name == "lm_head.weight":
        return "model.decoder.embed_tokens.weight"
    shared = _SHARED_BY_ENCODER.match(name)
    return f"model.decoder.{shared[1]}" if shared else None


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Read a safetensors header: where its tensors begin, and each tensor's dtype, shape and data_offsets by name."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


class TensorFiles:
    """The safetensors files of a directory, opened once, by tensor name.

    Raises `CheckpointError` where files are missing or damaged, a tensor is in two of them, or they are quantised.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}
        self.copies: dict[str, Path] = {}
        self._names: dict[str, str] = {}  # in the files, where it is another
        self._stack = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        try:
            self._locate()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _locate(self) -> None:
        for file in self._chosen():
            for name in self.open(file).keys():  # noqa: SIM118 (no mapping)
                if name in self.files:
                    raise CheckpointError(
                        f"tensor {name} is in {self.files[name]} and in {file.name}; one of the files is of another "
                        f"checkpoint: remove it, or give {INDEX} that names the right ones"
                    )
                self.files[name] = file
        self._check_index()
        self._check_not_quantised()
        for name in list(self.files):
            weight = tied_to(name)
            if weight is not None and weight in self.files:
                self.copies[name] = self.files.pop(name)
            elif weight is not None:
                self.files[weight] = self.files.pop(name)
                self._names[weight] = name

    def _chosen(self) -> list[Path]:
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        weights = self._index()
        if weights is None:
            return sorted(self.directory.glob("*.safetensors"))
        missing = sorted({file for file in weights.values() if not (self.directory / file).is_file()})
        if missing:
            raise CheckpointError(
                f"{self.directory / INDEX} names {', '.join(missing)}, which {self.directory} does not hold; copy the "
                "missing files"
            )
        return [self.directory / file for file in sorted(set(weights.values()))]

    def _index(self) -> dict[str, str] | None:
        file = self.directory / INDEX
        if not file.is_file():
            return None
        weights = read_object(file, CheckpointError).get("weight_map")
        if not isinstance(weights, dict):
            raise CheckpointError(
                f"{file} is damaged: weight_map is {brief(weights)}, expected an object of tensor and file names; copy "
                "it again from the checkpoint"
            )
        for name, given in weights.items():
            place = PurePosixPath(given) if isinstance(given, str) else PurePosixPath("..")
            if place.is_absolute() or ".." in place.parts or "\0" in str(place):
                raise CheckpointError(
                    f"{file} is damaged: weight_map gives {brief(name)} the file {brief(given)}, expected a file of "
                    "this directory; copy it again from the checkpoint"
                )
        return weights

    def _check_index(self) -> None:
        """Check that the files hold what the index says."""
        if (self.directory / SINGLE).is_file():
            return
        for name, file in (self._index() or {}).items():
            if self.files.get(name) != self.directory / file:
                raise CheckpointError(
                    f"{self.directory / file} does not hold tensor {name}; {INDEX} is of another checkpoint"
                )

    def _check_not_quantised(self) -> None:
        quantised = next((name for name in self.files if _OF_QUANTISERS.search(name)), None)
        if quantised is not None:
            raise CheckpointError(f"{self.files[quantised]} holds {quantised}: {QUANTISED}")
        if (self.directory / "hf_quant_config.json").is_file():
            raise CheckpointError(f"{self.directory} has an hf_quant_config.json: {QUANTISED}")

    @property
    def overridden(self) -> list[str]:
        """Files that the index names and that count for nothing, because there is a model.safetensors as well."""
        if not (self.directory / SINGLE).is_file():
            return []
        with contextlib.suppress(CheckpointError):
            return sorted({*(self._index() or {}).values()} - {SINGLE})
        return [INDEX]

    def open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                if is_fault_of_machine(error):
                    raise
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file ({error}); copy it again from the checkpoint"
                ) from None
        return self._handles[file]

    def stored_name(self, name: str) -> str:
        """What tensor `name` is called in its file."""
        return self._names.get(name, name)

    def slice(self, name: str) -> Any:
        """Lazy view of a tensor: `get_shape()`, `get_dtype()`, and indexing that reads only what it selects."""
        if name not in self.files:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        return self.open(self.files[name]).get_slice(self.stored_name(name))

    def check_copy(self, name: str) -> None:
        """Raise `CheckpointError` unless copy `name` has the values of its weight."""
        weight = tied_to(name)
        assert weight is not None
        copy, original = self.open(self.copies[name]).get_slice(name), self.slice(weight)
        shape = original.get_shape()
        rows = max(1, _COMPARED // max(1, int(torch.Size(shape[1:]).numel())))
        if copy.get_shape() != shape or not all(
            torch.equal(copy[start : start + rows].float(), original[start : start + rows].float())
            for start in range(0, shape[0] if shape else 0, rows)
        ):
            raise CheckpointError(
                f"{name} in {self.copies[name]} differs from {weight}, but DiffusionGemma has one weight for both "
                "(tie_word_embeddings); a checkpoint with the two untied is of another architecture"
            )
