"""What checkpoints take from a run and give back to it: masters and weights, states, counters."""

from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter

from ds_fp8.zero_fp8.checkpoint import manifest, writer
from ds_fp8.zero_fp8.checkpoint.contracts import Restorable
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.recipe import ZeroSettings
from ds_fp8.zero_fp8.weights.store import Gathers
from ds_fp8.zero_fp8.wiring import Parts


class SavedStates:
    """The states of a run, as files hold them."""

    def __init__(
        self,
        parts: Parts,
        parameters: Mapping[int, Parameter],
        names: Mapping[int, str],
        settings: ZeroSettings,
        optimizer: FP8AdamW,
        loss_scaler: Any,
    ) -> None:
        """parameters, names: by global index. loss_scaler: DeepSpeed's."""
        self._parts = parts
        self._parameters = parameters
        self._names = names
        self._settings = settings
        self._optimizer = optimizer
        self._loss_scaler = loss_scaler

    def masters_from_weights(self) -> None:
        """Take the weights as they are; the weights are then rounded as a step would round them."""
        for _, _, shard, weights in self._parts.by_bucket():
            shard.take_masters(weights.own)
        self.weights_from_masters()

    def weights_from_masters(self) -> None:
        """Weights are a function of the state, from the first step and after every load.

        One bucket after another: what a gather takes of memory beside the weights, it takes once.
        """
        gathers = Gathers()
        for bucket, _, shard, weights in self._parts.by_bucket():
            with shard.lend() as state:
                weights.write(state.master)
            gathers.launch(weights, self._parts.nodes_of(bucket))
            gathers.wait()

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard: raw states for us, FP32 masters for DeepSpeed's zero_to_fp32.py."""
        parts = self._parts
        saved: dict[str, Any] = {
            "zero_stage": self._settings.stage,
            "partition_count": parts.buckets[0].world_size,
            "ds_version": writer.NOT_FOR_STOCK,
            "base_optimizer_state": writer.optimizer_state(parts.shards, self._names, self._optimizer),
        }
        if self._settings.save_fp32_master:
            saved["single_partition_of_fp32_groups"] = [
                writer.fp32_masters(shard, weights.own) for _, _, shard, weights in parts.by_bucket()
            ]
        return saved

    def described_parameters(self) -> dict[str, manifest.Parameter]:
        """The trained parameters as a checkpoint's manifest has them, the same on every rank."""
        return writer.describe_parameters(self._parts.buckets, self._parameters, self._names)

    def restore(self, source: Restorable) -> None:
        """Take over states and counters of a checkpoint that has been checked."""
        parts = self._parts
        source.restore(parts.shards, [weights.own for weights in parts.weights], self._names)
        source.progress.give_to(self._optimizer, self._loss_scaler)
        parts.gradient_scales.restore(source.progress.autoscale, self._names)
        parts.health.prepare(self._optimizer.steps + 1)
