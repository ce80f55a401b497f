"""Matrices that do not train, under ZeRO 3: slices of codes, made once from the weights.

Codes are made from the whole matrix, which each rank holds for that moment, one matrix after the other, and
each rank keeps its slice. Files hold values: `as_values` makes slices BF16 while files are read or written,
and encodes anew what a file has changed.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_fp8.config.refusals import naming
from ds_fp8.ops.products import tiles
from ds_fp8.zero_fp8.comm.collectives import max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.placement.parameters import held_of, part_of, shape_of
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.products.matrix import Matrix
from ds_fp8.zero_fp8.weights.frozen import encode
from ds_fp8.zero_fp8.weights.sliced.codes import SlicedMatrix, nothing_of

logger = logging.getLogger("ds_fp8")


class FrozenSlices:
    """The codes of a run's frozen matrices that this rank holds."""

    def __init__(self, nodes: Nodes) -> None:
        """Start without frozen matrices. nodes: of the ranks that share them."""
        self._parameters: list[tuple[Parameter, SlicedMatrix]] = []
        self._nodes = nodes
        self._logged = False

    def take_over(self, choice: Choice, names: Mapping[Parameter, str]) -> None:
        """Encode a run's frozen matrices one by one. Collective. names: of every parameter of the model."""
        for index, parameter in enumerate(choice.frozen):
            rows, columns = shape = shape_of(parameter)
            nothing, codes = nothing_of(shape, parameter.device)
            exponents = torch.ones(tiles(rows), tiles(columns), dtype=torch.uint8, device=parameter.device)
            matrix = Matrix(names[parameter], codes, exponents, choice.kernels)
            held = torch.zeros_like(held_of(parameter), dtype=torch.uint8)
            home = SlicedMatrix(index, parameter, matrix, held, nothing, choice.way, encode)
            self._parameters.append((parameter, home))
            home.encode_slices(parameter)

    @property
    def exist(self) -> bool:
        """Whether there are frozen matrices."""
        return bool(self._parameters)

    def matrices(self) -> Iterator[Matrix]:
        return (home.matrix for _, home in self._parameters)

    def bring_home(self) -> str | None:
        """Return an objection if weights were replaced without DeepSpeed's knowledge.

        Weights changed within GatheredParameters are encoded already, which is logged once.
        """
        for parameter, home in self._parameters:
            objection = home.objection(parameter)
            if objection:
                return f"{home.matrix.name}: {objection}"
        edited = [home for _, home in self._parameters if home.edited is not None]
        for home in edited:
            home.edited = None
        if edited and not self._logged:
            self._logged = True
            named = naming([home.matrix.name for home in edited])
            logger.warning("frozen weights changed by GatheredParameters are rounded to FP8 again: %s", named)
        return None

    @contextmanager
    def as_values(self) -> Iterator[None]:
        """Make slices hold values while files are read or written, then encode what changed. Collective."""
        for parameter, home in self._parameters:
            home.give_back(parameter)
        try:
            yield
        finally:
            for (parameter, home), anew in zip(self._parameters, self._changed(), strict=True):
                if anew:
                    home.encode_slices(parameter)
                else:
                    home.take_over(parameter)

    def _changed(self) -> list[int]:
        """For each matrix, whether a slice of any rank has other values than its codes."""
        found = [self._has_changed(*each) for each in self._parameters]
        if not found:
            return []
        flags = torch.tensor(found, dtype=torch.uint8, device=self._parameters[0][0].device)
        max_over_ranks(flags, self._nodes.group)
        changed: list[int] = flags.tolist()
        return changed

    def _has_changed(self, parameter: Parameter, home: SlicedMatrix) -> bool:
        own, part = home.own_values(), part_of(parameter)
        values: Tensor = held_of(parameter)[: part.stop - part.start]
        return not torch.equal(values, own)

    def set_writers(self) -> None:
        """Do nothing: files are read into slices."""

    def unset_writers(self) -> None:
        """Do nothing: no writer was set."""
