"""Fetches under ZeRO 3: the slices of parameters, as bytes, to every rank, which puts them together.

DeepSpeed's coordinator decides when which parameters are fetched and released, and asks the first of a group
to gather them all: `install` gives every parameter methods of ours for that. A parameter of any dtype
travels as bytes, an FP8 weight as its codes. Since slices follow each other in rank order, a gather of one
parameter is the parameter: a large one travels alone, and is copied on neither side; the small ones of a
group travel side by side.
"""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_fp8.compat import ZeroParamStatus
from ds_fp8.zero_fp8.comm.collectives import gather_flat
from ds_fp8.zero_fp8.weights.sliced import codes
from ds_fp8.zero_fp8.weights.sliced.slices import CODES, EDITED, FETCHED, is_away, objection_to

UNDER_WAY = "ds_fp8_fetch"  # attribute of a parameter: its last fetch
WRITTEN = "ds_fp8_written"  # to be called when its slices were written
ALONE = 1 << 20  # bytes of a slice from which on its parameter travels alone


class Slices:
    """What the slices of a run are called, and when they were last written.

    On a GPU DeepSpeed fetches on a stream of its own, which knows nothing of a sweep that still runs.
    """

    def __init__(self, name: Callable[[Any], str]) -> None:
        self.name = name
        self._written: Any = None  # an event

    def written(self, device: torch.device) -> None:
        """What has been launched on the current stream may have written slices."""
        if device.type == "cuda":
            self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._written.record()

    def wait(self) -> None:
        """Let the current stream wait for it."""
        if self._written is not None:
            torch.cuda.current_stream().wait_event(self._written)


class Transfer:
    """Parameters that travel side by side: one all-gather."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = parameters
        slices = [each.ds_tensor.view(torch.uint8) for each in parameters]
        self._sizes = [each.numel() for each in slices]
        self._own = slices[0] if len(slices) == 1 else torch.cat(slices)
        ranks: int = parameters[0].ds_zero_partition_world_size
        self._whole = self._own.new_empty(ranks, self._own.numel())
        self._work = gather_flat(self._whole, self._own, parameters[0].ds_process_group)

    def land(self) -> None:
        """Wait, and give the parameters their values."""
        self._work.wait()
        if self._whole.is_cuda:  # it may have been made on another stream, the coordinator's
            self._whole.record_stream(torch.cuda.current_stream())
        for parameter, part in zip(self._parameters, self._whole.split(self._sizes, dim=1), strict=True):
            _fill(parameter, part.reshape(-1))  # copies where several have travelled


class Whole:
    """Parameters of which this rank, the only one, has all: nothing travels."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = parameters

    def land(self) -> None:
        """Give the parameters their values."""
        for parameter in self._parameters:
            _fill(parameter, parameter.ds_tensor.view(torch.uint8))


def _fill(parameter: Any, whole: Tensor) -> None:
    """whole: bytes of all slices, [n] uint8."""
    values = whole.view(parameter.ds_tensor.dtype)
    if len(values) > parameter.ds_numel:
        values = values[: parameter.ds_numel]
        if parameter.ds_persist:
            values = values.clone()  # padding is not kept from step to step
    if hasattr(parameter, CODES):
        getattr(parameter, CODES).fetched(parameter, values)
        return
    put_back(parameter, values.view(parameter.ds_shape))


def kept(parameter: Any) -> Callable[[], None]:
    """What makes a parameter that is whole so again, as it is, with what is written to it meanwhile."""
    if hasattr(parameter, CODES):
        restore: Callable[[], None] = getattr(parameter, CODES).kept(parameter)
        return restore
    return partial(put_back, parameter, parameter.data)


def put_back(parameter: Any, values: Tensor) -> None:
    """The parameter is whole, with these values."""
    parameter.data = values
    setattr(parameter, FETCHED, values.data_ptr())
    parameter.ds_status = ZeroParamStatus.AVAILABLE


class Fetch:
    """A group of parameters under way: what DeepSpeed's coordinator waits for, once or more."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        if parameters[0].ds_zero_partition_world_size == 1:
            self._under_way: list[Transfer | Whole] = [Whole(parameters)]
            return
        alone = [[each] for each in parameters if each.ds_tensor.nbytes >= ALONE]
        small = [each for each in parameters if each.ds_tensor.nbytes < ALONE]
        self._under_way = [Transfer(each) for each in (*alone, small) if each]

    def wait(self, handle_dependency: bool = True) -> None:
        """Every parameter of the group is whole."""
        while self._under_way:
            self._under_way.pop(0).land()


def launch(parameters: Iterable[Any], slices: Slices) -> Fetch:
    """Fetch parameters of which only slices are there, in the same order on every rank. Collective.

    Raises ValueError for one whose `.data` was replaced.
    """
    ordered = sorted(parameters, key=lambda each: each.ds_id)
    for each in ordered:
        if not is_away(each):
            raise RuntimeError(f"{slices.name(each)}: fetched twice: {each.ds_summary()}")
        objection = objection_to(each)
        if objection is not None:
            raise ValueError(f"{slices.name(each)}: {objection}")
    slices.wait()
    fetch = Fetch(ordered)
    for each in ordered:
        each.ds_status = ZeroParamStatus.INFLIGHT
        setattr(each, UNDER_WAY, fetch)
    return fetch


def gather(parameters: Iterable[Any], slices: Slices) -> list[Fetch]:
    """Fetch those of the parameters that are not whole; all that is under way for them. Collective."""
    parameters = list(parameters)
    away = [each for each in parameters if is_away(each)]
    inflight = ZeroParamStatus.INFLIGHT
    under_way = [getattr(each, UNDER_WAY) for each in parameters if each.ds_status == inflight]
    return [*under_way, *([launch(away, slices)] if away else [])]


def fetch(parameters: Iterable[Any], slices: Slices) -> None:
    """Make parameters whole. Collective."""
    for each in gather(parameters, slices):
        each.wait()


def install(
    parameters: Iterable[Any],
    slices: Slices,
    awaited: MutableMapping[Any, Any],
    settle: Callable[[], None],
) -> None:
    """Let DeepSpeed fetch these parameters by `launch`, for good: its own fetch of one cuts elsewhere.

    awaited: the fetches for which DeepSpeed's coordinator will wait, by parameter. settle: called before
    somebody else gathers parameters.
    """

    def all_gather_coalesced(group: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Fetch:
        return launch(group, slices)

    def all_gather(own: Any, param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        settle()
        fetches = gather(param_list or [own], slices)
        for each in param_list or [own]:
            awaited.pop(each, None)  # who asks for it now may let it go before the coordinator comes to it
        if async_op:
            return fetches
        for fetch in fetches:
            fetch.wait()
        for each in param_list or ():  # of GatheredParameters, where whoever asks may write
            if hasattr(each, CODES):
                getattr(each, CODES).gathered(each)
        return None

    for parameter in parameters:
        parameter.all_gather_coalesced = all_gather_coalesced
        parameter.all_gather = partial(all_gather, parameter)
        if not hasattr(parameter, EDITED):
            parameter.partition = partial(_partition, parameter, parameter.partition)
        setattr(parameter, EDITED, False)
        setattr(parameter, WRITTEN, slices.written)


def _partition(own: Any, original: Any, param_list: Any = None, **options: Any) -> None:
    """DeepSpeed's partition, which notes whose slices it has written; those of codes are not its to write."""
    parameters, updated = param_list or [own], bool(options.get("has_been_updated"))
    plain = [each for each in parameters if not hasattr(each, CODES)]
    if plain:
        original(plain, **options)
    for each in plain if updated else ():
        setattr(each, EDITED, True)
    codes.partition([each for each in parameters if hasattr(each, CODES)], updated=updated)
    if updated:
        getattr(own, WRITTEN)(own.device)
