"""FP8 under the Hugging Face Trainer: health goes to the loggers of `report_to`.

Trainer and accelerate need nothing else of ours: they call `deepspeed.initialize` with the ds_config. Import
this module if you want the callback; nothing else in ds_fp8 imports transformers when it is loaded.
"""

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_fp8.compat import DeepSpeedEngine
from ds_fp8.seam.status import by_name, is_active, stats


class FP8StatsCallback(TrainerCallback):
    """Logs `ds_fp8.stats` after every measured step, through `Trainer.log`.

        trainer.add_callback(FP8StatsCallback(trainer))

    The keys are `fp8/gradient_underflow` and so on, with several param groups also
    `fp8/group0/gradient_underflow`.

    Args:
        trainer: the Trainer that gets the callback.

    Raises:
        ValueError: at the start of a training without FP8, or with fp8.stats.interval 0; it says why.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._logged: Mapping[str, Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self._trainer.model_wrapped
        if not is_active(engine):
            raise ValueError(f"FP8StatsCallback: received a training without FP8, {_why_off(engine)}")
        self._logged = stats(engine)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        measured = stats(self._trainer.model_wrapped)
        if measured is not None and measured is not self._logged:
            self._logged, should_log = measured, control.should_log
            self._trainer.log({f"fp8/{name}": value for name, value in by_name(measured).items()})
            control.should_log = should_log  # logging has cleared it, and the loss waits for it


def _why_off(engine: Any) -> str:
    if not isinstance(engine, DeepSpeedEngine):
        return (
            f"of a {type(engine).__name__} and not of a DeepSpeed engine: allowed is "
            "TrainingArguments(deepspeed=...), not dropped by ACCELERATE_USE_CPU or accelerate launch --cpu"
        )
    section = engine.config.get("fp8")
    if isinstance(section, Mapping) and section.get("enabled"):
        return (
            'whose "fp8" section was not read: allowed is a script launched through ds_fp8 (--module '
            "ds_fp8), or ds_fp8.register() before train()"
        )
    return 'allowed: a ds_config with "fp8": {"enabled": true}'
