"""What works and what is refused, as data: the tests run it, `python tests/support.py` prints it.

A feature is a training run that is made with FP8 and with stock DeepSpeed under the same conditions.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from engines import SMALL, build, ds_config, zero3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from train_lm import Block, ByteGPT

# Models


class Tied(ByteGPT):
    """The head is the embedding: its gradient comes from both ends of backward."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.head.weight = self.tokens.weight


class Checkpointed(ByteGPT):
    """Blocks are recomputed in backward; `apart` are run without."""

    reentrant = True

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.blocks = nn.ModuleList(Recomputed(block, self.reentrant) for block in self.blocks)


class CheckpointedOnce(Checkpointed):
    reentrant = False


class Recomputed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block = block
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        recomputed: Tensor = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return recomputed


class TiedCheckpointed(ByteGPT):
    """One block used three times, each recomputed: its gradients arrive three times in a backward."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        shared = Recomputed(Block(SMALL), reentrant=True)
        self.blocks = nn.ModuleList([shared, shared, shared])


class DeepSpeedCheckpointed(ByteGPT):
    """Blocks are recomputed by DeepSpeed's own activation checkpointing."""

    def forward(self, text: Tensor) -> Tensor:
        inputs, targets = text[:, :-1], text[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = deepspeed.checkpointing.checkpoint(block, x)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))

    @staticmethod
    def make() -> nn.Module:
        deepspeed.checkpointing.configure(None, num_checkpoints=SMALL.layers)
        return DeepSpeedCheckpointed(SMALL)


class Unused(ByteGPT):
    """Layers that no loss reaches, empty and one-element parameters."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.unused = nn.Linear(7, 5)
        self.empty = nn.Parameter(torch.zeros(0))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, text: Tensor) -> Tensor:
        return super().forward(text) + 0.01 * self.one.float().square().sum()


class UnusedWithoutEmpty(Unused):
    """The same, for a DeepSpeed that takes no empty parameters."""

    def __init__(self) -> None:
        super().__init__()
        del self.empty


class UsedOnOneRank(ByteGPT):
    """A layer that only rank 0 uses."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.sometimes = nn.Linear(SMALL.width, SMALL.width)

    def forward(self, text: Tensor) -> Tensor:
        loss = super().forward(text)
        return loss + self.extra_loss() if dist.get_rank() == 0 else loss

    def extra_loss(self) -> Tensor:
        ones = torch.ones(3, SMALL.width, dtype=self.sometimes.weight.dtype)
        extra: Tensor = self.sometimes(ones).float().square().mean()
        return extra


class UsedForNothingElsewhere(UsedOnOneRank):
    """The same, for who hangs where ranks use different parameters."""

    def forward(self, text: Tensor) -> Tensor:
        factor = 1.0 if dist.get_rank() == 0 else 0.0
        return ByteGPT.forward(self, text) + factor * self.extra_loss()


def frozen() -> nn.Module:
    model = ByteGPT(SMALL)
    model.blocks[0].requires_grad_(False)
    return model


def of_dtype(dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: ByteGPT(SMALL).to(dtype)


def gpt() -> nn.Module:
    return ByteGPT(SMALL)


# Ways to make a step: each returns its loss


def plain(engine: Any, source: Iterator[Tensor]) -> Tensor:
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        losses.append(engine(next(source)))
        engine.backward(losses[-1])
        engine.step()
    return torch.stack(losses).mean()


def torch_style(engine: Any, source: Iterator[Tensor]) -> Tensor:
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        losses.append(engine(next(source)))
        losses[-1].backward()
        engine.step()
    return torch.stack(losses).mean()


def scaled(engine: Any, source: Iterator[Tensor]) -> Tensor:
    loss: Tensor = engine(next(source))
    engine.scale(loss).backward()
    engine.step()
    return loss


def own_boundary(engine: Any, source: Iterator[Tensor]) -> Tensor:
    """The caller says which of two micro-steps is the last, as accelerate does."""
    losses = []
    for last in (False, True):
        engine.set_gradient_accumulation_boundary(last)
        losses.append(engine(next(source)))
        engine.backward(losses[-1] / 2)
        engine.step()
    return torch.stack(losses).mean()


def unmanaged(engine: Any, source: Iterator[Tensor]) -> Tensor:
    """With managed_gradient_accumulation false, step() is the boundary."""
    losses = [engine(next(source)) for _ in range(2)]
    for loss in losses:
        engine.backward(loss / 2)
    engine.step()
    return torch.stack(losses).mean()


def without_sync(engine: Any, source: Iterator[Tensor]) -> Tensor:
    with engine.no_sync():
        first = engine(next(source))
        engine.backward(first / 2)
    second = engine(next(source))
    engine.backward(second / 2)
    engine.step()
    loss: Tensor = (first + second) / 2
    return loss


def twice(engine: Any, source: Iterator[Tensor]) -> Tensor:
    """Two backwards over one graph before a step."""
    loss: Tensor = engine(next(source))
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss / 2, retain_graph=True)
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss / 2)
    engine.step()
    return loss


def with_full_tensors(engine: Any, source: Iterator[Tensor]) -> Tensor:
    """Read gradient, master weight and states between backward and step; write them after it."""
    loss: Tensor = engine(next(source))
    engine.backward(loss)
    parameter = engine.module.blocks[0].up.weight
    safe_set_full_grad(parameter, safe_get_full_grad(parameter).float() * 0.5)
    engine.step()
    safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter) * 0.999)
    for key in ("exp_avg", "exp_avg_sq"):
        safe_set_full_optimizer_state(parameter, safe_get_full_optimizer_state(parameter, key), key)
    return loss


def beside_another(engine: Any, source: Iterator[Tensor]) -> Tensor:
    """Step a second engine of the same process in between."""
    if "other" not in vars(engine):  # and not as an attribute: an engine is a module, and this no part of it
        torch.manual_seed(1)
        vars(engine)["other"] = build(engine.config, gpt())
    other, batch = vars(engine)["other"], next(source)
    other.backward(other(batch))
    loss: Tensor = engine(batch)
    engine.backward(loss)
    other.step()
    engine.step()
    return loss


# Optimizers of the client


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [each for each in model.parameters() if each.ndim > 1]
    vectors = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 2e-3, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


# Every matrix of the small models is FP8.
WEIGHTS: dict[str, Any] = {"opt_level": "O3", "weights": {"min_elements": 256}}


@dataclass(frozen=True)
class Feature:
    """A way to train that FP8 shares with stock DeepSpeed."""

    model: Callable[[], nn.Module] = gpt
    step: Callable[[Any, Iterator[Tensor]], Tensor] = plain
    stages: tuple[int, ...] = (1, 2, 3)
    fp8: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    config: dict[str, Any] = field(default_factory=dict)  # arguments of engines.ds_config
    extra: dict[str, Any] = field(default_factory=dict)  # keys added to the ds_config
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None  # in place of ds_config's
    prepare: Callable[[Any], None] | None = None
    # Where stock DeepSpeed cannot do it as it is, what it does that comes to the same:
    stock_stage: int | None = None
    stock_under_3: int = 3  # stage of the stock run beside ours under ZeRO 3
    since: str = "0"  # the DeepSpeed version from which stock DeepSpeed can do it on a CPU
    stock_model: Callable[[], nn.Module] | None = None
    stock_scheduler: Callable[[Any], Any] | None = None  # made by the client


def compiled(engine: Any) -> None:
    engine.compile(backend="aot_eager")


def step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)


STEP_LR = {"scheduler": {"type": "StepLR", "params": {"step_size": 10, "gamma": 0.5}}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
MONITOR = {"enabled": True, "output_path": tempfile.gettempdir(), "job_name": "ds_fp8_test_monitor"}
PROFILER = {"enabled": True, "profile_step": 3, "detailed": False, "output_file": "/dev/null"}

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
ALL_REDUCE = {"zero": {"reduce_scatter": False}}  # what stock DeepSpeed wants for these factors

FEATURES: dict[str, Feature] = {
    "engine.backward(loss)": Feature(),
    "loss.backward()": Feature(step=torch_style),
    "engine.scale(loss).backward()": Feature(step=scaled),
    "gradient accumulation": Feature(config={"micro_steps": 3}),
    "gradient accumulation with loss.backward()": Feature(step=torch_style, config={"micro_steps": 2}),
    "set_gradient_accumulation_boundary": Feature(step=own_boundary),
    "managed_gradient_accumulation: false": Feature(
        step=unmanaged, extra={"managed_gradient_accumulation": False}, stock_under_3=2
    ),
    "no_sync (ZeRO 1)": Feature(step=without_sync, stages=(1,)),
    "two backwards over one graph": Feature(step=twice, stock_under_3=2),
    "gradient_clipping": Feature(config={"clipping": 0.3}),
    "gradient_clipping off": Feature(config={"clipping": 0.0}),
    "gradient_predivide_factor": Feature(
        extra={"gradient_predivide_factor": 2.0}, config=ALL_REDUCE, stock_under_3=2
    ),
    "prescale_gradients": Feature(extra={"prescale_gradients": True}, config=ALL_REDUCE),
    "activation checkpointing, reentrant": Feature(model=Checkpointed),
    "activation checkpointing, not reentrant": Feature(model=CheckpointedOnce),
    "activation checkpointing, DeepSpeed's": Feature(model=DeepSpeedCheckpointed.make, since="0.19.8"),
    "frozen parameters": Feature(model=frozen),
    "tied parameters": Feature(model=Tied),
    "tied parameters under reentrant checkpointing": Feature(model=TiedCheckpointed, stock_stage=1),
    "unused, empty and one-element parameters": Feature(model=Unused, stock_model=UnusedWithoutEmpty),
    "parameters used on one rank only": Feature(
        model=UsedOnOneRank, stock_model=UsedForNothingElsewhere, stages=(1, 2)
    ),
    "parameters larger than reduce_bucket_size": Feature(config={"bucket": 500}),
    "overlap_comm": Feature(config={"bucket": 5000, "zero": {"overlap_comm": True}}),
    "FP32 parameters": Feature(config={"bf16": False}),
    "FP16 parameters without an fp16 section": Feature(
        model=of_dtype(torch.float16), config={"bf16": False}, stock_stage=2
    ),
    "BF16 parameters without a bf16 section": Feature(
        model=of_dtype(torch.bfloat16), config={"bf16": False}, stock_stage=2
    ),
    "a DeepSpeed scheduler": Feature(config={"scheduler": WARMUP}),
    "a torch scheduler in ds_config": Feature(extra=STEP_LR, stock_scheduler=step_lr),
    "a client's torch.optim.AdamW": Feature(optimizer=adamw),
    "a client's torch.optim.Adam (L2)": Feature(optimizer=adam),
    "several param groups": Feature(optimizer=grouped),
    "safe_get_full_* and safe_set_full_* in every step": Feature(step=with_full_tensors),
    "several engines in one process": Feature(step=beside_another),
    "csv_monitor": Feature(extra={"csv_monitor": MONITOR}),
    "tensorboard": Feature(extra={"tensorboard": MONITOR}),
    "engine.compile()": Feature(prepare=compiled),
    "wall_clock_breakdown": Feature(extra={"wall_clock_breakdown": True, "steps_per_print": 5}),
    "comms_logger": Feature(extra={"comms_logger": {"enabled": True, "verbose": False}}),
    "flops_profiler": Feature(extra={"flops_profiler": PROFILER}),
    "steps_per_print": Feature(extra={"steps_per_print": 1}),
    "data_types.grad_accum_dtype: fp32": Feature(
        config={"micro_steps": 2}, extra={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
    "data_types.grad_accum_dtype: fp32, one micro-step": Feature(
        extra={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
    "torch_autocast with FP32 parameters": Feature(config={"bf16": False}, extra=AUTOCAST, stages=(1, 2)),
    "torch_autocast beside bf16": Feature(extra=AUTOCAST, stages=(1, 2)),
}

TWO_HOPS: dict[str, Any] = {"gradients": {"intra_node_size": 2}}
UNDER_O3 = (
    "engine.backward(loss)",
    "gradient accumulation",
    "no_sync (ZeRO 1)",
    "two backwards over one graph",
    "gradient_clipping",
    "activation checkpointing, reentrant",
    "activation checkpointing, not reentrant",
    "frozen parameters",
    "tied parameters",
    "parameters larger than reduce_bucket_size",
    "overlap_comm",
    "several param groups",
    "safe_get_full_* and safe_set_full_* in every step",
    "engine.compile()",
    "flops_profiler",
    "data_types.grad_accum_dtype: fp32",
    "torch_autocast beside bf16",
)
O3 = "O3: "


def under_o3(feature: Feature) -> Feature:
    """The same with FP8 weights and products."""
    return replace(feature, fp8=WEIGHTS)


FEATURES |= {f"{O3}{name}": under_o3(FEATURES[name]) for name in UNDER_O3}
FEATURES[f"{O3}two hops"] = Feature(fp8=WEIGHTS | TWO_HOPS, ranks=4)

# Rows whose proof is a test of its own.
PROVED_ELSEWHERE = {
    "ZeRO 1 and 2, any number of ranks": "test_parity.py::test_gradients",
    "losses of stock DeepSpeed BF16": "test_parity.py::test_losses_equal_stock_bf16",
    "overlap_comm on and off: the same bits": "test_overlap.py::test_overlap_changes_no_bit",
    "fp8.gradients.intra_node_size: one k-th of the bytes between nodes": (
        "test_two_hops.py::test_bytes_between_nodes_are_one_kth"
    ),
    "several param groups, a client's torch scheduler": (
        "test_engine.py::test_param_groups_and_a_client_scheduler"
    ),
    "Adam, AdamW, FP8AdamW from ds_config or the client": (
        "test_engine.py::test_every_way_to_give_an_optimizer_is_the_same"
    ),
    "fp16 parameters, static and dynamic loss scale": "test_loss_scale.py::test_training",
    "gradients of any mixture of backwards, hooks, edits and loads are PyTorch's": (
        "test_programs.py::test_gradients_are_those_of_pytorch"
    ),
    "weights zeroed, masked or clamped in place beside a split master": (
        "test_masters.py::test_every_finite_weight_and_every_lower_half_are_a_finite_master"
    ),
    "norm and clip factor: the same bits at any world size, on every backend": (
        "test_norm.py::test_norm_and_factor_are_the_same_bits_on_every_backend_and_world_size"
    ),
    "weights replaced through .data": "test_backwards.py::test_line_2_rebound_weights_train_on",
    "hooks on gradients registered after deepspeed.initialize": (
        "test_backwards.py::test_line_3_hooks_that_come_later_see_the_gradient_and_count"
    ),
    "several forwards and backwards per step, torch.autograd.grad between, loss.backward()": (
        "test_backwards.py::test_line_4_gradients_add_up_whatever_backward_they_come_from"
    ),
    "a warning for gradients that no optimizer takes, and for parameters that left the model": (
        "test_backwards.py::test_line_5_gradients_without_a_taker_are_named_once"
    ),
    "skipping of steps with non-finite gradients": "test_skip.py::test_every_rank_skips",
    "safe_get_full_fp32_param, _optimizer_state, _grad": "test_access.py::test_reading",
    "safe_set_full_fp32_param, _optimizer_state, _grad": "test_access.py::test_writing",
    "opt_level O2+: losses of stock DeepSpeed BF16": "test_parity.py::test_losses_equal_stock_bf16",
    "master_dtype split16: FP32 masters, bit for bit": (
        "test_parity.py::test_split16_is_an_fp32_master_bit_for_bit"
    ),
    "stochastic masters: the same bits at any world size": (
        "test_world_size.py::test_states_do_not_depend_on_the_world_size"
    ),
    "fp8.stats.interval: health on monitors": "test_health.py::test_events_reach_the_monitor",
    "csv and tensorboard monitors": "test_engine.py::test_monitors",
    "compile.deepcompile: engine.compile() is torch.compile": (
        "test_engine.py::test_deepcompile_is_torch_compile"
    ),
    "engine.destroy(), several engines in a process": "test_engine.py::test_engines_side_by_side",
    "save_checkpoint, load_checkpoint, bit-exact": "test_checkpoint.py::test_resume_is_exact",
    "load_checkpoint at another world size": "test_reshard.py::test_4_to_2_to_1_to_3_to_4_ranks",
    "load_checkpoint at another ZeRO stage or bucket size": (
        "test_reshard.py::test_other_stages_and_bucket_sizes"
    ),
    "load_checkpoint of other formats (allow_conversion)": "test_convert.py::test_other_formats",
    "load_checkpoint of stock ZeRO 1 and 2 states (allow_conversion)": (
        "test_convert.py::test_stock_states_enter"
    ),
    "load_checkpoint of weights only, without a scheduler's state": "test_checkpoint_options.py::test_parts",
    "exclude_frozen_parameters": "test_checkpoint_options.py::test_exclude_frozen_parameters",
    "use_node_local_storage": "test_checkpoint_options.py::test_use_node_local_storage",
    "kill -9 at any moment": "test_crash.py::test_a_killed_run_goes_on",
    "damaged checkpoints are refused": "test_mutations.py::test_mutated_checkpoints_are_refused",
    "damaged checkpoints of stock DeepSpeed are refused": (
        "test_foreign.py::test_an_entry_that_is_not_what_it_should_be_is_refused"
    ),
    "a save that fails on one rank fails on all": (
        "test_failed_saves.py::test_every_rank_tells_the_file_and_the_cause"
    ),
    "extra state of modules, of any type and length": (
        "test_extra_state.py::test_extra_state_of_any_type_and_length"
    ),
    "zero_to_fp32.py, load_state_dict_from_zero_checkpoint": "test_export.py::test_zero_to_fp32",
    "save_16bit_model": "test_export.py::test_save_16bit_model",
    "ds_fp8 export": "test_export.py::test_export",
    "universal checkpoints of stock DeepSpeed": "test_convert.py::test_stock_universal_enters",
    "ds_fp8 to-universal, read by us and by stock DeepSpeed": (
        "test_convert.py::test_our_universal_is_read_by_us_and_by_stock"
    ),
    "Hugging Face Trainer: losses of BF16": "test_hf_trainer.py::test_losses_equal_bf16",
    "Hugging Face Trainer: evaluation, generation, load_best_model_at_end, save_model": (
        "test_hf_trainer.py::test_the_model_loads_in_plain_transformers_and_generates"
    ),
    "Hugging Face Trainer: resume_from_checkpoint, bit-exact": (
        "test_hf_trainer.py::test_resume_is_the_unbroken_run"
    ),
    "FP8StatsCallback: health where report_to says": (
        "test_hf_trainer.py::test_health_is_where_report_to_says"
    ),
    "deepspeed, torchrun, accelerate launch; --module ds_fp8 or one line": "test_hf_launch.py::test_trainer",
    "accelerate: prepare, schedulers, unwrap_model": "test_hf_traps.py::test_shared_param_groups",
    "accelerate: save_state, load_state, bit-exact": "test_hf_peft.py::test_load_state_is_the_unbroken_run",
    "PEFT LoRA": "test_hf_peft.py::test_saves_and_loads",
    "TRL SFTTrainer, DPOTrainer": "test_hf_trl.py::test_equals_bf16_and_resumes",
    "sequence parallelism (ALST, UlyssesSPAttentionHF): losses of stock": (
        "test_sequence_parallel.py::test_equals_stock"
    ),
    "sequence parallelism: load_checkpoint at other world sizes, with and without": (
        "test_sequence_parallel.py::test_checkpoints"
    ),
    "sequence parallelism: Trainer and accelerate, parallelism_config": (
        "test_sequence_parallel.py::test_trainer"
    ),
    "tensor parallelism by AutoTP: losses of stock": "test_tensor_parallel.py::test_equals_stock",
    "tensor parallelism by an mpu, as Megatron's: losses of stock": (
        "test_tensor_parallel.py::test_equals_stock"
    ),
    "tensor parallelism: norms of data parallelism": (
        "test_tensor_parallel.py::test_norms_are_those_of_data_parallelism"
    ),
    "tensor parallelism: a step that one peer cannot take is skipped by all": (
        "test_tensor_parallel.py::test_every_rank_skips"
    ),
    "tensor parallelism: save_checkpoint, load_checkpoint, bit-exact": (
        "test_split_checkpoints.py::test_resume_is_exact"
    ),
    "tensor parallelism: load_checkpoint at another number of replicas": (
        "test_split_checkpoints.py::test_another_number_of_replicas"
    ),
    "tensor parallelism: ds_fp8 export, to-universal put parts together": (
        "test_split_checkpoints.py::test_export_puts_parts_together"
    ),
    "AutoTP: save_16bit_model, accelerate's get_state_dict": (
        "test_split_checkpoints.py::test_save_16bit_model"
    ),
    "AutoTP: Hugging Face Trainer": "test_tensor_parallel.py::test_trainer",
    "torchao float8 linear layers": "test_hf_torchao.py::test_equals_torchao_with_bf16_states",
    "fp8.scaling tensor: losses of stock DeepSpeed BF16, sum in FP32 and in FP8": (
        "test_parity.py::test_losses_of_fp8_lm_as_published_equal_stock_bf16"
    ),
    "fp8.scaling tensor: load_checkpoint at another world size": (
        "test_tensor_scaling.py::test_3_to_2_to_1_to_3_ranks"
    ),
    "fp8.gradients.autoscale: mu in checkpoints": "test_fp8_sum.py::test_mu_is_saved_and_restored_exactly",
    "O3: describe and the report say what is FP8 and why the rest is not": (
        "test_fp8_weights.py::test_describe_and_the_banner"
    ),
    "fp8.weights.frozen e4m3: LoRA over an FP8 base": (
        "test_o3_frozen.py::test_losses_are_those_of_a_bf16_base"
    ),
    "fp8.weights.frozen e4m3: load_checkpoint, codes to the bit": (
        "test_o3_frozen.py::test_a_checkpoint_has_the_codes"
    ),
    "O3: bytes between steps are those of the estimate": "test_estimates.py::test_fp8_weights",
    "O3: a weight takes 1.0001 bytes per element on every rank": (
        "test_estimates.py::test_an_fp8_weight_takes_a_byte_per_element_and_one_per_tile"
    ),
    "O3: a gather sends 1.00006 bytes per element": "test_bytes.py::test_wire_bytes_of_fp8_weights",
    "O3: micro-steps multiply the same codes": "test_complaints.py::test_micro_steps_multiply_the_same_codes",
    "O3: fp8.stats.interval with engine.compile(): the health of eager products": (
        "test_o3_health.py::test_a_compiled_engine_tells_the_same"
    ),
    "O3: torch.cuda.make_graphed_callables (played on a CPU; an engine's, on a GPU: gpu_graphs_h200.json)": (
        "test_cuda_graphs.py::test_a_graphed_module_gives_the_bits_of_eager"
    ),
    "O3: parameter.record_stream keeps the memory of the codes": (
        "test_fp8_parameter.py::test_a_stream_keeps_the_memory_that_products_read"
    ),
    "offload_optimizer cpu, executors stream and host: the same bits as without, at every level": (
        "test_offload.py::test_offloaded_runs_are_the_same_bits"
    ),
    "offload_optimizer cpu: load_checkpoint to and from other runs, at any number of ranks": (
        "test_offload_checkpoints.py::test_to_an_offloaded_run_and_back"
    ),
    "offload_optimizer cpu: universal checkpoints, zero_to_fp32.py": (
        "test_offload_checkpoints.py::test_an_offloaded_run_saves_and_goes_on_as_any"
    ),
    "offload_optimizer cpu: safe_get_full_*, safe_set_full_*": (
        "test_offload_checkpoints.py::test_whole_tensors_are_read_and_written"
    ),
    "fp8.offload.executor auto: link, cores and level decide": (
        "test_offload_executors.py::test_the_faster_one_is_chosen"
    ),
    "fp8.offload.threads, whatever OMP_NUM_THREADS says": (
        "test_offload_executors.py::test_threads_are_those_of_the_section"
    ),
    "offload_optimizer cpu: no wait of the host per parameter": (
        "test_offload_executors.py::test_the_host_waits_for_no_parameter"
    ),
    "offload_optimizer cpu: bytes are those of the estimate": (
        "test_offload_users.py::test_bytes_are_those_of_the_estimate"
    ),
    "offload_optimizer cpu: a client's AdamW and DeepSpeedCPUAdam": (
        "test_offload_users.py::test_an_optimizer_of_the_client_is_replaced"
    ),
    "offload_optimizer cpu: Hugging Face Trainer, without compiling cpu_adam": (
        "test_offload_users.py::test_hugging_face"
    ),
    "offload_optimizer cpu with tensor parallelism: the same bits as without": (
        "test_tensor_parallel.py::test_offload_changes_no_bit"
    ),
    "engine.offload_states, reload_states": ("test_offload.py::test_states_go_to_host_memory_and_come_back"),
    "ranks that disagree get an error that says so": "test_agreement.py::test_disagreement_is_told",
    "pairs of stage, level, offload, LoRA, ALST, AutoTP, scaling, hops, compile, checkpointing, autocast": (
        "test_pairs.py::test_works"
    ),
    "a resume across stages, levels and offload, and back": "test_pairs.py::test_resumes_across_features",
}

# The same under ZeRO 3.
FILES3 = "test_zero3_checkpoints.py"
O3_UNDER_3 = "test_zero3_o3.py"
PROVED_UNDER_3 = {
    "ZeRO 3: bytes between steps are those of the estimate": "test_estimates.py::test_fp8_sliced",
    "ZeRO 3: a fetch sends 2 bytes per element, gradients 1.0078": "test_bytes.py::test_wire_bytes_of_zero_3",
    "ZeRO 3: load_checkpoint, bit-exact": f"{FILES3}::test_resume_is_exact",
    "ZeRO 3: load_checkpoint at other stages and world sizes": f"{FILES3}::test_stages_ranks_and_buckets",
    "ZeRO 3: weights without states, out of any stage": f"{FILES3}::test_weights_without_states",
    "ZeRO 3: zero_to_fp32.py, save_16bit_model, export, to-universal": f"{FILES3}::test_what_leaves",
    "ZeRO 3: sequence parallelism (ALST)": "test_sequence_parallel.py::test_zero3_is_zero2",
    'ZeRO 3: accelerate, keys that are "auto" when the model is made': (
        "test_hf_zero3.py::test_accelerate_fills_in_after_the_model_is_made"
    ),
    "ZeRO 3: states of stock ZeRO 1, 2 and 3": f"{FILES3}::test_states_of_stock_deepspeed",
    "ZeRO 3 at O3: losses, norms, states and codes of ZeRO 2, bit for bit": (
        f"{O3_UNDER_3}::test_zero_3_is_zero_2_bit_for_bit"
    ),
    "ZeRO 3 at O3: modules, GatheredParameters and 16-bit state_dicts have the same bits": (
        f"{O3_UNDER_3}::test_whoever_reads_has_the_same_bits"
    ),
    "ZeRO 3 at O3: edits by GatheredParameters and safe_set_full_fp32_param": f"{O3_UNDER_3}::test_edits",
    "ZeRO 3 at O3: load_checkpoint at other stages and world sizes": (
        f"{O3_UNDER_3}::test_checkpoints_of_other_stages_and_ranks"
    ),
    "ZeRO 3 at O3: zero_to_fp32.py, ds_fp8 export and its --fp8, weights without states": (
        f"{O3_UNDER_3}::test_what_leaves"
    ),
    "ZeRO 3 at O3: bytes between steps are those of the estimate": "test_estimates.py::test_fp8_slices",
    "ZeRO 3 at O3: a fetch sends 1 byte per element": (
        "test_bytes.py::test_wire_bytes_of_fp8_weights_under_zero_3"
    ),
    "ZeRO 3, fp8.weights.frozen e4m3: LoRA over a base that was trained, losses of a BF16 base": (
        f"{O3_UNDER_3}::test_lora_over_a_trained_base_ends_where_that_over_bf16_does"
    ),
    "ZeRO 3, fp8.weights.frozen e4m3: load_checkpoint, values to the bit": (
        f"{O3_UNDER_3}::test_a_checkpoint_has_the_base"
    ),
    "ZeRO 3: every pair that is not refused": "test_pairs.py::test_works",
}

# Keys of a ds_config, and the message that refuses them.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ZeRO 0": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: received 0, allowed: 1, 2, 3"),
    "fp8.scaling tensor under ZeRO 3": (
        {"zero_optimization": {"stage": 3}, "fp8": {"scaling": "tensor"}},
        'fp8.scaling: received "tensor", allowed: "block" with zero_optimization.stage 3',
    ),
    "fp8.gradients.reduction fp8 under ZeRO 3": (
        {"zero_optimization": {"stage": 3}, "fp8": {"scaling": "tensor", "gradients": {"reduction": "fp8"}}},
        'fp8.gradients.reduction: received "fp8", allowed: "fp32" with zero_optimization.stage 3',
    ),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": (
        {"zero_optimization": {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}},
        "zero_optimization.stage3_use_all_reduce_for_fetch_params: received true",
    ),
    "zero_optimization.offload_optimizer to NVMe": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
        'zero_optimization.offload_optimizer.device: received "nvme", allowed: "cpu", "none"',
    ),
    "zero_optimization.zenflow": (
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        "zero_optimization.zenflow: received",
    ),
    "offload_optimizer with one scale per tensor": (
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "fp8": {"scaling": "tensor"},
        },
        'fp8.scaling: received "tensor", allowed: "block" with zero_optimization.offload_optimizer',
    ),
    **{
        f"zero_optimization.{key} under ZeRO 3": (
            {"zero_optimization": {"stage": 3, key: value}},
            f"zero_optimization.{key}: received",
        )
        for key, value in {
            "offload_param": {"device": "cpu"},
            "zero_quantized_weights": True,
            "zero_quantized_nontrainable_weights": True,
            "zero_quantized_gradients": True,
            "zero_hpz_partition_size": 2,
        }.items()
    },
    "fp8.weights.frozen e4m3 with fp16": (
        {"fp16": {"enabled": True}, "fp8": {"enabled": True, "weights": {"frozen": "e4m3"}}},
        'fp16.enabled: received true, allowed: false with fp8.weights.frozen "e4m3"',
    ),
    "O3 with fp16, and so a dynamic loss scale": (
        {"fp16": {"enabled": True}, "fp8": {"opt_level": "O3"}},
        'fp16.enabled: received true, allowed: false with fp8.opt_level "O3"',
    ),
    "O3 with split masters": (
        {"fp8": {"enabled": True, "opt_level": "O3", "optimizer": {"master_dtype": "split16"}}},
        'fp8.optimizer.master_dtype: received "split16", allowed: "fp32", "fp16", "bf16"',
    ),
    "O3 with one scale per tensor": (
        {"fp8": {"enabled": True, "opt_level": "O3", "scaling": "tensor"}},
        'fp8.scaling: received "tensor", allowed: "block" with fp8.opt_level "O3"',
    ),
    "torch_autocast under ZeRO 3": (
        {"zero_optimization": {"stage": 3}, **AUTOCAST},
        'torch_autocast: received {"enabled": true, "dtype": "bfloat16"}',
    ),
    "torch_autocast in float16": (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        'torch_autocast.dtype: received "float16", allowed: "bfloat16"',
    ),
    "communication_data_type": ({"communication_data_type": "fp32"}, "communication_data_type: received"),
    "DeepCompile's passes autosp and autotp": (
        {"compile": {"deepcompile": True, "passes": ["autosp"]}},
        'compile.passes: received ["autosp"], allowed: the key left out',
    ),
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, "hybrid_engine: received"),
    "tensor parallelism under ZeRO 3": (
        {"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel: received",
    ),
    **{
        f"{name} with tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}, **keys}, words)
        for name, keys, words in (
            (
                "O3",
                {"fp8": {"enabled": True, "opt_level": "O3"}},
                'fp8.opt_level: received "O3", allowed: "O1", "O2", "O2+" with tensor_parallel.autotp_size 2',
            ),
            (
                "fp8.scaling tensor",
                {"fp8": {"enabled": True, "scaling": "tensor"}},
                'fp8.scaling: received "tensor", allowed: "block" with tensor_parallel.autotp_size 2',
            ),
            (
                "two hops",
                {"fp8": {"enabled": True, "gradients": {"intra_node_size": 2}}},
                "fp8.gradients.intra_node_size: received 2, allowed: the key left out with tensor_parallel",
            ),
            (
                "load_universal",
                {"checkpoint": {"load_universal": True}},
                "checkpoint.load_universal: received true, allowed: false with tensor_parallel",
            ),
            (
                "use_node_local_storage",
                {"checkpoint": {"use_node_local_storage": True}},
                "checkpoint.use_node_local_storage: received true, allowed: false with tensor_parallel",
            ),
        )
    },
    "sequence parallelism by a mesh": (
        {"sequence_parallel_size": 2, "data_parallel_size": 2},
        "data_parallel_size: received 2, allowed: the key left out beside sequence_parallel_size",
    ),
    "expert parallelism": ({"expert_parallel": {"enabled": True}}, "expert_parallel: received"),
    "bf16_master_weights_and_grads": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads: received true",
    ),
    "bf16_optimizer_states": (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "bf16.bf16_optimizer_states: received true",
    ),
    "other optimizers": ({"optimizer": {"type": "Lamb"}}, 'optimizer.type: received "Lamb", allowed: Adam'),
}

# What only model or arguments show, and the message.
REFUSED_BY_MODEL = {
    "a PipelineModule": "deepspeed.initialize: received a PipelineModule, allowed with fp8",
    "a model with MoE layers": "deepspeed.initialize: received a model with MoE layers, allowed with fp8",
    "an mpu with pipeline stages": "deepspeed.initialize: received an mpu with pipeline stages",
    "sequence_parallel_size without DeepSpeed's mpu": "sequence_parallel_size: received 2, allowed: 1",
    "grad_accum_dtype other than ours": "data_types.grad_accum_dtype: received",
    "sparse embeddings": "sparse: received true",
    "O3 and no matrix that can be FP8": "O3 would do nothing",
}


def build_feature(name: str, stage: int, fp8: bool) -> Any:
    """The engine of a feature, with FP8 or as stock DeepSpeed."""
    feature = FEATURES[name]
    if not fp8:
        stage = feature.stock_stage or (feature.stock_under_3 if stage == 3 else stage)
    options = dict(feature.config)
    if stage == 3:
        options["zero"] = zero3() | options.get("zero", {})
    config = ds_config(feature.fp8 if fp8 else None, stage=stage, **options) | feature.extra
    scheduler = None if fp8 else feature.stock_scheduler
    if scheduler is not None:
        del config["scheduler"]
    torch.manual_seed(0)
    model = (feature.model if fp8 else feature.stock_model or feature.model)()
    optimizer = None
    if feature.optimizer is not None:
        del config["optimizer"]
        optimizer = feature.optimizer(model)
    engine = build(config, model, lr_scheduler=scheduler, optimizer=optimizer)
    if feature.prepare is not None:
        feature.prepare(engine)
    return engine


def markdown() -> str:
    """docs/support.md."""
    lines = [
        "# What works, and what is refused",
        "",
        "Generated by `make support` from the tests that prove it. A training row is 30 steps on 2 ranks",
        "within 0.01 of stock DeepSpeed in loss under the same conditions, gradient norms within 2 % over",
        "the first 10, with O2 as it is if the row does not say otherwise. Rows of O3: every matrix in FP8,",
        "products emulated ([o3.md](o3.md)).",
        "",
        "## Works",
        "",
        "| feature | ZeRO | test |",
        "|---|---|---|",
    ]
    for name, feature in FEATURES.items():
        stages = ", ".join(map(str, feature.stages))
        lines.append(
            f"| {name} | {stages} | yes: `test_support.py::test_works[{name}-{feature.stages[-1]}]` |"
        )
    lines += [f"| {name} | 1, 2 | yes: `{test}` |" for name, test in PROVED_ELSEWHERE.items()]
    lines += [f"| {name} | 3 | yes: `{test}` |" for name, test in PROVED_UNDER_3.items()]
    lines += ["", "## Refused", "", "| what | refused, in the words |", "|---|---|"]
    lines += [f"| {name} | `{message}` |" for name, (_, message) in REFUSED.items()]
    lines += [f"| {name} | `{message}` |" for name, message in REFUSED_BY_MODEL.items()]
    lines += [
        "",
        "Values of the fp8 section that are not built yet are listed in [options.md](options.md).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
