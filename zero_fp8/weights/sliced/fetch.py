"""Fetches under ZeRO 3: gather the slices of parameters, as bytes, on every rank.

DeepSpeed's coordinator decides when parameters are fetched and released, and calls the gather method of the
first parameter of a group for all of them: `install` replaces that method. A parameter of any dtype travels
as bytes, an FP8 weight as its codes. Since slices follow each other in rank order, the gather of one
parameter is the parameter: a large one travels alone, without a copy on either side; the small ones of a
group share one message.
"""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_fp8.compat import ZeroParamStatus
from ds_fp8.zero_fp8.comm.collectives import gather_flat, keep_for_this_stream
from ds_fp8.zero_fp8.weights.sliced import codes
from ds_fp8.zero_fp8.weights.sliced.slices import CODES, EDITED, FETCHED, is_away, objection_to

UNDER_WAY = "ds_fp8_fetch"  # attribute of a parameter: its last fetch
WRITTEN = "ds_fp8_written"  # attribute of a parameter: called after its slices were written
ALONE = 1 << 20  # bytes of a slice; parameters with slices of this size or more travel alone


class Slices:
    """The names of a run's slices, and when they were last written.

    On a GPU DeepSpeed fetches on its own stream, which does not wait for a sweep that is still running.
    """

    def __init__(self, name: Callable[[Any], str]) -> None:
        self.name = name
        self._written: Any = None  # an event

    def written(self, device: torch.device) -> None:
        """Note that work launched on the current stream may have written slices."""
        if device.type == "cuda":
            self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._written.record()

    def wait(self) -> None:
        """Make the current stream wait for the last write."""
        if self._written is not None:
            torch.cuda.current_stream().wait_event(self._written)


class Transfer:
    """Parameters that share one all-gather."""

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
        keep_for_this_stream(self._own, self._whole)  # they may have been made on the coordinator's
        for parameter, part in zip(self._parameters, self._whole.split(self._sizes, dim=1), strict=True):
            _fill(parameter, part.reshape(-1))  # copies if several share the message


class Whole:
    """Parameters of a run with one rank, which has all of them: nothing travels."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = parameters

    def land(self) -> None:
        """Give the parameters their values."""
        for parameter in self._parameters:
            _fill(parameter, parameter.ds_tensor.view(torch.uint8))


def _fill(parameter: Any, whole: Tensor) -> None:
    """Give a parameter its values. whole: bytes of all slices, [n] uint8."""
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
    """Return a function that makes a whole parameter whole again, with all values written to it meanwhile."""
    if hasattr(parameter, CODES):
        restore: Callable[[], None] = getattr(parameter, CODES).kept(parameter)
        return restore
    return partial(put_back, parameter, parameter.data)


def put_back(parameter: Any, values: Tensor) -> None:
    """Make the parameter whole, with these values."""
    parameter.data = values
    setattr(parameter, FETCHED, values.data_ptr())
    parameter.ds_status = ZeroParamStatus.AVAILABLE


class Fetch:
    """A group of parameters on their way; DeepSpeed's coordinator waits for it, once or more."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        if parameters[0].ds_zero_partition_world_size == 1:
            self._under_way: list[Transfer | Whole] = [Whole(parameters)]
            return
        alone = [[each] for each in parameters if each.ds_tensor.nbytes >= ALONE]
        small = [each for each in parameters if each.ds_tensor.nbytes < ALONE]
        self._under_way = [Transfer(each) for each in (*alone, small) if each]

    def wait(self, handle_dependency: bool = True) -> None:
        """Wait until every parameter of the group is whole."""
        while self._under_way:
            self._under_way.pop(0).land()


def launch(parameters: Iterable[Any], slices: Slices) -> Fetch:
    """Fetch parameters of which only slices are present, in the same order on every rank. Collective.

    Raises ValueError for a parameter whose `.data` was replaced.
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
    """Fetch the parameters that are not whole; return all fetches under way for them. Collective."""
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
    """Make DeepSpeed fetch these parameters by `launch`, for good: its own fetch assumes other slices.

    awaited: the fetches for which DeepSpeed's coordinator will wait, by parameter. settle: called before
    parameters are gathered outside the coordinator.
    """

    def all_gather_coalesced(group: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Fetch:
        return launch(group, slices)

    def all_gather(own: Any, param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        settle()
        fetches = gather(param_list or [own], slices)
        for each in param_list or [own]:
            awaited.pop(each, None)  # the caller may release it before the coordinator waits for it
        if async_op:
            return fetches
        for fetch in fetches:
            fetch.wait()
        for each in param_list or ():  # of GatheredParameters, whose caller may write
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
    """Call DeepSpeed's partition and note which slices it wrote; slices of codes are left to `codes`."""
    parameters, updated = param_list or [own], bool(options.get("has_been_updated"))
    plain = [each for each in parameters if not hasattr(each, CODES)]
    if plain:
        original(plain, **options)
    for each in plain if updated else ():
        setattr(each, EDITED, True)
    codes.partition([each for each in parameters if hasattr(each, CODES)], updated=updated)
    if updated:
        getattr(own, WRITTEN)(own.device)
