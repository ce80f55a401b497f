"""Sections of the "fp8" section beside those of formats, and what all of them have in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProductsSection(Strict):
    """Formats of matrix products."""

    dtype: Literal["e4m3", "bf16"] | None = None
    """Of their operands, with weights in e4m3; left out: e4m3 where the device has it, else bf16."""


class OffloadSection(Strict):
    """How states in host memory are stepped."""

    executor: Literal["auto", "stream", "host"] = "auto"
    """stream: they visit the device; host: gradients come to them; auto: what is faster here."""
    threads: int | None = Field(default=None, ge=1)
    """Of the host's sweep; left out: as many as there are cores for a rank."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the states that lives in host memory, by rows."""


class CheckpointSection(Strict):
    """What checkpoints hold and which are loaded."""

    fp32_master: bool = True
    allow_conversion: bool = False
    weights: Literal["codes", "masters"] = "codes"
    """What model files hold of weights in e4m3: values of codes, as the model computes, or masters."""


class StatsSection(Strict):
    """How often health is measured."""

    interval: int = Field(default=0, ge=0)
