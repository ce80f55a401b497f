"""The weights of a checkpoint of ours as a model's files: safetensors or torch, in shards, with an index.

Trained parameters come from their masters, everything else from DeepSpeed's model file. Parameters are
rounded to one dtype, buffers keep theirs. One file at a time is in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ds_fp8.ops.masters import write_weights
from ds_fp8.zero_fp8.checkpoint import writing
from ds_fp8.zero_fp8.checkpoint.reader import Native, is_extra_state, others, whole
from ds_fp8.zero_fp8.checkpoint.tags import fresh

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
        save_file({name: each.clone() for name, each in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{path}: not written: {error}") from error


KINDS = {
    "safetensors": FileKind("model", ".safetensors", _save_safetensors),
    "torch": FileKind("pytorch_model", ".bin", writing.save),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the model."""

    name: str
    numel: int
    dtype: torch.dtype  # as exported
    master: str | None  # the trained parameter that it is; None: a tensor of the model file

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def entries(native: Native, dtype: torch.dtype) -> list[Entry]:
    """Every tensor of the model, in the model's order."""
    file, rest = native.model_file, others(native)
    tied, buffers = file.get("shared_params") or {}, file.get("buffer_names") or ()
    found = []
    for name in native.module:
        owner = tied.get(name, name)
        if owner in native.facts.parameters:
            numel = torch.Size(native.facts.parameters[owner].shape).numel()
            found.append(Entry(name, numel, dtype, owner))
        elif name in rest:
            tensor = rest[name]
            rounded = tensor.is_floating_point() and name not in buffers and not is_extra_state(name)
            found.append(Entry(name, tensor.numel(), dtype if rounded else tensor.dtype, None))
    return found


def split(found: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Files of at most `limit` bytes; a larger tensor has a file alone."""
    files: list[list[Entry]] = [[]]
    for entry in found:
        if files[-1] and sum(each.nbytes for each in files[-1]) + entry.nbytes > limit:
            files.append([])
        files[-1].append(entry)
    return files


def export(
    native: Native, out: Path, *, dtype: str, kind: str, limit: int, advance: Callable[[int], None]
) -> list[Path]:
    """Write the folder `out`; the files. limit: bytes a file; advance: told the elements that are done.

    Raises ValueError where `out` exists, and for a value that the dtype does not hold.
    """
    form, files = KINDS[kind], split(entries(native, DTYPES[dtype]), limit)
    names = [form.name(number, len(files)) for number in range(len(files))]
    with fresh(out) as folder:
        for name, members in zip(names, files, strict=True):
            form.save(dict(_tensors(native, members, advance)), folder / name)
        if len(files) > 1:
            names.append(f"{form.stem}{form.ending}.index.json")
            (folder / names[-1]).write_text(json.dumps(_index(files, names), indent=2) + "\n")
    return [out / name for name in names]


def _tensors(
    native: Native, members: Sequence[Entry], advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    made: dict[str, Tensor] = {}  # tied parameters are one tensor
    for entry in members:
        if entry.master is None:
            yield entry.name, _rounded(native.module[entry.name], entry)
        else:
            if entry.master not in made:
                shape = native.facts.parameters[entry.master].shape
                made[entry.master] = _rounded(whole(native, entry.master)[0].view(shape), entry)
            yield entry.name, made[entry.master]
        advance(entry.numel)


def _rounded(tensor: Tensor, entry: Entry) -> Tensor:
    """In the entry's dtype, to BF16 as the model's weights are. Raises ValueError where a value overflows."""
    if tensor.dtype == entry.dtype:
        return tensor
    values = tensor.to(torch.float32)
    out = torch.empty(values.shape, dtype=entry.dtype)
    write_weights(values, out)
    if not torch.equal(values.isfinite(), out.isfinite()):
        raise ValueError(
            f"{entry.name}: received a value of {values.abs().max().item():.4g}, allowed as {entry.dtype}: "
            f"at most {torch.finfo(entry.dtype).max:.4g}"
        )
    return out


def _index(files: Sequence[Sequence[Entry]], names: Sequence[str]) -> Mapping[str, Any]:
    members = {entry.name: name for name, entries in zip(names, files, strict=False) for entry in entries}
    total = sum(entry.nbytes for each in files for entry in each)
    return {"metadata": {"total_size": total}, "weight_map": members}
