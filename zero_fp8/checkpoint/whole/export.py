"""The weights of a checkpoint of ours as a model's files: safetensors or torch, in shards, with an index.

Trained parameters come from their masters, everything else from DeepSpeed's model file. Parameters are
rounded to one dtype, buffers keep theirs; or FP8 weights stay codes (`fp8_layout`). One file at a time is in
memory.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ds_fp8.ops.formats import E4M3
from ds_fp8.ops.masters import write_weights
from ds_fp8.ops.products import tiles
from ds_fp8.zero_fp8.checkpoint.files import new_folder, save
from ds_fp8.zero_fp8.checkpoint.reader import is_extra_state
from ds_fp8.zero_fp8.checkpoint.whole import fp8_layout
from ds_fp8.zero_fp8.checkpoint.whole.merged import Whole, others

Part = Literal["values", "codes", "scales"]  # of a master; the last two of an FP8 weight
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FileKind:
    """How files are called, as Hugging Face's loaders expect, and written."""

    stem: str
    ending: str
    save: Callable[[dict[str, Tensor], Path], None]

    def name(self, number: int, count: int) -> str:
        return f"{self.stem}{'' if count == 1 else f'-{number + 1:05d}-of-{count:05d}'}{self.ending}"


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Without shared memory: a tied parameter is written under each of its names."""
    try:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{path}: not written: {error}") from error


KINDS = {
    "safetensors": FileKind("model", ".safetensors", _save_safetensors),
    "torch": FileKind("pytorch_model", ".bin", save),
}


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model."""

    name: str
    numel: int
    dtype: torch.dtype  # as exported
    master: str | None  # the trained parameter that it is
    held: str | None  # else its name among what the model files hold
    part: Part = "values"

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def model_tensors(checkpoint: Whole, dtype: torch.dtype, *, fp8: bool = False) -> list[ModelTensor]:
    """Every tensor of the model, in the model's order. fp8: weights that are codes in training stay codes."""
    encoded = fp8_layout.matrices(checkpoint) if fp8 else set()
    file, held, rest = checkpoint.model_file, checkpoint.model_files, set(others(checkpoint))
    tied, buffers = file.get("shared_params") or {}, file.get("buffer_names") or ()
    tensors = []
    for name in checkpoint.module:
        owner = tied.get(name, name)
        source = name if name in rest else owner
        if owner in checkpoint.parameters:
            shape = torch.Size(checkpoint.parameters[owner].shape)
            if owner in encoded:
                tensors += _codes_and_scales(owner, shape)
            else:
                tensors.append(ModelTensor(name, shape.numel(), dtype, owner, None))
        elif source in rest:
            kept = held.dtype(source)
            rounded = kept.is_floating_point and name not in buffers and not is_extra_state(name)
            tensors.append(ModelTensor(name, held.numel(source), dtype if rounded else kept, None, source))
    return tensors


def _codes_and_scales(name: str, shape: torch.Size) -> list[ModelTensor]:
    """The codes and scales of an FP8 weight, which is never tied."""
    scales = math.prod(map(tiles, shape))
    return [
        ModelTensor(name, shape.numel(), E4M3.dtype, name, None, "codes"),
        ModelTensor(name + fp8_layout.SCALES, scales, torch.float32, name, None, "scales"),
    ]


def split(tensors: Sequence[ModelTensor], limit: int) -> list[list[ModelTensor]]:
    """Files of at most `limit` bytes; a larger tensor has a file of its own."""
    files: list[list[ModelTensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(member.nbytes for member in files[-1]) + tensor.nbytes > limit:
            files.append([])
        files[-1].append(tensor)
    return files


def export(
    checkpoint: Whole,
    out: Path,
    tensors: Sequence[ModelTensor],
    *,
    kind: str,
    limit: int,
    advance: Callable[[int], None],
    texts: Mapping[str, str],
) -> list[Path]:
    """Write the model into the new folder `out` and return the file paths.

    limit: maximum bytes per file. advance: called with the number of elements written. texts: further files.
    Raises ValueError if `out` exists, and for a value that the dtype does not hold.
    """
    file_kind, files = KINDS[kind], split(tensors, limit)
    names = [file_kind.name(number, len(files)) for number in range(len(files))]
    with new_folder(out) as temporary:
        for name, members in zip(names, files, strict=True):
            file_kind.save(dict(_values(checkpoint, members, advance)), temporary / name)
        if len(files) > 1:
            names.append(f"{file_kind.stem}{file_kind.ending}.index.json")
            (temporary / names[-1]).write_text(json.dumps(_index(files, names), indent=2) + "\n")
        for name, text in texts.items():
            (temporary / name).write_text(text)
    return [out / name for name in (*names, *texts)]


def _values(
    checkpoint: Whole, members: Sequence[ModelTensor], advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    made: dict[tuple[str, Part], Tensor] = {}  # tied parameters are one tensor
    for member in members:
        if member.held is not None:
            yield member.name, _rounded(checkpoint.model_files.whole(member.held), member)
        elif member.master is not None:
            if (member.master, member.part) not in made:
                made |= dict(_made_of(checkpoint, member.master, member))
            yield member.name, made[member.master, member.part]
        advance(member.numel)


def _made_of(
    checkpoint: Whole, master: str, member: ModelTensor
) -> Iterator[tuple[tuple[str, Part], Tensor]]:
    values = checkpoint.states(master)[0].view(checkpoint.parameters[master].shape)
    if member.part == "values":
        yield (master, "values"), _rounded(values, member)
        return
    codes, scales = fp8_layout.encode(values)
    yield (master, "codes"), codes
    yield (master, "scales"), scales


def _rounded(tensor: Tensor, exported: ModelTensor) -> Tensor:
    """In the dtype to export, to BF16 as the model's weights are. Raises ValueError if a value overflows."""
    if tensor.dtype == exported.dtype:
        return tensor
    values = tensor.to(torch.float32)
    out = torch.empty(values.shape, dtype=exported.dtype)
    write_weights(values, out)
    if not torch.equal(values.isfinite(), out.isfinite()):
        raise ValueError(
            f"{exported.name}: received a value of {values.abs().max().item():.4g}, allowed as "
            f"{exported.dtype}: at most {torch.finfo(exported.dtype).max:.4g}"
        )
    return out


def _index(files: Sequence[Sequence[ModelTensor]], names: Sequence[str]) -> Mapping[str, Any]:
    homes = {member.name: name for name, members in zip(names, files, strict=False) for member in members}
    total = sum(member.nbytes for members in files for member in members)
    return {"metadata": {"total_size": total}, "weight_map": homes}
