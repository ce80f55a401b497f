"""DeepSpeed's model file of a checkpoint without a manifest, and what it says of parameters elsewhere.

Of ZeRO 3 every rank has written one, with the same buffers as a rule: that of the first is taken.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_fp8.zero_fp8.checkpoint.files import Entry, load_pickled
from ds_fp8.zero_fp8.checkpoint.foreign.stock_files import model_files
from ds_fp8.zero_fp8.checkpoint.manifest import Sliced
from ds_fp8.zero_fp8.checkpoint.model_files import FRAGMENTS, ModelFile, ModelFiles
from ds_fp8.zero_fp8.placement.even_slices import spans


def named(folder: Path, *, universal: bool) -> ModelFile:
    """The model file that DeepSpeed's names lead to. Raises as `model_files`."""
    whole, of_ranks = model_files(folder, universal=universal)
    path = (whole or of_ranks)[0]
    file, paths = Entry(path, load_pickled(path)), tuple(whole or [path])
    if of_ranks and (not whole or _has_no_weights(file)):
        count = file.at("dp_world_size").count()
        if len(of_ranks) != count:
            names = ", ".join(each.name for each in of_ranks)
            raise ValueError(f"{folder}: received {names}, expected {count} files, one per rank")
        sliced = sliced_files(file, of_ranks)
        return ModelFile(path, file.value, paths=paths, sliced=shapes_elsewhere(file), files=sliced)
    return ModelFile(path, file.value, paths=paths, files=ModelFiles(lambda _: file, None))


def _has_no_weights(model: Entry) -> bool:
    """Whether a file is of ZeRO 3, under whatever name: universal checkpoints of ours have both."""
    module = model.at("module").of(dict)
    names = [name for shapes in trained_shapes(model) for name in shapes]
    return any(isinstance(module.get(name), Tensor) and not module[name].numel() for name in names)


def sliced_files(model: Entry, paths: Sequence[Path]) -> ModelFiles:
    """The model files of ZeRO 3, of which one is open; paths: of all ranks, in their order."""
    sliced = {}
    for name, shape in frozen_shapes(model).items():
        length = model.at(FRAGMENTS).at(name).of(Tensor).numel()
        slices = spans(torch.Size(shape).numel(), length, len(paths))
        sliced[name] = Sliced(shape=shape, slices=slices)
    return ModelFiles(lambda rank: Entry(paths[rank], load_pickled(paths[rank])), sliced)


def shapes_elsewhere(model: Entry) -> dict[str, list[int] | None]:
    """Shapes of the parameters that are empty in a model file's module, by every name they have."""
    shapes = {**{k: v for each in trained_shapes(model) for k, v in each.items()}, **frozen_shapes(model)}
    tied = model.at("shared_params").of(dict) if "shared_params" in model else {}
    return {**shapes, **{name: shapes.get(owner) for name, owner in tied.items()}}


def trained_shapes(model: Entry) -> list[dict[str, list[int]]]:
    """Shapes of trained parameters, by sub-group, in their order in the optimizer files."""
    return [_shapes(each) for each in model.at("param_shapes").each()]


def frozen_shapes(model: Entry) -> dict[str, list[int]]:
    """Shapes of the frozen parameters in a model file."""
    none = "frozen_param_shapes" not in model or model.value["frozen_param_shapes"] is None
    return {} if none else _shapes(model.at("frozen_param_shapes"))


def _shapes(entry: Entry) -> dict[str, list[int]]:
    return {name: [each.count() for each in entry.at(name).each()] for name in entry.of(dict)}
