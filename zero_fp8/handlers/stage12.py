"""FP8ZeROOptimizer: what DeepSpeed's engine talks to under ZeRO 1 and 2.

The engine calls, in this order: the backward prologue and epilogue, `overlapping_partition_...`
(ZeRO 2, every micro-step) or `reduce_gradients` (ZeRO 1, at the boundary), `step`, `zero_grad`.
The parts do the work: `GradientReducer` brings gradients to shards, a `Shard` steps, `Weights`
brings weights to the parameters.

A fresh subclass of DeepSpeed's `ZeROOptimizer` base, not of its 3,000-line stage 1/2 handler, ten
of whose methods changed signature within three releases.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from ds_fp8.compat import ZeROOptimizer
from ds_fp8.zero_fp8.checkpoint import writer
from ds_fp8.zero_fp8.comm.agreement import check_agreement, first_objection
from ds_fp8.zero_fp8.comm.groups import Nodes
from ds_fp8.zero_fp8.gradients.backwards import ArrivalHooks, covers_whole_graph, in_backward
from ds_fp8.zero_fp8.gradients.reducer import GradientReducer
from ds_fp8.zero_fp8.handlers.full_tensors import FullTensors
from ds_fp8.zero_fp8.handlers.roster import Members, Roster
from ds_fp8.zero_fp8.health import Health
from ds_fp8.zero_fp8.optimizer.client import Client
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.placement.parameters import check_finite, trained_parameters
from ds_fp8.zero_fp8.recipe import Recipe, ZeroSettings
from ds_fp8.zero_fp8.verdict import Verdict, non_finite_parameters
from ds_fp8.zero_fp8.weights.binding import Binding
from ds_fp8.zero_fp8.weights.views import Gathers, Weights
from ds_fp8.zero_fp8.wiring import layout_of

logger = logging.getLogger("ds_fp8")


class FP8ZeROOptimizer(ZeROOptimizer):
    """ZeRO 1 and 2 over FP8 gradients, FP8 communication and low-precision Adam states."""

    custom_loss_scaler = False
    external_loss_scale = None
    torch_autocast_gradscaler = None

    def __init__(
        self,
        optimizer: FP8AdamW,
        names: Mapping[Parameter, str],
        recipe: Recipe,
        settings: ZeroSettings,
        group: ProcessGroup,
        timers: Any,
        loss_scaler: Any,
    ) -> None:
        """Take over the parameters: masters are made from them, and they become views of buffers.

        names: every parameter of the model, in the model's order, with its name; the order numbers
        the parameters and so must be the same on every rank. timers, loss_scaler: DeepSpeed's.
        Raises ValueError where the ranks' parameters or settings differ, RuntimeError on a GPU without a
        usable kernel.
        """
        super().__init__()
        self.loss_scaler = loss_scaler
        self.optimizer = optimizer
        self.recipe = recipe
        self.settings = settings
        self.dp_process_group = group
        self.timers = timers
        self.overflow = False
        self.consecutive_skips = 0
        self._global_grad_norm: float | None = None

        rank = dist.get_rank(group)
        self.parameters, specs = trained_parameters(optimizer.param_groups, names)
        device = next(iter(self.parameters.values())).device
        check_agreement("what is trained", [str(recipe), str(settings), *map(str, specs)], device, group)
        self.parameter_names = {index: names[each] for index, each in self.parameters.items()}
        if recipe.master.scaled:
            check_finite(self.parameters, self.parameter_names)
        layout = layout_of(recipe)
        self.buckets = layout.partition(
            specs,
            bucket_elements=settings.bucket_elements,
            block_size=recipe.block_size,
            world_size=dist.get_world_size(group),
        )
        self.weights = [Weights(bucket, self.parameters, rank) for bucket in self.buckets]
        self.backend = layout.choose(device)
        if self.backend.instead and rank == 0:
            logger.warning(
                "plain PyTorch instead of kernels, with the same numbers: %s", self.backend.instead
            )
        self.health = Health(
            settings.stats_interval, len(optimizer.param_groups), device, stores_sqrt=not recipe.by_tensor
        )
        self.health.prepare(optimizer.steps + 1)
        self.shards = [
            layout.shard(bucket, rank, recipe, device, self.backend, self.health.groups[bucket.group])
            for bucket in self.buckets
        ]
        self.nodes = Nodes(group, recipe.intra_node_size)
        self.wire = layout.wire(recipe, self.nodes, self.backend, self.parameters)
        self.gradients = GradientReducer(
            self.buckets,
            self.parameters,
            self.shards,
            self.wire,
            self.nodes,
            overlap=settings.overlap,
        )
        listens = settings.stage == 2
        self.binding = Binding(
            self.weights,
            self.shards,
            self.parameters,
            self.parameter_names,
            on_return=self.gradients.listen if listens else lambda: None,
        )
        self._masters_from_weights()
        if listens:
            self.gradients.listen()
        self.full_tensors = FullTensors(
            self.shards,
            self.weights,
            group,
            self._gradient_scale,
            self._states_were_set,
            self._complete_gradients,
            self.binding.require,
            self._give_up,
        )
        self.full_tensors.bind(self.parameters)
        self.roster: Roster | None = None
        self.arrivals: ArrivalHooks | None = None
        self.client: Client | None = None

    def join(self, members: Members, divisor: Callable[[], float], client: Any) -> None:
        """Take part in an engine.

        members: of its model; divisor: of backwards that are not the engine's; client: the optimizer given.
        """
        self.roster = Roster(members, self.parameters, self.parameter_names)
        self.arrivals = ArrivalHooks(self.parameters, divisor)
        self.client = Client(client, self.optimizer, self.zero_grad)

    def _give_up(self) -> None:
        """Another engine trains these parameters from now on."""
        logger.warning("parameters of an FP8 engine were given to another engine: the first trains no more")
        self.binding.give_up()
        self._let_go()

    def _let_go(self) -> None:
        self.gradients.remove_hooks()
        if self.arrivals:
            self.arrivals.remove()
        if self.client:
            self.client.let_go()

    def ready_for_files(self) -> AbstractContextManager[None]:
        """While DeepSpeed saves or loads: parameters are in their buffers and require what they did at first.

        Raises ValueError if a parameter has another shape or dtype now.
        """
        self.binding.require()
        return self.roster.as_initialized() if self.roster else nullcontext()

    # Backward

    def clear_backward_seen_flag(self) -> None:
        """At every forward, if it is not part of a backward: drop what one has left that raised half-way."""
        if self.in_backward and not in_backward():
            logger.warning(
                "the last backward did not come to its end; all gradients since the last step are dropped"
            )
            self.zero_grad()

    @property
    def in_backward(self) -> bool:
        """Whether a backward has begun and has not come to its end."""
        return self.gradients.active

    def opens_backward(self) -> bool:
        """Whether a gradient that has reached an output of the model begins a backward."""
        return not self.in_backward and (not in_backward() or covers_whole_graph())

    def enter_backward(self) -> None:
        """A backward begins; one that has raised half-way has left its count."""
        self._backward_active_depth = 0
        super().clear_backward_seen_flag()
        super().enter_backward()
        self.gradients.begin()

    def exit_backward(self) -> None:
        super().exit_backward()
        self.gradients.end()

    def needs_scaler(self) -> bool:
        """Whether a loss must be scaled before its backward; also by a scale that is fixed."""
        return super().needs_scaler() or self.loss_scale != 1

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """ZeRO 2, after every micro-step: what backward has not sent yet."""
        self.gradients.finish()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """ZeRO 1, at the accumulation boundary."""
        self.gradients.finish()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Where the caller owns the boundary: every backward has reduced already (ZeRO 2)."""

    # Step

    def step(self, closure: Any = None) -> None:
        """One Adam step on every shard, or none: then every byte of state stays as it was.

        Everything is launched before the host knows which of the two it is. Raises RuntimeError without
        a gradient, after a backward that raised half-way, and after `max_consecutive_skips` skips in a row;
        ValueError, on every rank, where a weight or a gradient of any rank has another shape or dtype now.
        """
        self.binding.check_owned()
        if self.client:
            self.client.follow()
        try:
            if self.in_backward:
                self.zero_grad()
                raise RuntimeError(
                    "step() after a backward that did not come to its end: all gradients since the last step "
                    "are dropped; call engine.backward(loss) before engine.step()"
                )
            objection = self.binding.restore()
            if self.gradients.expects_late or not self.gradients.rounds:
                self.gradients.complete()
            verdict = self._try_step(objection)
            if verdict.late:
                self.gradients.expects_late = True
                self.gradients.send_late()
                verdict = self._try_step(objection)
            if verdict.objections:
                objection = objection or self._objection_to_gradients()
                raise ValueError(first_objection(objection, self.dp_process_group))
            self._settle(verdict)
            if verdict.edited:
                self.binding.say(self.dp_process_group)
        finally:
            self.gradients.drop()

    def _try_step(self, objection: str | None) -> Verdict:
        """Launch a step, which the device takes or not, and learn which."""
        with _Timed(self.timers, "optimizer_gradients"):
            verdict = Verdict(
                self.shards,
                taken=self.gradients.taken,
                late=self.gradients.late,
                objections=[objection, self._objection_to_gradients()],
                edited=self.binding.unsaid,
                gradient_scale=self._gradient_scale(),
                clip=self.settings.gradient_clipping,
                group=self.dp_process_group,
            )
        self.health.begin_sweep()
        scalars = self.optimizer.scalars(clamp=self.recipe.clamped)
        gathers = Gathers(self.nodes)
        for bucket, shard, weights in zip(self.buckets, self.shards, self.weights, strict=True):
            with _Timed(self.timers, "optimizer_step"):
                shard.sweep(weights.own, scalars[bucket.group], verdict.control)
            with _Timed(self.timers, "optimizer_allgather"):
                gathers.launch(weights)
        with _Timed(self.timers, "optimizer_allgather"):
            gathers.wait()
        return verdict.read()

    def _objection_to_gradients(self) -> str | None:
        if self.gradients.unfit is None:
            return None
        index, why = self.gradients.unfit
        return f"gradient of {self.parameter_names[index]}: {why}"

    def _settle(self, verdict: Verdict) -> None:
        """Count the step, or the skip, as the device has decided."""
        if not verdict.taken:
            causes = self.roster.causes() if self.roster else "no engine"
            raise RuntimeError(
                "step() without a gradient: no parameter that the optimizer trains received one on any rank: "
                f"call engine.backward(loss) before engine.step(). {causes}"
            )
        self._global_grad_norm = verdict.norm
        self.overflow = not math.isfinite(verdict.norm)
        if self.dynamic_loss_scale:
            self.loss_scaler.update_scale(self.overflow)
        taken = not self.overflow
        if taken:
            self.wire.settle(self.shards)
        self.health.collect(
            self.optimizer.steps + 1, taken=taken, group=self.dp_process_group, more=self.wire.figures
        )
        if self.overflow:
            self._skip()
        else:
            self.consecutive_skips = 0
            if self.roster and dist.get_rank(self.dp_process_group) == 0:
                self.roster.warn(all_had_gradients=self.gradients.taken >= len(self.parameters))
            self.optimizer.advance(clamp=self.recipe.clamped)
            # So that a backward over a graph of before the step is refused, as it is in PyTorch.
            torch.autograd.graph.increment_version(self.parameters.values())
            self.health.prepare(self.optimizer.steps + 1)

    def _gradient_scale(self) -> float:
        """From the sum over ranks of scaled gradients, as stored, to the mean."""
        ranks = int(dist.get_world_size(self.dp_process_group)) if self.settings.average else 1
        return 1.0 / (ranks * self.loss_scale)

    def _skip(self) -> None:
        self.consecutive_skips += 1
        culprits = non_finite_parameters(self.shards, self.parameter_names, self.dp_process_group)
        if dist.get_rank(self.dp_process_group) == 0:
            logger.warning("step skipped: the gradient of %s is not finite", culprits)
        if self.consecutive_skips >= self.settings.max_consecutive_skips:
            raise RuntimeError(
                f"{self.consecutive_skips} steps skipped in a row, as many as fp8.max_consecutive_skips "
                f"allows: the gradient of {culprits} is not finite"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of trained parameters, reduced ones too."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.gradients.drop()

    # What DeepSpeed, schedulers and Hugging Face read

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Refused, by a ValueError: shards are made once."""
        self.optimizer.add_param_group(dict(param_group))

    @property
    def state(self) -> Mapping[Any, Any]:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @property
    def round_robin_bit16_groups(self) -> list[list[Parameter]]:
        """Parameters in the order in which a checkpoint's FP32 view holds them."""
        return [[self.parameters[slot.parameter] for slot in bucket.slots] for bucket in self.buckets]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's states and reduced gradient."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def loss_scale(self) -> float:
        return float(self.loss_scaler.loss_scale)

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return bool(self.loss_scaler.dynamic)

    def destroy(self) -> None:
        """Let go of the parameters, which keep their weights, and free the states."""
        self._let_go()
        self.full_tensors.unbind(self.parameters)
        self.shards.clear()
        self.nodes.close()

    # Checkpoint

    def _complete_gradients(self) -> None:
        """Before whole gradients are read or set. Raises ValueError if there are none."""
        self.clear_backward_seen_flag()
        if not self.gradients.pending:
            raise ValueError("gradients are there only between engine.backward() and engine.step()")
        self.gradients.complete()

    def _states_were_set(self) -> None:
        self.optimizer.drop_clamp("optimizer states were set from outside")

    def refresh_fp32_params(self) -> None:
        """Masters from the weights as they are, and no gradients, as after loading weights."""
        self.zero_grad()
        self.binding.require()
        self._masters_from_weights()

    _restore_from_bit16_weights = refresh_fp32_params

    def _masters_from_weights(self) -> None:
        self.gradients.drop()
        for shard, weights in zip(self.shards, self.weights, strict=True):
            shard.take_masters(weights.own)
        self._weights_from_masters()

    def _weights_from_masters(self) -> None:
        """Weights are a function of the state, from the first step and after every load.

        One bucket after another: what a gather takes of memory beside the weights, it takes once.
        """
        gathers = Gathers(self.nodes)
        for shard, weights in zip(self.shards, self.weights, strict=True):
            weights.write(shard.state.master)
            gathers.launch(weights)
            gathers.wait()

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard: raw states for us, FP32 masters for DeepSpeed's zero_to_fp32.py."""
        saved: dict[str, Any] = {
            "zero_stage": self.settings.stage,
            "partition_count": dist.get_world_size(self.dp_process_group),
            "ds_version": writer.NOT_FOR_STOCK,
            "base_optimizer_state": writer.optimizer_state(self.shards, self.parameter_names, self.optimizer),
        }
        if self.settings.save_fp32_master:
            saved["single_partition_of_fp32_groups"] = [
                writer.fp32_masters(shard, weights.own)
                for shard, weights in zip(self.shards, self.weights, strict=True)
            ]
        return saved

    def manifest_facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of the states, the same on every rank."""
        return {
            "zero_stage": self.settings.stage,
            "world_size": self.buckets[0].world_size,
            "recipe": writer.recipe_facts(self.recipe),
            "fp32_master": self.settings.save_fp32_master,
            "parameters": writer.parameter_facts(self.buckets, self.parameters, self.parameter_names),
            "autoscale": self.wire.state(self.parameter_names),
            **writer.progress_facts(self.optimizer, self.loss_scaler),
        }

    def restore(self, source: writer.Restorable) -> None:
        """Take over a checkpoint that has been checked; the weights follow the masters."""
        self.binding.require()
        source.restore(self.shards, [each.own for each in self.weights], self.parameter_names)
        writer.take_progress(source.progress, self.optimizer, self.loss_scaler)
        self.wire.restore(source.progress.autoscale, self.parameter_names)
        self.health.prepare(self.optimizer.steps + 1)
        self.zero_grad()
        self._weights_from_masters()


class _Timed:
    """Runs one of DeepSpeed's timers, stopped on every way out."""

    def __init__(self, timers: Any, name: str) -> None:
        self._timer = timers(name)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.stop()
