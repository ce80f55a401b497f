"""One step: verdict -> sweep -> gather, and what follows once the host knows whether the device took it.

Everything is launched before the host knows: nothing waits between the phases.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from ds_fp8.config.refusals import naming
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.products.linear import never_used
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings
from ds_fp8.zero_fp8.verdict import Counted, Verdict, non_finite_parameters
from ds_fp8.zero_fp8.weights.store import Gathers
from ds_fp8.zero_fp8.weights.tiled import matrices_of

logger = logging.getLogger("ds_fp8")


class Stepper:
    """Steps all buckets of a run."""

    def __init__(
        self,
        parts: Parts,
        parameters: Mapping[int, Parameter],
        optimizer: FP8AdamW,
        recipe: Recipe,
        settings: ZeroSettings,
        ranks: Ranks,
        timers: Callable[[str], Any],
    ) -> None:
        """timers: DeepSpeed's, by name."""
        self._parts = parts
        self._parameters = parameters
        self._optimizer = optimizer
        self._clamped = recipe.clamped
        self._settings = settings
        self._ranks = ranks
        self._timers = timers
        self.consecutive_skips = 0
        parts.health.prepare(optimizer.steps + 1)

    def attempt(self, objections: Sequence[str | None], edited: int, gradient_scale: float) -> Verdict:
        """Launch a step, which the device takes or not, and learn which.

        1. Verdict: one all-reduce of the norm's parts; the device knows the clip factor and whether to step.
        2. Sweep: each bucket's states and this rank's rows of the weights, or nothing.
        3. Gather: each bucket's weights to every rank, while the next bucket is swept.
        """
        with self._timed("optimizer_gradients"):
            verdict = self._verdict(objections, edited, gradient_scale)
        self._sweep_and_gather(verdict)
        return verdict.read()

    def _verdict(self, objections: Sequence[str | None], edited: int, gradient_scale: float) -> Verdict:
        reducer = self._parts.reducer
        return Verdict(
            self._parts.reduced,
            self._parts.counted,
            own=Counted(
                received=reducer.pending.received,
                late=reducer.pending.late,
                objections=sum(each is not None for each in objections),
                edited=edited,
                changed=reducer.schedule.changed,
            ),
            gradient_scale=gradient_scale,
            clip=self._settings.gradient_clipping,
            ranks=self._ranks,
        )

    def _sweep_and_gather(self, verdict: Verdict) -> None:
        parts = self._parts
        parts.health.begin_sweep()
        scalars = self._optimizer.scalars(clamp=self._clamped)
        gathers = Gathers()
        for bucket, reduced, shard, weights in parts.by_bucket():
            with self._timed("optimizer_step"):
                shard.sweep(reduced.blocks, weights, scalars[bucket.group], verdict.control)
            with self._timed("optimizer_allgather"):
                gathers.launch(weights, parts.nodes_of(bucket), verdict.control)
        with self._timed("optimizer_allgather"):
            gathers.wait()

    def settle(self, *, stepped: bool) -> None:
        """Count the step, or the skip, as the device has decided."""
        parts, optimizer = self._parts, self._optimizer
        if stepped:
            parts.gradient_scales.settle()
        step = optimizer.steps + 1
        parts.health.collect(step, stepped=stepped, ranks=self._ranks, more=parts.gradient_scales.stats)
        if stepped:
            self.consecutive_skips = 0
            optimizer.advance(clamp=self._clamped)
            # So that a backward over a graph of before the step is refused, as it is in PyTorch.
            torch.autograd.graph.increment_version(self._parameters.values())
            parts.health.prepare(optimizer.steps + 1)
        else:
            self.consecutive_skips += 1

    def report_skip(self, names: Mapping[int, str]) -> None:
        """Log whose gradient was not finite. Raises RuntimeError after too many skips in a row."""
        parts = self._parts
        owned = [(reduced, shard.pieces) for _, reduced, shard, _ in parts.by_bucket()]
        culprits = non_finite_parameters(owned, names, self._ranks, parts.residence.device)
        if self._ranks.rank == 0:
            logger.warning("step skipped: the gradient of %s is not finite", culprits)
            passed_by = never_used(matrices_of(parts.weights))
            if passed_by:
                logger.warning(
                    "%s: no product has multiplied these FP8 weights. What goes around the parameter, as a "
                    "jagged nested tensor or torch.jit.script, reads NaN: weights.exclude keeps them in BF16",
                    naming(passed_by),
                )
        if self.consecutive_skips >= self._settings.max_consecutive_skips:
            raise RuntimeError(
                f"{self.consecutive_skips} steps skipped in a row, as many as fp8.max_consecutive_skips "
                f"allows: the gradient of {culprits} is not finite"
            )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Run one of DeepSpeed's timers, stopped on every way out."""
        timer = self._timers(name)
        timer.start()
        try:
            yield
        finally:
            timer.stop()
