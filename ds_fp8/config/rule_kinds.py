"""The three kinds of keys of a ds_config when FP8 is on: honoured, without effect, refused.

`rules` says which key is of which kind. Under ZeRO 3 a key can be of another kind than under ZeRO 1 and 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_fp8.config.refusals import show


@dataclass(frozen=True)
class Honoured:
    """A key that does what DeepSpeed's documentation says."""


@dataclass(frozen=True)
class NoEffect:
    """A key that is accepted and logged; FP8 has no use for what it asks."""

    why: str
    harmless: tuple[Any, ...] = ()  # values that ask for nothing: they are not logged


@dataclass(frozen=True)
class Refused:
    """A key that is accepted only with a value that asks for nothing."""

    why: str
    harmless: tuple[Any, ...] = ()  # besides a section that says "enabled": false

    def allowed(self, value: Any) -> str:
        off = ['{"enabled": false}'] if isinstance(value, Mapping) and "enabled" in value else []
        return ", ".join(["the key left out", *off, *map(show, self.harmless)])


def asks_for_nothing(rule: NoEffect | Refused, value: Any) -> bool:
    """Whether the value asks for nothing, so that it is accepted without a message."""
    if not isinstance(value, Mapping):
        return any(value == each for each in rule.harmless)
    switched_off = value.get("enabled", value != {}) is False
    return switched_off or any(_contains(value, each) for each in rule.harmless if each)


def _contains(section: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """A key left out asks for nothing either."""
    return all(section.get(key, value) == value for key, value in part.items())


Rule = Honoured | NoEffect | Refused


@dataclass(frozen=True)
class ByStage:
    """A key whose rule depends on the stage of ZeRO."""

    below_3: Rule
    at_3: Rule


def rule_at(stage: int, rule: Rule | ByStage) -> Rule:
    """The rule of a key under this stage of ZeRO."""
    if not isinstance(rule, ByStage):
        return rule
    return rule.at_3 if stage == 3 else rule.below_3


def only_zero3(at_3: Rule) -> ByStage:
    """A rule for ZeRO 3; under ZeRO 1 and 2 the key has no effect."""
    harmless = at_3.harmless if isinstance(at_3, Refused) else ()
    return ByStage(NoEffect("a key of ZeRO 3", harmless), at_3)


def only_below_3(below_3: Rule) -> ByStage:
    """A rule for ZeRO 1 and 2; under ZeRO 3 the key has no effect."""
    return ByStage(below_3, NoEffect("a key of ZeRO 1 and 2"))
