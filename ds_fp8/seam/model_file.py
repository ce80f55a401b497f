"""DeepSpeed's model file: weights, scheduler, counters, read once and checked before DeepSpeed takes it.

DeepSpeed writes the module, then the scheduler, then its counters, and looks at each only when it gets
there. What it would stumble over half-way is refused here. What has been checked is what DeepSpeed is
given: it does not read the file again.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from torch import Tensor, nn

from ds_fp8.seam.status import is_active
from ds_fp8.zero_fp8.checkpoint.files import Entry, in_memory
from ds_fp8.zero_fp8.checkpoint.foreign.stock_model import named
from ds_fp8.zero_fp8.checkpoint.manifest import Manifest
from ds_fp8.zero_fp8.checkpoint.model_files import FRAGMENTS, ModelFile, listed, shapes
from ds_fp8.zero_fp8.checkpoint.reader import is_extra_state
from ds_fp8.zero_fp8.placement.parameters import numel_of, shape_of

Method = Callable[..., Any]
KEEPS_SCHEDULER = "load_lr_scheduler_states=False keeps this run's"


@dataclass(frozen=True)
class Wanted:
    """The arguments of load_checkpoint that decide what must fit."""

    module_strict: bool
    states: bool
    scheduler: bool
    counters: bool
    custom: bool  # the caller loads the module

    @staticmethod
    def by(options: Mapping[str, Any]) -> "Wanted":
        """What to load, as the options of load_checkpoint say."""
        everything = not options["load_module_only"]
        return Wanted(
            module_strict=options["load_module_strict"],
            states=options["load_optimizer_states"] and everything,
            scheduler=options["load_lr_scheduler_states"] and everything,
            counters=everything,
            custom=bool(options["custom_load_fn"]),  # as DeepSpeed asks
        )


def read(engine: Any, folder: Path, manifest: Manifest | None = None) -> ModelFile:
    """The model file of a tag, as its manifest names it; if it has none, as DeepSpeed would.

    Raises ValueError if there is none, or several where one is expected.
    """
    if manifest is None:
        return named(folder, universal=engine.load_universal_checkpoint())
    ranks = engine.optimizer.ranks
    return listed(folder, manifest, ranks.part, dist.get_rank(ranks.group))


def check(engine: Any, file: ModelFile, wanted: Wanted) -> None:
    """Refuse, by a ValueError, a model file that this engine cannot load to the end."""
    universal = engine.load_universal_checkpoint()
    module = file.at("module")
    module.of(dict)
    if not universal:  # its weights come from other files
        if file.sliced is None:
            _check_frozen(engine, file)
        if not wanted.custom:
            check_module(engine, file.path, file.shapes, strict=wanted.module_strict)
            _check_kinds(engine.module, module)
    _check_counters(file, wanted)
    for key, part in _stateful(engine, wanted).items():
        _check_alike(file, key, part)
    if wanted.scheduler and engine.lr_scheduler is not None:
        _try_scheduler(engine.lr_scheduler, engine.optimizer.param_groups, file.at("lr_scheduler"))
    if not wanted.custom:
        _try_extra_states(engine.module, module)


def check_module(engine: Any, path: Path, saved: Mapping[str, list[int] | None], *, strict: bool) -> None:
    """Compare names and, of parameters and buffers, shapes with what a checkpoint holds."""
    state = shapes_of(engine.module, engine.module.state_dict(keep_vars=True))
    members = _members(engine.module)
    missing, extra = sorted(state.keys() - saved.keys()), sorted(saved.keys() - state.keys(), key=str)
    if strict and (missing or extra):
        raise ValueError(
            f"{path}: of another model: without {missing[:3]}, with {extra[:3]} (of {len(missing)} and "
            f"{len(extra)}); load_module_strict=False takes what both have"
        )
    for name in state.keys() & saved.keys() & members:
        if state[name] != saved[name]:
            raise ValueError(f"{path}: shape of {name}: received {saved[name]}, expected {state[name]}")


def shapes_of(module: nn.Module, state: Mapping[str, Any]) -> dict[str, list[int] | None]:
    """As `shapes`; of parameters those that they have when they are whole."""
    whole = {name: list(shape_of(each)) for name, each in module.named_parameters(remove_duplicate=False)}
    return {name: whole.get(name, shape) for name, shape in shapes(state).items()}


def _members(module: nn.Module) -> set[str]:
    """Names of parameters and buffers: whatever else is in a state_dict has its own type and length."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name for name, _ in [*parameters, *buffers]}


def _check_kinds(module: nn.Module, saved: Entry) -> None:
    """Weights are not filled from integers, nor the other way."""
    members = _members(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in members and name in saved:
            check_kind(saved.at(name), tensor)


def check_tensor(saved: Entry, ours: Tensor) -> None:
    """Refuse, by a ValueError, what a copy into a parameter or a buffer would not hold."""
    if saved.of(Tensor).shape != shape_of(ours):
        raise saved.refusal(f"shape {list(shape_of(ours))}")
    check_kind(saved, ours)


def check_kind(saved: Entry, ours: Tensor) -> None:
    """Refuse, by a ValueError, integers in place of floats, and the other way."""
    if saved.of(Tensor).is_floating_point() != ours.is_floating_point():
        raise saved.refusal(f"a tensor of {ours.dtype}")


def _check_frozen(engine: Any, file: Entry) -> None:
    """Frozen parameters are copied from an entry of their own, if there is one."""
    if FRAGMENTS not in file or file.value[FRAGMENTS] is None:
        return
    saved = file.at(FRAGMENTS)
    names = frozen_with_values(engine)
    missing = sorted(names - saved.of(dict).keys())
    if missing:
        raise ValueError(f"{file.path}: {missing[:3]}: frozen in this run, trained in the checkpoint")
    for name, parameter in engine.module.named_parameters():
        if name in names:
            check_tensor(saved.at(name), parameter)


def frozen(engine: Any) -> set[str]:
    """Names of the parameters that the optimizer does not train, empty ones among them."""
    trained = set(engine.optimizer.parameter_names.values())
    return {name for name, _ in engine.module.named_parameters()} - trained


def frozen_with_values(engine: Any) -> set[str]:
    """`frozen` without empty parameters, which DeepSpeed before 0.19.8 may not have saved."""
    return {name for name, each in engine.module.named_parameters() if numel_of(each)} & frozen(engine)


def _check_counters(file: ModelFile, wanted: Wanted) -> None:
    file.at("dp_world_size").count()
    if wanted.counters:
        for key in ("global_steps", "skipped_steps"):
            if not isinstance(file.at(key).value, int):
                raise file.at(key).refusal("a whole number")
            file.at(key).count()
        if "global_samples" in file:
            file.at("global_samples").count()  # 12.0 if ranks share sequences
    if wanted.counters or "mp_world_size" in file:
        expected = len(file.paths)
        if file.at("mp_world_size").count() != expected:
            raise file.at("mp_world_size").refusal(f"{expected}, as many as model files")


def _stateful(engine: Any, wanted: Wanted) -> dict[str, Any]:
    """Objects that DeepSpeed restores beside module, optimizer and counters, by their key in the file."""
    parts: dict[str, Any] = {}
    if wanted.scheduler:
        parts["lr_scheduler"] = engine.lr_scheduler
    if wanted.counters and engine.random_ltd_enabled():
        parts["random_ltd"] = engine.random_ltd_scheduler
    if wanted.counters and engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        parts["data_sampler"] = engine.training_dataloader.data_sampler
    return {key: part for key, part in parts.items() if part is not None}


def _check_alike(file: Entry, key: str, part: Any) -> None:
    """Check that a saved part has the values that it saves in this run: the same kinds, and numbers."""
    if key not in file or file.value[key] is None:
        hint = f": {KEEPS_SCHEDULER}" if key == "lr_scheduler" else ""
        raise ValueError(f"{file.path}: no {key.removeprefix('lr_')} was saved, and this run has one{hint}")
    ours = part.state_dict()
    if not isinstance(ours, dict):
        return
    saved = file.at(key)
    saved.of(dict)
    for name, value in ours.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            saved.at(name).number()
        elif value is not None and saved.value.get(name) is not None:
            kinds = (list, tuple) if isinstance(value, list | tuple) else (type(value),)
            saved.at(name).of(*kinds)


def _try_scheduler(scheduler: Any, groups: list[dict[str, Any]], saved: Entry) -> None:
    """Whether a scheduler takes a state, by giving it; then it has its own again."""
    before, attributes = copy.deepcopy(scheduler.state_dict()), dict(vars(scheduler))
    kept = [dict(group) for group in groups]
    try:
        scheduler.load_state_dict(copy.deepcopy(saved.value))
    except Exception as error:
        expected = f"what {type(scheduler).__name__}.load_state_dict takes"
        raise saved.refusal(f"{expected} ({type(error).__name__}: {error}): {KEEPS_SCHEDULER}") from error
    finally:
        scheduler.load_state_dict(before)
        vars(scheduler).clear()
        vars(scheduler).update(attributes)
        for group, values in zip(groups, kept, strict=True):
            group.clear()
            group.update(values)


def _try_extra_states(module: nn.Module, saved: Entry) -> None:
    """Whether modules take their extra state, by giving it; then they have their own again."""
    for name, part in module.named_modules():
        key = f"{name}._extra_state" if name else "_extra_state"
        if type(part).set_extra_state is nn.Module.set_extra_state or key not in saved:
            continue
        before = copy.deepcopy(part.get_extra_state())
        try:
            part.set_extra_state(copy.deepcopy(saved.value[key]))
        except Exception as error:
            expected = f"what {type(part).__name__}.set_extra_state takes ({type(error).__name__}: {error})"
            raise saved.at(key).refusal(expected) from error
        finally:
            with suppress(Exception):  # a module that has seen nothing may not take back what it gave
                part.set_extra_state(before)


def module_state_dict(original: Method) -> Method:
    """DeepSpeedEngine.module_state_dict: FP8 weights as plain BF16 tensors in host memory."""

    @functools.wraps(original)
    def method(
        self: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        if keep_vars or not is_active(self) or not self.optimizer.saved.model_weights.exist:
            return original(self, destination, prefix, keep_vars, exclude_frozen_parameters)
        state = original(self, destination, prefix, True, exclude_frozen_parameters)
        self.optimizer.saved.model_weights.make_plain(state, writes=self.save_non_zero_checkpoint)
        return state

    return method


@contextmanager
def given_to(engine: Any, file: ModelFile, *, weights: bool) -> Iterator[None]:
    """DeepSpeed's reading: of this file, that is open already; nor does it gather weights, which we do.

    weights: whether it takes parameters from the file; else each is given its own values.
    """
    original, handler = engine.checkpoint_engine, engine.optimizer
    names = [str(path) for path in file.paths]
    engine.checkpoint_engine = _Opened(file, {} if weights else _own(engine.module))
    engine._get_all_ckpt_names = lambda *_: names
    handler.refresh_fp32_params = lambda: None
    try:
        yield
    finally:
        engine.checkpoint_engine = original
        del engine._get_all_ckpt_names, handler.refresh_fp32_params


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are, by every name they have."""
    return dict(module.named_parameters(remove_duplicate=False))


class _Opened:
    """A checkpoint engine that reads one file, which has been read."""

    def __init__(self, file: Entry, instead: Mapping[str, Tensor]) -> None:
        """instead: what is given in place of the file's parameters."""
        self._file = file
        self._instead = instead

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Only weights stay mapped, which are copied into parameters; the rest may be kept."""
        module = self._file.value["module"]
        rest = {key: value for key, value in self._file.value.items() if key != "module"}
        if self._instead:
            rest.pop(FRAGMENTS, None)
        extra = {name: value for name, value in module.items() if is_extra_state(str(name))}
        ours = {name: each for name, each in self._instead.items() if name in module}
        return {**in_memory(rest), "module": {**module, **in_memory(extra), **ours}}
