"""Compare the model with the trained parameters, and log each difference once, by name.

The trained parameters are those that required a gradient when `deepspeed.initialize` was called. A parameter
that requires a gradient later (unfreezing, PEFT's set_adapter), or comes with an exchanged module, has a
gradient that no optimizer takes; a trained parameter that has left the model is no longer trained.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch.nn import Parameter

from ds_fp8.config.refusals import naming

logger = logging.getLogger("ds_fp8")

THOROUGH = 16  # steps between two walks through the model, unless one is needed earlier

Members = Callable[[], Iterable[tuple[str, Parameter]]]


class Roster:
    """Compares the model with the parameters that are trained.

    members: names and parameters of the model as it is now.
    """

    def __init__(self, members: Members, trained: Mapping[int, Parameter], names: Mapping[int, str]) -> None:
        self._members = members
        self._trained = {id(parameter): names[index] for index, parameter in trained.items()}
        self._required = [(each, each.requires_grad) for _, each in members()]  # requires_grad at first
        self._others = [each for each in members() if id(each[1]) not in self._trained]
        self._said: set[tuple[str, str]] = set()
        self._steps = 0

    def warn(self, *, all_had_gradients: bool) -> None:
        """Log new differences after a step. Walks through the model if it may have changed."""
        self._steps += 1
        thorough = not all_had_gradients or self._steps % THOROUGH == 0
        if thorough or any(parameter.grad is not None for _, parameter in self._others):
            for finding, found in self._findings():
                unnamed = [name for name in found if (finding, name) not in self._said]
                self._said.update((finding, name) for name in unnamed)
                if unnamed:
                    logger.warning("%s: %s", finding, naming(unnamed))

    @contextmanager
    def as_initialized(self) -> Iterator[None]:
        """Restore every requires_grad to its first value until the `with` ends.

        DeepSpeed saves and loads frozen parameters apart from trained ones.
        """
        now = [(each, each.requires_grad) for each, _ in self._required]
        try:
            for each, required in self._required:
                each.requires_grad_(required)
            yield
        finally:
            for each, required in now:
                each.requires_grad_(required)

    def causes(self) -> str:
        """Return the possible causes of a step without a gradient, as the end of a sentence."""
        found = [f"{finding}: {naming(names)}" for finding, names in self._findings() if names]
        return "; ".join(found) or (
            "did the loss not depend on them, or were the gradients set to None after backward?"
        )

    def _findings(self) -> list[tuple[str, list[str]]]:
        members = list(self._members())
        present = {id(parameter) for _, parameter in members}
        homeless = [
            name
            for name, parameter in members
            if parameter.grad is not None and id(parameter) not in self._trained
        ]
        left = [name for key, name in self._trained.items() if key not in present]
        return [
            (
                "gradients that no optimizer takes, since their parameters were not trained when "
                "deepspeed.initialize was called (unfreeze, add and exchange modules before it)",
                homeless,
            ),
            (
                "trained parameters that are no longer in the model, as after an exchange of a module or "
                "load_state_dict(assign=True) (do that before deepspeed.initialize)",
                left,
            ),
        ]
