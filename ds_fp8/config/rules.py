"""The tables behind `ds_config`: how every other key of a ds_config is treated when FP8 is on.

Every top-level key and every field of the sections listed here is honoured, is without effect, or
is refused by name. A test enumerates them from the installed DeepSpeed and fails on one that is
missing. Where ZeRO 3 treats a key in another way than ZeRO 1 and 2, the table has both rules.
"""

from collections.abc import Mapping

from ds_fp8.config.rule_kinds import ByStage, Honoured, NoEffect, Refused, Rule, only_below_3, only_zero3

Rules = Mapping[str, Rule | ByStage]

HONOURED = Honoured()
OWN_DTYPES = NoEffect("dtypes of states and gradients are those of the fp8 section")
OTHER_OPTIMIZER = NoEffect("FP8AdamW replaces the optimizer")
FP32_SUM = NoEffect("the ranks' gradients are added in FP32, where no factor is needed")
GATHERED = ByStage(
    NoEffect("weights are gathered one bucket at a time"),
    NoEffect("weights are fetched when a module needs them"),
)
GATHERED_FOR_A_SAVE = (
    "gather_16bit_weights_on_model_save",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
NOT_WITH_FP8 = "does not work with fp8 enabled"
NOT_YET = "is not built yet with fp8 enabled"
AS_THE_MODEL = (
    f'{NOT_WITH_FP8}: weights travel in the model\'s dtype, or as FP8 codes with fp8.opt_level "O3"'
)

TOP_LEVEL: Rules = {
    **dict.fromkeys(
        (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "optimizer",
            "scheduler",
            "bf16",
            "bfloat16",
            "fp16",
            "fp8",
            "managed_gradient_accumulation",
            "gradient_allreduce_op",
            "data_types",
            "compile",
            "checkpoint",
            "zero_optimization",
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "dataloader_drop_last",
            "disable_python_gc",
            "activation_checkpointing",
            "flops_profiler",
            "comms_logger",
            "tensorboard",
            "csv_monitor",
            "wandb",
            "comet",
            "log_level",
            "timers",
            "autotuning",
            "vocabulary_size",
            "data_efficiency",
        ),
        HONOURED,
    ),
    "msamp": NoEffect("MS-AMP's section, switched off"),
    "zero_allow_untested_optimizer": OTHER_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": OTHER_OPTIMIZER,
    "aio": NoEffect("states are not written to files"),
    "seq_parallel_communication_data_type": NoEffect(
        "gradients travel in fp8.gradients.dtype and are added in FP32"
    ),
    "use_data_before_expert_parallelism": NoEffect("there are no experts"),
    "torch_autocast": ByStage(
        HONOURED, Refused(f"{NOT_WITH_FP8} under ZeRO 3, which fetches weights in the model's dtype")
    ),
    "communication_data_type": Refused(
        "is replaced by fp8.gradients.dtype: left out, gradients travel in FP8 and are added in FP32; "
        '"fp8": {"gradients": {"dtype": "bf16"}} sends 16 bits',
        (None,),
    ),
    "gradient_accumulation_dtype": Refused("is data_types.grad_accum_dtype in DeepSpeed"),
    "prescale_gradients": FP32_SUM,
    "gradient_predivide_factor": FP32_SUM,
    "disable_allgather": NoEffect("DeepSpeed's ZeRO does not read it", (False,)),
    "datastates_ckpt": Refused(NOT_YET),
    "hybrid_engine": Refused(NOT_WITH_FP8),
    "pipeline": NoEffect("the model is not a PipelineModule"),
    "tensor_parallel": ByStage(
        HONOURED, Refused(f"{NOT_WITH_FP8} under ZeRO 3", ({}, {"autotp_size": 0}, {"autotp_size": 1}))
    ),
    "expert_parallel": Refused(NOT_WITH_FP8),
    "sequence_parallel_size": HONOURED,
    "data_parallel_size": NoEffect("it follows from the number of ranks", (1,)),
    "weight_quantization": Refused(NOT_WITH_FP8),
    # Of older versions; newer ones refuse them themselves.
    **dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        Refused(NOT_WITH_FP8, (False, None)),
    ),
}

ZERO: Rules = {
    "stage": HONOURED,
    "reduce_bucket_size": HONOURED,
    "overlap_comm": HONOURED,
    "contiguous_gradients": NoEffect("gradients are packed into the message that travels"),
    "reduce_scatter": NoEffect("gradients go to their owners by all-to-all"),
    "use_multi_rank_bucket_allreduce": NoEffect("gradients go to their owners by all-to-all"),
    **dict.fromkeys(("allgather_partitions", "allgather_bucket_size"), GATHERED),
    "compute_grad_norm": NoEffect("the norm decides whether a step is skipped and is always computed"),
    "load_from_fp32_weights": NoEffect("masters are restored as they were saved"),
    "ignore_unused_parameters": NoEffect("unused parameters count as zero gradients"),
    "legacy_stage1": Refused(NOT_WITH_FP8, (False,)),
    "round_robin_gradients": only_below_3(NoEffect("every bucket is spread evenly over the ranks", (False,))),
    "parameter_alignment": only_below_3(Refused(NOT_WITH_FP8, (False,))),
    "elastic_checkpoint": NoEffect("checkpoints load at any world size", (False,)),
    "offload_param": only_zero3(Refused(NOT_YET, (None, {"device": "none"}))),
    "offload_optimizer": HONOURED,
    "cpu_offload": HONOURED,
    "cpu_offload_param": only_zero3(Refused(NOT_YET, (None, False))),
    "cpu_offload_use_pin_memory": NoEffect("is offload_optimizer.pin_memory in DeepSpeed", (None,)),
    "zenflow": Refused(NOT_WITH_FP8, (None,)),
    "zero_hpz_partition_size": only_zero3(
        Refused(f"{NOT_WITH_FP8}; gradients go node by node with fp8.gradients.intra_node_size", (0, 1))
    ),
    "zero_quantized_weights": only_zero3(Refused(AS_THE_MODEL, (False,))),
    "zero_quantized_nontrainable_weights": only_zero3(Refused(AS_THE_MODEL, (False,))),
    "zero_quantized_gradients": only_zero3(Refused("is replaced by fp8.gradients.dtype", (False,))),
    "zeropp_loco_param": only_zero3(Refused(NOT_WITH_FP8, (None,))),
    "mics_shard_size": Refused(NOT_WITH_FP8, (-1,)),
    "mics_hierarchical_params_gather": Refused(NOT_WITH_FP8, (False,)),
    "enable_sanity_checks": ByStage(NoEffect("the handler has checks of its own"), HONOURED),
    "save_muon_momentum_buffer_in_memory": OTHER_OPTIMIZER,
    **dict.fromkeys(
        (
            "prefetch_bucket_size",
            "stage3_prefetch_bucket_size",
            "param_persistence_threshold",
            "stage3_param_persistence_threshold",
            "model_persistence_threshold",
            "stage3_model_persistence_threshold",
            "max_live_parameters",
            "stage3_max_live_parameters",
            "max_reuse_distance",
            "stage3_max_reuse_distance",
            "module_granularity_threshold",
            "stage3_module_granularity_threshold",
            "memory_efficient_linear",
            "override_module_apply",
            "log_trace_cache_warnings",
            "leaf_module",
        ),
        only_zero3(HONOURED),
    ),
    **dict.fromkeys(GATHERED_FOR_A_SAVE, ByStage(NoEffect("a key of ZeRO 3 and AutoTP"), HONOURED)),
    **dict.fromkeys(
        ("use_all_reduce_for_fetch_params", "stage3_use_all_reduce_for_fetch_params"),
        only_zero3(Refused(f"{NOT_WITH_FP8}: slices are fetched by all-gather", (False,))),
    ),
    **dict.fromkeys(
        ("allgather_sequential", "stage3_allgather_sequential"),
        only_zero3(NoEffect("what a module needs is fetched in one message, a large parameter alone")),
    ),
    "sub_group_size": only_zero3(NoEffect("the step processes one bucket at a time")),
    "pipeline_loading_checkpoint": only_zero3(NoEffect("a rank reads only what it owns of a checkpoint")),
}

# Fields that one end of the supported range of DeepSpeed has and the other has not.
NOT_IN_EVERY_VERSION = {
    "autoep_non_moe",
    "compute_grad_norm",
    "mics_hierarchical_params_gather",
    "mics_shard_size",
    "offload_activation_pin_memory",
    "parameter_alignment",
    "zeropp_loco_param",
}

BF16: Rules = {
    "enabled": HONOURED,
    "immediate_grad_update": NoEffect("a key of DeepSpeed's BF16 optimizer"),
    "check_grad_overflow": NoEffect("non-finite gradients are always looked for"),
    "bf16_master_weights_and_grads": Refused("is replaced by fp8.optimizer.master_dtype", (False,)),
    "bf16_optimizer_states": Refused("is replaced by fp8.optimizer.exp_avg_dtype", (False,)),
}

FP16: Rules = {
    **dict.fromkeys(
        (
            "enabled",
            "auto_cast",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        ),
        HONOURED,
    ),
    "fp16_master_weights_and_grads": Refused("is replaced by fp8.optimizer.master_dtype", (False,)),
}

DATA_TYPES: Rules = dict.fromkeys(
    ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"), HONOURED
)

AUTOCAST: Rules = {
    **dict.fromkeys(("enabled", "dtype"), HONOURED),
    "lower_precision_safe_modules": NoEffect("decides in which dtype gradients travel: fp8.gradients.dtype"),
}

# DeepSpeed before 0.15 read these; one that no longer knows them refuses them, so it does not see them.
OLD_COMPILE: Rules = dict.fromkeys(
    ("enabled", "disable", "backend", "kwargs"),
    NoEffect("DeepSpeed no longer reads it: call engine.compile(backend=...)"),
)

COMPILE: Rules = {
    **OLD_COMPILE,
    "deepcompile": NoEffect(
        "engine.compile() is torch.compile; DeepCompile's passes act on buffers of DeepSpeed's own ZeRO",
        (False,),
    ),
    "autoep_non_moe": Refused("compiles around layers of AutoEP, which fp8 refuses", (False,)),
    **dict.fromkeys(
        (
            "free_activation",
            "free_activation_threshold",
            "offload_activation",
            "offload_activation_pin_memory",
            "offload_opt_states",
            "double_buffer",
            "symmetric_memory",
            "debug_log",
            "offload_parameters",
            "sync_before_reduce",
            "sync_after_reduce",
            "sync_before_allgather",
            "sync_after_allgather",
            "keep_int_input_tensors",
            "keep_all_input_tensors",
            "passes",
        ),
        NoEffect("a key of DeepCompile"),
    ),
}

CHECKPOINT: Rules = {
    "tag_validation": HONOURED,
    "use_node_local_storage": HONOURED,
    "parallel_write": NoEffect("a key of pipeline parallelism"),
    "checkpoint_serialization": Refused("lets a rank read only what it needs", (True, None)),
    "load_universal": HONOURED,
    "writer": Refused(NOT_YET, (None,)),
}

OPTIMIZER: Rules = {
    **dict.fromkeys(("type", "params"), HONOURED),
    "legacy_fusion": NoEffect("a key of DeepSpeed's FP16 optimizer"),
}

# DeepSpeed refuses keys that it does not know in its other sections.
SECTIONS_WITH_NOTES = ("data_types", "checkpoint", "torch_autocast", "optimizer")

SECTIONS: dict[str, Rules] = {
    "zero_optimization": ZERO,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "data_types": DATA_TYPES,
    "checkpoint": CHECKPOINT,
    "compile": COMPILE,
    "torch_autocast": AUTOCAST,
    "optimizer": OPTIMIZER,
}
