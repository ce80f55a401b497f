"""What checkpoints read from a run and restore: masters and weights, states, counters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn import Parameter

from ds_fp8.ops.blocks import chunks
from ds_fp8.ops.masters import put, rewrite_weights
from ds_fp8.zero_fp8.checkpoint import manifest, writer
from ds_fp8.zero_fp8.checkpoint.contracts import Restorable, WeightSource
from ds_fp8.zero_fp8.comm.groups import Ranks
from ds_fp8.zero_fp8.handlers.master_views import MasterViews
from ds_fp8.zero_fp8.optimizer.fp8_adamw import FP8AdamW
from ds_fp8.zero_fp8.parts import Parts
from ds_fp8.zero_fp8.recipe import ZeroSettings
from ds_fp8.zero_fp8.weights.model_weights import ModelWeights
from ds_fp8.zero_fp8.weights.store import Gathers
from ds_fp8.zero_fp8.weights.tiled import matrices_of, tiled


class SavedStates:
    """The states of a run, in the form that files hold."""

    def __init__(
        self,
        parts: Parts,
        parameters: Mapping[int, Parameter],
        names: Mapping[int, str],
        optimizer: FP8AdamW,
        loss_scaler: Any,
        master_views: MasterViews,
        settings: ZeroSettings,
        ranks: Ranks,
    ) -> None:
        """parameters, names: by global index. loss_scaler: DeepSpeed's."""
        self._parts = parts
        self._parameters = parameters
        self._names = names
        self._settings = settings
        self._optimizer = optimizer
        self._loss_scaler = loss_scaler
        self._master_views = master_views
        self.model_weights = ModelWeights(
            parts.shards, parts.weights, parts.frozen, ranks.group, masters=settings.masters_in_model_files
        )
        self._view: dict[str, Any] | None = None  # view of the masters during a save

    def masters_from_weights(self) -> None:
        """Take masters from the current weights, then round the weights as a step would round them."""
        for _, _, shard, weights in self._parts.by_bucket():
            leading = [piece for piece in shard.pieces if weights.leads(piece.slot.parameter)]
            if leading:
                shard.take_masters(weights.own, leading)
        self.weights_from_masters()

    def weights_from_masters(self) -> None:
        """Make weights from the state, as the first step and every load require.

        Buckets follow one another, so that memory for a gather is needed for one bucket at a time.
        """
        gathers = Gathers()
        for bucket, _, shard, weights in self._parts.by_bucket():
            room = weights.room
            for rows in shard.cut():
                with shard.lend(rows) as state:
                    rewrite_weights(state.master, room[rows])
            gathers.launch(weights, self._parts.nodes_of(bucket))
            gathers.wait()

    def take_weights(self, source: WeightSource) -> None:
        """Write a checkpoint's weights that this rank owns; masters do not follow yet."""
        for _, _, shard, weights in self._parts.by_bucket():
            for piece in shard.pieces:
                name = self._names[piece.slot.parameter]
                if name in source:
                    given = weights.given(piece)
                    for part in chunks(piece.numel, 1):
                        first = piece.first_element
                        put(source.weights(name, slice(first + part.start, first + part.stop)), given[part])

    @contextmanager
    def ready_to_save(self, *, writes: bool) -> Iterator[None]:
        """Do the collective part of a save: a rank may fail in the rest, and no other rank waits for it.

        writes: whether this rank writes the model file.
        """
        self._view = self._masters()
        self.model_weights.hold(writes=writes)
        try:
            yield
        finally:
            self._view = None
            self.model_weights.let_go()

    @contextmanager
    def open_to_weights(self, *, keeps: bool) -> Iterator[None]:
        """Make FP8 weights writable while DeepSpeed loads a model file; written frozen weights are kept.

        keeps: take masters from the written values; else drop the values: masters come from elsewhere.
        """
        codes = list(tiled(self._parts.weights))
        for each in codes:
            each.set_writers(keeps=keeps)
        self._parts.frozen.set_writers()
        try:
            yield
        finally:
            self._parts.frozen.unset_writers()
            for each in codes:
                each.unset_writers()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard: our raw states, and FP32 masters for zero_to_fp32.py. Collective."""
        parts = self._parts
        packed = writer.pack(parts.shards, self._names)
        for _, _, shard, weights in parts.by_bucket():
            if shard.master_format.split and weights.saved_with_states:
                writer.add_upper_halves(packed, shard, weights.own, self._names)
        return {
            "zero_stage": self._settings.stage,
            "partition_count": parts.buckets[0].world_size,
            "ds_version": writer.NOT_FOR_STOCK,
            "base_optimizer_state": writer.optimizer_state(packed, self._optimizer),
            **(self._masters() if self._view is None else self._view),
        }

    def _masters(self) -> dict[str, Any]:
        return self._master_views(self._parts) if self._settings.save_fp32_master else {}

    def described_parameters(self) -> dict[str, manifest.Parameter]:
        """Return the trained parameters as in a checkpoint's manifest, the same on every rank."""
        return writer.describe_parameters(self._parts.buckets, self._parameters, self._names)

    @property
    def encoded(self) -> set[str]:
        """Return the names of the trained parameters that are codes."""
        return {matrix.name for matrix in matrices_of(self._parts.weights)}

    def restore(self, source: Restorable) -> None:
        """Restore states and counters of a checkpoint that has been checked."""
        parts = self._parts
        source.restore(parts.shards, [weights.room for weights in parts.weights], self._names)
        source.progress.give_to(self._optimizer, self._loss_scaler)
        parts.gradient_scales.restore(source.progress.autoscale, self._names)
        parts.health.prepare(self._optimizer.steps + 1)
