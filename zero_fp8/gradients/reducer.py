"""A gradient's way: hook -> bucket -> exchange -> reduced gradient.

Autograd calls a hook when it has accumulated a parameter's gradient and the user's own hooks have seen it.
The gradient stays in `.grad` until every parameter of its bucket has one; then the bucket is quantised,
`.grad` is dropped, and the bucket travels. Buckets travel in one order on every rank, whatever order they
fill in (`schedule`); what backward did not fill goes at the epilogue, with zeros for parameters that this
rank did not use, so ranks that used different parameters neither wait for each other nor mix.

What the owners hold is the sum over all rounds since the last step or `drop`, as `.grad` is in PyTorch.

With overlap a bucket that has been launched lands when the one after the next is about to be launched, or at
the epilogue: two are under way at most, backward goes on meanwhile, and what lands is added in bucket order.
Without overlap it lands at once. Under ZeRO 3 nothing waits for a bucket in backward: one that has not
arrived lands later, and the next is launched later.

A gradient may arrive outside a round: after its bucket has left (weights tied under reentrant
checkpointing), or in a backward that exchanges nothing (towards some tensors, `inputs=`). It
waits (`pending`) and goes with the next round, or before the step in an extra exchange of buckets on which
the ranks agree. That a rank has such late gradients is part of the step's all-reduce, so no collective asks
after every backward, and a step that finds one is repeated (`complete`).
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from ds_fp8.zero_fp8.comm.collectives import max_over_ranks
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.exchange import Exchange
from ds_fp8.zero_fp8.gradients.packing import Packer
from ds_fp8.zero_fp8.gradients.pending import PendingGradients
from ds_fp8.zero_fp8.gradients.reduced import ReducedGradient
from ds_fp8.zero_fp8.gradients.schedule import Schedule
from ds_fp8.zero_fp8.health import Health
from ds_fp8.zero_fp8.placement.partition import Bucket
from ds_fp8.zero_fp8.placement.ranks import Fleet

logger = logging.getLogger("ds_fp8")

UNDER_WAY = 2  # buckets at most, with overlap


class Attempt(Protocol):
    """The outcome of a step that was tried."""

    @property
    def late(self) -> int:
        """Late gradients of all ranks; if there are some, the step was not taken."""

    @property
    def changed(self) -> int:
        """Ranks of which a bucket was not full at its place in the schedule."""


A = TypeVar("A", bound=Attempt)


class GradientReducer:
    """Brings every rank's gradients to the ranks that own them."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        pending: PendingGradients,
        reduced: Sequence[ReducedGradient],
        packer: Packer,
        schedule: Schedule,
        fleets: Mapping[Fleet, Nodes],
        health: Health,
        *,
        overlap: bool,
    ) -> None:
        """pending: of this rank; reduced: of each bucket."""
        self._buckets = buckets
        self._device = next(iter(pending.parameters.values())).device
        self.pending = pending
        self._reduced = reduced
        self._packer = packer
        self.schedule = schedule
        self._fleets = fleets
        self._health = health
        self._overlap = overlap
        self._most = UNDER_WAY if overlap else 1
        self._under_way: deque[tuple[ReducedGradient, Exchange]] = deque()  # oldest first
        self._expects_late = False  # a step has found late gradients; the next will have them too
        self._listens = False
        self._promotion_logged = False
        self.drop()

    def listen(self) -> None:
        """Reduce buckets while backward runs (ZeRO 2 and 3); again after a cast."""
        self._listens = True
        self.schedule.listen(self.pending.parameters, self._launch_what_may_leave)

    def let_go(self) -> None:
        """Remove the hooks: parameters are as they were without a reducer."""
        self.schedule.remove()
        self.pending.let_go()

    def drop(self) -> None:
        """Drop everything that has been reduced or is on its way."""
        if self._must_not_wait:
            self._catch_up()
        while self._under_way:
            self._under_way.popleft()[1].abandon()
        for reduced in self._reduced:
            reduced.forget()
        self._health.forget()
        self.pending.drop()
        self.backwards = 0  # backwards that have ended since then
        self.schedule.changed = False
        self.rounds = 0  # that have ended since then
        self._start_round()

    def _catch_up(self) -> None:
        """After a backward that raised: take part in the collectives that other ranks have launched.

        The ranks agree in the group of fetches, of which all have launched the same: how many buckets a rank
        has launched is a matter of time.
        """
        self.schedule.open = False
        launched = torch.tensor(self._next, device=self._device)
        for nodes in self._fleets.values():
            max_over_ranks(launched, nodes.all_ranks)
        while self._next < int(launched):
            self._launch_next()
        self._land()

    def begin(self) -> None:
        """Called when a backward begins: buckets may be sent."""
        self.schedule.renew()

    @property
    def active(self) -> bool:
        """Whether a backward has begun and has not ended."""
        return self.schedule.open

    def finish(self) -> None:
        """End a round, on every rank: launch what is left, and let everything land."""
        self.schedule.open = False
        while self._next < len(self._buckets):
            self._launch_next()
        self._land()
        self.schedule.end_round()
        self.rounds += 1
        self._start_round()

    def end(self) -> None:
        """After a backward. `.grad` is then None, except under ZeRO 1 and for late gradients."""
        self.schedule.open = False
        self.backwards += 1
        if self._listens:
            self.pending.hold()
        else:
            self.pending.keep()

    def bring(self) -> None:
        """Send gradients that are still in `.grad`; on every rank or none."""
        if self.rounds:
            self._send_late()
        else:
            self.finish()

    def complete(self, attempt: Callable[[], A]) -> A:
        """Try a step; try it again, with the late gradients, if a rank has some."""
        if self._expects_late or not self.rounds:
            self.bring()
        tried = attempt()
        if tried.late:
            self._expects_late = True
            self._send_late()
            tried = attempt()
        if tried.changed:
            self.schedule.forget()
        return tried

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients for the next step; the same on ranks that ran the same backwards."""
        return self.rounds > 0 or self.backwards > 0 or self.pending.late > 0

    def _send_late(self) -> None:
        """The extra exchange of late gradients; on every rank or none."""
        for index in self._late_buckets():
            self._launch(index)
        self._land()

    def _start_round(self) -> None:
        self._next = 0  # position of the next bucket in the order
        self.schedule.start_round()

    def _launch_what_may_leave(self) -> None:
        while self._next < len(self._buckets) and self.schedule.may_leave(self.schedule.order[self._next]):
            if self._must_not_wait and not self._has_room():
                return
            self._launch_next()

    @property
    def _must_not_wait(self) -> bool:
        """Whether waiting could hold up a collective of backward's own."""
        return self.active and self.schedule.patient

    def _has_room(self) -> bool:
        """Whether a bucket can be launched without waiting for those under way."""
        self._move_on()
        return len(self._under_way) < self._most or self._under_way[0][1].done

    def _move_on(self) -> None:
        """Advance exchanges that have arrived, oldest first: second hops have one order, too."""
        for _, exchange in self._under_way:
            if not exchange.progress():
                return

    def _launch_next(self) -> None:
        self._launch(self.schedule.order[self._next])
        self._next += 1

    def _launch(self, index: int) -> None:
        """Launch a bucket, and advance those that were launched before it."""
        self._land(leave=self._most - 1)
        if self._must_not_wait:
            self._move_on()
        else:
            for _, earlier in self._under_way:
                earlier.advance()
        bucket, reduced = self._buckets[index], self._reduced[index]
        exchange = self._packer.send(bucket, self.pending.take(bucket), self._health.by_bucket[index])
        self._under_way.append((reduced, exchange))
        if not self._overlap and (not self._must_not_wait or (exchange.progress() and exchange.done)):
            self._land()

    def _land(self, *, leave: int = 0) -> None:
        """Land buckets, oldest first, until `leave` are under way."""
        while len(self._under_way) > leave:
            reduced, exchange = self._under_way.popleft()
            arrived = exchange.land()
            if reduced.must_promote:
                self._log_promotion(reduced)
                reduced.promote()
            reduced.receive(arrived)

    def _late_buckets(self) -> list[int]:
        """Buckets that on any rank of their fleet hold a gradient although they have travelled."""
        waiting = [self.pending.in_bucket(bucket) for bucket in self._buckets]
        late = torch.tensor(waiting, dtype=torch.uint8, device=self._device)
        for nodes in self._fleets.values():
            max_over_ranks(late, nodes.group)
        return [int(index) for index in late.nonzero()]

    def _log_promotion(self, reduced: ReducedGradient) -> None:
        first = next(iter(self._fleets.values()))
        if not self._promotion_logged and first.rank == 0:
            logger.info(
                "fp8.gradients.accum_dtype was left out and a second micro-step arrived: "
                "the reduced gradient turns from %s to fp32",
                reduced.blocks.format.name,
            )
        self._promotion_logged = True
