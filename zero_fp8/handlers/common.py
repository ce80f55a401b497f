"""FP8ZeROOptimizer: the optimizer that DeepSpeed's engine calls, at any ZeRO stage.

The parts do the work (`wiring`); this module implements the names that the engine calls. It subclasses
DeepSpeed's `ZeROOptimizer` base and not its 3,000-line handlers, whose methods change signature with every
release.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn import Parameter

from ds_fp8.compat import ZeROOptimizer
from ds_fp8.zero_fp8.checkpoint.contracts import Restorable
from ds_fp8.zero_fp8.comm.agreement import first_objection
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.gradients.backwards import ArrivalHooks, covers_whole_graph, in_backward
from ds_fp8.zero_fp8.handlers.full_tensors import FullTensors
from ds_fp8.zero_fp8.handlers.master_views import MasterViews, as_groups
from ds_fp8.zero_fp8.handlers.roster import Members, Roster
from ds_fp8.zero_fp8.handlers.saved_states import SavedStates
from ds_fp8.zero_fp8.handlers.take_over import take_over
from ds_fp8.zero_fp8.offload.moves import MovableStates
from ds_fp8.zero_fp8.optimizer.client import Client
from ds_fp8.zero_fp8.optimizer.facade import Facade
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.products.chosen import Choice
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings
from ds_fp8.zero_fp8.step import Stepper
from ds_fp8.zero_fp8.verdict import Verdict
from ds_fp8.zero_fp8.weights.binding import Binding
from ds_fp8.zero_fp8.weights.claims import claim, release

logger = logging.getLogger("ds_fp8")


class FP8ZeROOptimizer(Facade, MovableStates, ZeROOptimizer):
    """ZeRO over FP8 gradients, FP8 communication and low-precision Adam states."""

    custom_loss_scaler = False
    external_loss_scale = None
    torch_autocast_gradscaler = None
    master_views: MasterViews = staticmethod(as_groups)

    def __init__(
        self,
        optimizer: FP8AdamW,
        names: Mapping[Parameter, str],
        recipe: Recipe,
        settings: ZeroSettings,
        ranks: Ranks,
        timers: Any,
        loss_scaler: Any,
        choice: Choice | None = None,
    ) -> None:
        """Take over the parameters: masters are made from them, and they become views of buffers.

        names: every parameter of the model, in the model's order, with its name; the order numbers
        the parameters and so must be the same on every rank. timers, loss_scaler: DeepSpeed's.
        choice: of matrices that become codes.
        Raises ValueError if the ranks' parameters or settings differ, RuntimeError on a GPU without a
        usable kernel.
        """
        super().__init__()
        self.loss_scaler = loss_scaler
        self.optimizer = optimizer
        self.recipe, self.settings = recipe, settings
        self.ranks, self.dp_process_group = ranks, ranks.group
        self.overflow = self._has_let_go = False
        self._global_grad_norm: float | None = None
        self.roster: Roster | None = None
        self.arrivals: ArrivalHooks | None = None
        self.client: Client | None = None

        run = (recipe, settings, ranks)
        self.parameters, self.parts = take_over(names, optimizer.param_groups, *run, self._prepare, choice)
        self.parameter_names = {index: names[each] for index, each in self.parameters.items()}
        self.gradients = self.parts.reducer
        self.stepper = Stepper(self.parts, self.parameters, optimizer, *run, timers)
        named = (self.parameters, self.parameter_names)
        self.saved = SavedStates(self.parts, *named, optimizer, loss_scaler, self.master_views, *run[1:])
        self.binding = Binding(self.parts.weights, self.parts.shards, *named, on_return=self._listen)
        self.saved.masters_from_weights()
        self._listen()
        self.full_tensors = FullTensors(
            self.parts,
            ranks.group,
            self._gradient_scale,
            on_foreign_state=self._states_were_set,
            on_reading_gradients=self._bring_gradients,
            on_access=self.binding.require,
        )
        self._bind()

    def _prepare(self) -> None:
        """Prepare parameters after the ranks have agreed and before anything is built."""

    def _bind(self) -> None:
        """Register with these parameters as the object that DeepSpeed's utilities call."""
        claim(self.parameters.values(), self)
        self.full_tensors.attach(self.parameters)

    def leave_masters(self) -> None:
        """Leave the masters of FP8 weights to an engine that follows."""
        self.saved.model_weights.leave(self.parameters)

    def _unbind(self) -> None:
        self.leave_masters()
        self.full_tensors.detach(self.parameters)
        release(self.parameters.values())

    def _listen(self) -> None:
        """Reduce gradients while backward runs, if this run does so; call again after a cast."""
        if self.parts.listens:
            self.gradients.listen()

    def join(self, members: Members, divisor: Callable[[], float], client: Any) -> None:
        """Join an engine: members of its model, divisor of other backwards, the optimizer given."""
        self.roster = Roster(members, self.parameters, self.parameter_names)
        self.arrivals = ArrivalHooks(self.parameters, divisor)
        self.client = Client(client, self.optimizer, self.zero_grad)

    def give_up(self) -> None:
        """Stop training, because another engine trains these parameters from now on."""
        logger.warning("another engine has taken over parameters of an FP8 engine, which stops training")
        self.binding.give_up()
        self._let_go()

    def _let_go(self) -> None:
        """Release the parameters, once, so that another engine can have them."""
        if not self._has_let_go:
            self._has_let_go = True
            self._unbind()
            self.gradients.let_go()
            if self.arrivals:
                self.arrivals.remove()
            if self.client:
                self.client.let_go()

    def destroy(self) -> None:
        """Release the parameters, which keep their weights, and free the states."""
        self._let_go()
        self._forget_moves()
        self.parts.close()

    # Backward

    def clear_backward_seen_flag(self) -> None:
        """Drop gradients of a backward that raised half-way. Called at every forward outside a backward."""
        if self.in_backward and not in_backward():
            logger.warning("the last backward did not finish; all gradients since the last step are dropped")
            self.zero_grad()

    @property
    def in_backward(self) -> bool:
        """Whether a backward has begun and not ended."""
        return self.gradients.active

    def opens_backward(self) -> bool:
        """Whether a gradient that has reached an output of the model begins a backward."""
        return not self.in_backward and (not in_backward() or covers_whole_graph())

    def enter_backward(self) -> None:
        """Begin a backward; reset the depth that a backward that raised half-way has left."""
        self._backward_active_depth = 0
        super().clear_backward_seen_flag()
        super().enter_backward()
        self.gradients.begin()

    def exit_backward(self) -> None:
        super().exit_backward()
        self.gradients.end()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Reduce the gradients that backward has not sent yet: ZeRO 2 and 3, after every micro-step."""
        self.gradients.finish()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Do nothing if the caller owns the boundary: every backward has reduced already (ZeRO 2 and 3)."""

    def needs_scaler(self) -> bool:
        """Whether a loss must be scaled before its backward, by a fixed scale as well."""
        return super().needs_scaler() or self.loss_scale != 1

    # Step

    def step(self, closure: Any = None) -> None:
        """Take one Adam step on every shard, or none: then every byte of state stays as it was.

        Raises RuntimeError without a gradient, after a backward that raised half-way, and after
        `max_consecutive_skips` skips in a row; ValueError, on every rank, if the shape or dtype of any
        rank's weight or gradient has changed.
        """
        self.binding.check_owned()
        if self.client:
            self.client.follow()
        try:
            self._refuse_half_a_backward()
            objection = self._bring_home()
            verdict = self.gradients.complete(lambda: self._attempt(objection))
            if verdict.objections:
                objection = objection or self.gradients.pending.objection(self.parameter_names)
                raise ValueError(first_objection(objection, self.ranks))
            self._settle(verdict)
            if verdict.edited:
                self.binding.log_edits(self.ranks)
        finally:
            self.gradients.drop()

    def _bring_home(self) -> str | None:
        """Bring weights to the memory that the sweep writes; return an objection to changes made to them."""
        return self.binding.bring_home() or self.parts.frozen.bring_home()

    def _refuse_half_a_backward(self) -> None:
        if self.in_backward:
            self.zero_grad()
            raise RuntimeError(
                "step() after a backward that did not finish: all gradients since the last step "
                "are dropped; call engine.backward(loss) before engine.step()"
            )

    def _attempt(self, objection: str | None) -> Verdict:
        objections = [objection, self.gradients.pending.objection(self.parameter_names)]
        return self.stepper.attempt(objections, self.binding.unlogged, self._gradient_scale())

    def _settle(self, verdict: Verdict) -> None:
        """Count the step or the skip that the device has decided."""
        if not verdict.received:
            causes = self.roster.causes() if self.roster else "no engine"
            raise RuntimeError(
                "step() without a gradient: no parameter that the optimizer trains received one on any rank: "
                f"call engine.backward(loss) before engine.step(). {causes}"
            )
        self._global_grad_norm = verdict.norm
        self.overflow = not math.isfinite(verdict.norm)
        if self.dynamic_loss_scale:
            self.loss_scaler.update_scale(self.overflow)
        self.stepper.settle(stepped=not self.overflow)
        if self.overflow:
            self.stepper.report_skip(self.parameter_names)
        elif self.roster and self.ranks.rank == 0:
            self.roster.warn(all_had_gradients=self.gradients.pending.received >= len(self.parameters))

    def _gradient_scale(self) -> float:
        """Factor from the sum over ranks of scaled gradients, as stored, to the gradient of a step."""
        return 1.0 / (self.parts.divisor * self.loss_scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of trained parameters, including reduced ones."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.gradients.drop()

    def _bring_gradients(self) -> None:
        """Bring gradients before they are read or set as a whole. Raises ValueError if there are none."""
        self.clear_backward_seen_flag()
        if not self.gradients.has_gradients:
            raise ValueError("gradients exist only between engine.backward() and engine.step()")
        self.gradients.bring()

    # Masters, weights and checkpoints

    @property
    def parameters_by_bucket(self) -> list[list[Parameter]]:
        """Parameters in the order in which a checkpoint's FP32 view holds them."""
        return [[self.parameters[slot.parameter] for slot in bucket.slots] for bucket in self.parts.buckets]

    def ready_for_files(self) -> AbstractContextManager[None]:
        """Put parameters into their buffers, with their first requires_grad, while DeepSpeed saves or loads.

        Raises ValueError if the shape or dtype of a parameter has changed.
        """
        self.binding.require()
        return self.roster.as_initialized() if self.roster else nullcontext()

    def _states_were_set(self) -> None:
        self.optimizer.drop_clamp("optimizer states were set from outside")

    def refresh_fp32_params(self) -> None:
        """Take masters from the current weights and drop gradients, as after loading weights."""
        self.zero_grad()
        self.binding.require()
        self.saved.masters_from_weights()

    _restore_from_bit16_weights = refresh_fp32_params

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard: raw states for us, FP32 masters for DeepSpeed's zero_to_fp32.py."""
        return self.saved.state_dict()

    def restore(self, source: Restorable) -> None:
        """Restore a checkpoint that has been checked; the weights follow the masters."""
        self.binding.require()
        self.saved.restore(source)
        self.zero_grad()
        self.saved.weights_from_masters()
