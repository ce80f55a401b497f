"""The seam into DeepSpeed: what its engine does differently when the config enables FP8.

Each replacement calls the original whenever FP8 is off. `registration` puts them in place.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import comm as dist

import ds_fp8
from ds_fp8.compat import ZERO_OPTIMIZATION, loss_scaler_of, timers_of
from ds_fp8.config import ds_config, optimizer_params
from ds_fp8.config.refusals import as_json
from ds_fp8.config.section import FP8Config
from ds_fp8.seam.backward import divisor
from ds_fp8.seam.engine_checks import check_engine, is_sequence_parallel, ranks_of, settings_of
from ds_fp8.seam.status import accumulating, banner, describe, idle, is_active, write_events
from ds_fp8.zero_fp8.comm.agreement import agreed, check_agreement
from ds_fp8.zero_fp8.handlers.common import FP8ZeROOptimizer
from ds_fp8.zero_fp8.handlers.fetching import Offload
from ds_fp8.zero_fp8.handlers.stage3 import Stage3Optimizer
from ds_fp8.zero_fp8.handlers.stage12 import Stage12Optimizer
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.optimizer.replacement import replace_optimizer
from ds_fp8.zero_fp8.placement.parameters import shape_of
from ds_fp8.zero_fp8.products.chosen import choose
from ds_fp8.zero_fp8.products.shared_casts import share_in_forwards_of
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings, recipe_of
from ds_fp8.zero_fp8.weights.claims import make_plain

logger = logging.getLogger("ds_fp8")

Method = Callable[..., Any]
AGREED_KEYS = (
    "fp8",
    "bf16",
    "fp16",
    "zero_optimization",
    "data_types",
    "torch_autocast",
    "sequence_parallel_size",
    "optimizer",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
)


def _fp8(engine: Any) -> FP8Config | None:
    """The engine's section, if it is enabled."""
    config: FP8Config | None = getattr(engine._config, "ds_fp8", None)
    return config if config is not None and config.enabled else None


def configure_distributed_model(original: Method) -> Method:
    """DeepSpeedEngine._configure_distributed_model: first check that all ranks have the same model."""

    @functools.wraps(original)
    def method(self: Any, model: Any) -> None:
        if _fp8(self) is not None and ds_config.never_trains(self._config._param_dict):
            logger.info("%s", idle(self))
        lines = _config(self) if _fp8(self) is not None else ["fp8 off"]
        everywhere, device = dist.get_world_group(), torch.device(self.device)
        check_agreement("config or model", lines, device, everywhere)
        if _fp8(self) is not None:
            by_mpu = self.mpu is not None and not is_sequence_parallel(self.mpu)
            replicas = self.mpu.get_data_parallel_group() if by_mpu else everywhere
            check_agreement("config or model", _model(model), device, replicas)
        else:
            make_plain(model.parameters(), everywhere)
        original(self, model)

    return method


def _config(engine: Any) -> list[str]:
    """Facts that must be the same on all ranks, one line per key."""
    section = engine._config._param_dict
    size = f"tensor_parallel.autotp_size: {engine.autotp_size()}"
    return [*(f'ds_config "{key}": {as_json(section[key])}' for key in AGREED_KEYS if key in section), size]


def _model(model: torch.nn.Module) -> list[str]:
    """Facts that must be the same on ranks with the same part of the model, one line per parameter."""
    return [
        f"{name}: {list(shape_of(each))}, {each.dtype}, {'trained' if each.requires_grad else 'frozen'}"
        for name, each in model.named_parameters()
    ]


def scheduler_from_config(original: Method) -> Method:
    """DeepSpeedEngine._scheduler_from_config: torch's schedulers require a torch optimizer."""

    @functools.wraps(original)
    def method(self: Any, optimizer: Any) -> Any:
        return original(self, optimizer.optimizer if is_active(self) else optimizer)

    return method


def configure_basic_optimizer(original: Method) -> Method:
    """DeepSpeedEngine._configure_basic_optimizer: FP8AdamW from the "optimizer" section."""

    @functools.wraps(original)
    def method(self: Any, model_parameters: Any) -> Any:
        if _fp8(self) is None:
            return original(self, model_parameters)
        params = optimizer_params.optimizer_params(self.optimizer_params() or {})
        decoupled = self.optimizer_name() == "adamw" or params.adam_w_mode
        # The default of DeepSpeed's fused Adam is no decay; that of torch's AdamW is .01.
        default_decay = 0.01 if params.torch_adam and decoupled else 0.0
        return FP8AdamW(
            model_parameters,
            lr=params.lr,
            betas=(params.betas[0], params.betas[1]),
            eps=params.eps,
            weight_decay=default_decay if params.weight_decay is None else params.weight_decay,
            bias_correction=params.bias_correction,
            adam_w_mode=decoupled,
        )

    return method


def do_optimizer_sanity_check(original: Method) -> Method:
    """DeepSpeedEngine._do_optimizer_sanity_check: stage 1 and 2 alike go to the ZeRO handler."""

    @functools.wraps(original)
    def method(self: Any, basic_optimizer: Any) -> Any:
        if _fp8(self) is not None:
            ds_config.check_trained(self._config._param_dict)
            return ZERO_OPTIMIZATION
        logger.info('ds_fp8 %s: OFF, this engine\'s config has no enabled "fp8" section', ds_fp8.__version__)
        return original(self, basic_optimizer)

    return method


def zero_force_ds_cpu_optimizer(original: Method) -> Method:
    """DeepSpeedEngine.zero_force_ds_cpu_optimizer: with offload, too, any Adam of a client will do."""

    @functools.wraps(original)
    def method(self: Any) -> Any:
        return False if _fp8(self) is not None else original(self)

    return method


def configure_zero_optimizer(original: Method) -> Method:
    """DeepSpeedEngine._configure_zero_optimizer: our handler instead of DeepSpeed's."""

    @functools.wraps(original)
    def method(self: Any, optimizer: Any) -> Any:
        config = _fp8(self)
        if config is None:
            return original(self, optimizer)
        if optimizer is None and ds_config.may_be_frozen(self._config._param_dict):
            logger.info("%s", idle(self))
            return original(self, optimizer)
        ranks = dist.get_world_size(self.seq_data_parallel_group)
        recipe = recipe_of(config, accumulating=accumulating(self), ranks=ranks)
        check_engine(self, recipe)
        self.basic_optimizer = replace_optimizer(optimizer)
        self.optimizer = handler_of(self, recipe, settings_of(config, self))
        self.optimizer.join(functools.partial(members, self), functools.partial(divisor, self), optimizer)
        self.optimizer.parts.health.listeners.append(functools.partial(write_events, self))
        about = describe(self)
        logger.info("%s", banner(about))
        if about.get("products_instead"):
            logger.info("products %s: %s", about["products"], about["products_instead"])
        if self._config.ds_fp8_idle_keys:
            logger.info("without effect with fp8: %s", "; ".join(self._config.ds_fp8_idle_keys))
        return self.optimizer

    return method


def consolidated_16bit_state_dict(original: Method) -> Method:
    """DeepSpeedEngine._consolidated_16bit_state_dict: AutoTP leaves weights outside their buffers."""

    @functools.wraps(original)
    def method(self: Any, exclude_frozen_parameters: bool = False) -> Any:
        state = original(self, exclude_frozen_parameters)
        if is_active(self) and self.optimizer.ranks.peers is not None:
            self.optimizer.binding.require()
        return state

    return method


def zero3_consolidated(original: Method) -> Method:
    """DeepSpeedEngine._zero3_consolidated_16bit_state_dict: masters of FP8 weights, if files hold those."""

    @functools.wraps(original)
    def method(self: Any, exclude_frozen_parameters: bool = False) -> Any:
        state = original(self, exclude_frozen_parameters)
        if is_active(self):
            self.optimizer.saved.model_weights.put_masters(state)
        return state

    return method


def save_16bit_model(original: Method) -> Method:
    """DeepSpeedEngine.save_16bit_model: of a model that AutoTP has split the whole, not rank 0's part."""

    @functools.wraps(original)
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        if not is_active(self) or self.optimizer.ranks.peers is None:
            return original(self, *arguments, **options)
        if self.autotp_size() <= 1:
            raise ValueError(
                "save_16bit_model: received a model that an mpu has split, of which rank 0 would save its "
                "part, allowed: save_checkpoint, from which `ds_fp8 export` writes the whole model"
            )
        self.module_state_dict = functools.partial(_whole_state_dict, self)
        try:
            return original(self, *arguments, **options)
        finally:
            del self.module_state_dict

    return method


def _whole_state_dict(engine: Any, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
    """Weights and buffers of a model that AutoTP has split, on rank 0; None elsewhere. Collective."""
    whole: dict[str, Any] | None = engine._consolidated_16bit_state_dict()
    if whole is None:
        return None
    module = engine.module
    left_out = set()
    if exclude_frozen_parameters:
        named = module.named_parameters(remove_duplicate=False)
        left_out = {name for name, each in named if not each.requires_grad}
    # DeepSpeed gathers parameters only.
    state = {name: whole.get(name, value) for name, value in module.state_dict().items()}
    return {name: value for name, value in state.items() if name not in left_out}


def handler_of(engine: Any, recipe: Recipe, settings: ZeroSettings) -> FP8ZeROOptimizer:
    """The handler of the engine's ZeRO stage."""
    timers = timers_of(engine)
    what = (engine.basic_optimizer, engine.param_names, recipe, settings, ranks_of(engine))
    section, device = engine._config.ds_fp8, torch.device(engine.device)
    make_plain(engine.module.parameters(), engine.seq_data_parallel_group)
    choice = None
    if section.has_codes:
        choice = agreed(lambda: choose(engine.module, section, device), engine.seq_data_parallel_group)
        share_in_forwards_of(engine.module)
    if settings.stage == 3:
        offload = functools.partial(offload_of, engine, timers)
        return Stage3Optimizer(offload, *what, timers, loss_scaler_of(engine), choice=choice)
    return Stage12Optimizer(*what, timers, loss_scaler_of(engine), choice=choice)


def offload_of(engine: Any, timers: Any) -> Offload:
    """DeepSpeed's fetching, as the engine's config has it; the model's parameters are converted."""
    return Offload(
        module=engine.module,
        timers=timers,
        ds_config=engine.config,
        overlap_comm=engine.zero_overlap_comm(),
        prefetch_bucket_size=engine.zero_prefetch_bucket_size(),
        max_reuse_distance=engine.zero_max_reuse_distance(),
        max_live_parameters=engine.zero_max_live_parameters(),
        param_persistence_threshold=engine.zero_param_persistence_threshold(),
        model_persistence_threshold=engine.zero_model_persistence_threshold(),
        dp_process_group=engine.seq_data_parallel_group,
        mpu=engine.mpu,
        zero_module_granularity_threshold=engine.zero_module_granularity_threshold(),
        log_trace_cache_warnings=engine.zero_log_trace_cache_warnings(),
    )


def members(engine: Any) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of the engine's module as it is now."""
    named: Iterable[tuple[str, torch.nn.Parameter]] = engine.module.named_parameters()
    return named
