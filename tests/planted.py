"""Faults that were planted once, and the test that sees each: `python tests/planted.py [WORDS OF A NAME]`.

Each is a line of the package that is replaced in a copy of the checkout, where its test must then fail, as
part of `make test`. A change to the tests keeps them seen.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600


@dataclass(frozen=True)
class Fault:
    name: str
    path: str
    right: str  # stands in the file once
    wrong: str
    test: str  # file, and words for pytest's -k


BACKWARDS = "test_backwards.py"
ADD_UP = f"{BACKWARDS} line_4_gradients_add_up"
FAULTS = (
    # Gradients, weights and hooks
    Fault(
        "a rebound weight stays where it is",
        "zero_fp8/weights/views.py",
        "if home.was_left_by(parameter):",
        "if False:",
        f"{BACKWARDS} line_2_rebound",
    ),
    Fault(
        "another shape is not looked for",
        "zero_fp8/weights/home.py",
        "if (parameter.shape, parameter.dtype, parameter.device) == (home.shape, dtype, home.device):",
        "if True:",
        f"{BACKWARDS} line_2_another_shape",
    ),
    Fault(
        "a save takes buffers that were left",
        "zero_fp8/handlers/common.py",
        "        self.binding.require()\n        return self.roster",
        "        return self.roster",
        f"{BACKWARDS} line_2_masters",
    ),
    Fault(
        "hooks hang on the parameter",
        "zero_fp8/gradients/schedule.py",
        "LastHook(accumulating_node(parameters[index]), on_gradient)",
        "LastHook(parameters[index], on_gradient)",
        "test_bytes.py wire_bytes",
    ),
    Fault(
        "outputs divide",
        "ds_fp8/seam/backward.py",
        "        self._backward_prologue()\n        return grad\n",
        "        self._backward_prologue()\n        return original(self, grad)\n",
        ADD_UP,
    ),
    Fault(
        "arrivals are not divided",
        "zero_fp8/gradients/backwards.py",
        "return None if divisor == 1 else gradient / divisor",
        "return None",
        ADD_UP,
    ),
    Fault(
        "each backward begins anew",
        "zero_fp8/gradients/reducer.py",
        '"""Called when a backward begins: buckets may be sent."""\n',
        '"""Called when a backward begins: buckets may be sent."""\n        self.drop()\n',
        ADD_UP,
    ),
    Fault(
        "torch.autograd.grad is a backward",
        "zero_fp8/gradients/backwards.py",
        "    if not torch.autograd.Variable._execution_engine.is_checkpoint_valid():\n        return False\n",
        "    return True\n",
        ADD_UP,
    ),
    Fault(
        "a gradient of an output is a backward",
        "zero_fp8/gradients/backwards.py",
        "return not followers or any(_executes(each) for each in followers)",
        "return True",
        ADD_UP,
    ),
    Fault(
        "a retained graph has one prologue",
        "ds_fp8/seam/backward.py",
        "        self._backward_prologue()\n        return grad\n",
        "        return grad\n",
        f"{BACKWARDS} retained_graph",
    ),
    Fault(
        "the step looks for no late gradients",
        "zero_fp8/gradients/pending.py",
        "return sum(map(self._waits, self.parameters))",
        "return 0",
        f"{BACKWARDS} no_sync",
    ),
    Fault(
        "zero_grad keeps reduced gradients",
        "ds_fp8/seam/backward.py",
        "        if is_active(self):\n            self.optimizer.zero_grad()",
        "        if False:\n            self.optimizer.zero_grad()",
        ADD_UP,
    ),
    Fault(
        "a fixed loss scale is not asked for",
        "zero_fp8/handlers/common.py",
        "return super().needs_scaler() or self.loss_scale != 1",
        "return super().needs_scaler()",
        f"{BACKWARDS} unscaled",
    ),
    Fault(
        "gradients without a taker are passed over",
        "zero_fp8/handlers/roster.py",
        "                if unnamed:\n",
        "                if False:\n",
        f"{BACKWARDS} line_5_gradients",
    ),
    Fault(
        "files are written with what is frozen now",
        "zero_fp8/handlers/roster.py",
        "                each.requires_grad_(required)\n            yield",
        "                pass\n            yield",
        f"{BACKWARDS} line_5_freezing",
    ),
    Fault(
        "hooks of nodes come too late",
        "zero_fp8/gradients/schedule.py",
        "        for hook in self._hooks.values():\n            hook.renew()\n",
        "",
        "test_owners.py nodes",
    ),
    Fault(
        "a lazy sign is lost",
        "zero_fp8/gradients/pending.py",
        "            gradient = gradient.resolve_neg()\n",
        "            pass\n",
        "test_owners.py lazy_sign",
    ),
    Fault(
        "every hook has a gradient",
        "zero_fp8/gradients/backwards.py",
        "if gradient is None or ENGINE_BACKWARDS.running",
        "if ENGINE_BACKWARDS.running",
        "test_owners.py without_a_gradient",
    ),
    Fault(
        "autograd does not see a step",
        "zero_fp8/step.py",
        "            torch.autograd.graph.increment_version(self._parameters.values())\n",
        "",
        "test_owners.py before_the_step",
    ),
    Fault(
        "two engines have one parameter",
        "zero_fp8/weights/claims.py",
        "            earlier.give_up()\n",
        "            pass\n",
        "test_owners.py second_engine",
    ),
    Fault(
        "shared memory is not looked for",
        "zero_fp8/placement/parameters.py",
        "    check_memory(parameters, names)\n",
        "",
        "test_owners.py tied_by_data",
    ),
    Fault(
        "a client's new dicts are not read",
        "zero_fp8/optimizer/client.py",
        "            if values is not group:\n",
        "            if False:\n",
        "test_owners.py whichever_dicts",
    ),
    Fault(
        "freed memory is gathered",
        "zero_fp8/weights/views.py",
        "return self.buffer.untyped_storage().nbytes() < self.buffer.nbytes",
        "return False",
        "test_owners.py given_back",
    ),
    # Numbers
    Fault(
        "zero has something below it, in the reference",
        "ops/masters.py",
        "    low = torch.where(high << 1 == 0, low.clamp(min=0), low)\n",
        "",
        "test_masters.py zero",
    ),
    Fault(
        "zero has something below it, in C++",
        "ops/csrc/masters.h",
        "(u32)(low & ~borrowed)",
        "(u32)low",
        "test_cpu_adam.py",
    ),
    Fault(
        "squares are not rounded to a grid, in the reference",
        "ops/exact.py",
        "(rows.to(torch.float64).square() + grid) - grid",
        "rows.to(torch.float64).square()",
        "test_norm.py same_bits",
    ),
    # Memory
    Fault(
        "a damaged library is loaded",
        "ops/cpu/build.py",
        "return digest_path(library).read_text() == digest_of(library)",
        "return library.exists()",
        "test_build.py damaged",
    ),
    Fault(
        "a CXX that is not there is passed over",
        "ops/cpu/build.py",
        "        return shlex.join([program, *arguments])\n",
        "        return shlex.join([program, *arguments])\n    return None\n",
        "test_build.py cxx_that_does_not_exist",
    ),
    Fault(
        "a sweep trusts its tensors",
        "ops/guards.py",
        '    """Before `ops.adam.adam_step`. planned: rows that the plan was made for."""\n',
        '    """Before `ops.adam.adam_step`. planned: rows that the plan was made for."""\n    return\n',
        "test_guards.py sweep",
    ),
    Fault(
        "FP8AdamW trusts sizes",
        "zero_fp8/optimizer/fp8_adamw.py",
        '            self._standalone.check(f"FP8AdamW',
        '            continue\n            self._standalone.check(f"FP8AdamW',
        "test_alone_changed.py",
    ),
    # Checkpoints
    Fault(
        "ranks agree about errors for users only",
        "zero_fp8/comm/agreement.py",
        "    except Exception as error:\n",
        "    except (ValueError, OSError) as error:\n",
        "test_foreign.py refusal_on_one_rank",
    ),
    Fault(
        "client_state overwrites",
        "ds_fp8/seam/saving.py",
        "    check_client_state(client_state)\n",
        "",
        "test_checkpoint_options.py client_state",
    ),
    Fault(
        "ranks save where each likes",
        "ds_fp8/seam/saving.py",
        "    check_same_folder(engine, save.folder)\n",
        "",
        "test_arguments.py save",
    ),
    Fault(
        "ranks load what each finds",
        "ds_fp8/seam/loading.py",
        "    check_same_checkpoint(engine, folder, saved)\n",
        "",
        "test_arguments.py load",
    ),
    Fault(
        "any name is a tag",
        "zero_fp8/checkpoint/tags.py",
        "    if allowed := objection(tag):\n",
        "    if allowed := None:\n",
        "test_tags.py",
    ),
    Fault(
        "blocks are in whatever file",
        "zero_fp8/checkpoint/manifest.py",
        "if not 0 <= index < count:",
        "if False:",
        "test_manifest.py not_listed",
    ),
    Fault(
        "any version is this one",
        "zero_fp8/checkpoint/manifest.py",
        "if received == FORMAT_VERSION:",
        "if received:",
        "test_manifest.py another_version",
    ),
    Fault(
        "files of a place come in another order",
        "ds_fp8/seam/saving.py",
        "        optimizer_files=written.states,\n",
        "        optimizer_files=written.states[::-1],\n",
        "test_reshard.py where_every_block_lies",
    ),
    # Words
    Fault(
        "values are not cut",
        "ds_fp8/config/refusals.py",
        "LONGEST = 200",
        "LONGEST = 10**9",
        "test_config.py",
    ),
    Fault(
        "a newer torch is passed over",
        "ds_fp8/compat.py",
        "if Version(installed).release[:2] > TESTED_TORCH.release:",
        "if False:",
        "test_registration.py torch",
    ),
    Fault(
        "links are as they are",
        "setup.py",
        "    return LINK.sub(absolute, readme)",
        "    return readme",
        "test_packaging.py links_of_the_readme",
    ),
    Fault(
        "DeepSpeed's builds are silent",
        "ds_fp8/seam/registration.py",
        '    (OpBuilder, "jit_load", builds.jit_load),\n',
        "",
        "test_builds.py registered",
    ),
    # ZeRO 3
    Fault(
        "buckets leave where gradients arrive",
        "zero_fp8/wiring.py",
        "        if settings.stage < 3:\n",
        "        if True:\n",
        "test_zero3.py different_collectives",
    ),
    Fault(
        "a rank waits for a bucket in backward",
        "zero_fp8/gradients/schedule.py",
        "    patient = True\n",
        "    patient = False\n",
        "test_zero3.py different_collectives",
    ),
    Fault(
        "buckets leave before they are full",
        "zero_fp8/gradients/schedule.py",
        "return not self._missing[bucket] and self._is_its_turn(bucket)",
        "return self._is_its_turn(bucket)",
        "test_schedule.py waits",
    ),
    Fault(
        "the order is never learnt anew",
        "zero_fp8/gradients/reducer.py",
        "        if tried.changed:\n",
        "        if False:\n",
        "test_zero3.py learnt_anew",
    ),
    Fault(
        "persistent parameters keep their old weights",
        "zero_fp8/handlers/stage3.py",
        "            self.fetching.release()\n        if objection",
        "            pass\n        if objection",
        "test_zero3.py bit_for_bit",
    ),
    Fault(
        "an engine leaves its autograd functions to the next one",
        "zero_fp8/handlers/fetching.py",
        "            module.__dict__.pop(name, None)\n",
        "            pass\n",
        "test_zero3_users.py engine_leaves",
    ),
    Fault(
        "a retained graph is not fetched for again",
        "zero_fp8/handlers/fetching.py",
        "sub_module.applied_pre_backward_ref_cnt += 1",
        "sub_module.applied_pre_backward_ref_cnt += 0",
        "test_zero3_users.py retained_graph",
    ),
    Fault(
        "the coordinator waits for a fetch that others have taken",
        "zero_fp8/weights/sliced/fetch.py",
        "            awaited.pop(each, None)",
        "            pass",
        "test_zero3_users.py under_way",
    ),
    Fault(
        "a refused edit stays on its rank",
        "zero_fp8/handlers/stage3.py",
        "            self.fetching.restore()\n",
        "            pass\n",
        "test_zero3_users.py replaced_weights",
    ),
    Fault(
        "buckets of a backward that was cut off stay with some ranks",
        "zero_fp8/gradients/reducer.py",
        "            self._catch_up()\n",
        "            pass\n",
        "test_leftovers.py under_zero_3",
    ),
    Fault(
        "a slice is set past its parameter's end",
        "zero_fp8/handlers/full_tensors.py",
        "            _write(flat[: piece.numel], owned, piece.rows, optim_state_key)\n",
        "            _write(flat, owned, piece.rows, optim_state_key)\n",
        "test_access.py zero_3",
    ),
    Fault(
        "upper halves of split masters are not restored",
        "zero_fp8/checkpoint/reader.py",
        "                    if saved.master.format.split:\n",
        "                    if False:\n",
        "test_zero3_checkpoints.py stages_ranks",
    ),
    Fault(
        "upper halves are taken from other blocks",
        "zero_fp8/checkpoint/reader.py",
        "self._upper_half(file, name, blocks)[part] for _, file",
        "self._upper_half(file, name, blocks)[: part.stop - part.start] for _, file",
        "test_zero3_checkpoints.py stages_ranks",
    ),
    Fault(
        "frozen slices are cut by another rank's place",
        "zero_fp8/placement/parameters.py",
        '    first = getattr(parameter, "ds_zero_partition_rank", 0) * held\n',
        "    first = 0 * held\n",
        "test_zero3_checkpoints.py resume_is_exact",
    ),
    Fault(
        "weights without states are left alone",
        "ds_fp8/seam/loading.py",
        "    if not states:\n",
        "    if False:\n",
        "test_zero3_checkpoints.py weights_without_states",
    ),
    Fault(
        "weights without states are not verified",
        "ds_fp8/seam/loading.py",
        "wanted.states or not saved.places[0].has_whole_weights",
        "wanted.states",
        "test_zero3_checkpoints.py damaged",
    ),
    Fault(
        "a save is collective where a rank may fail",
        "ds_fp8/seam/saving.py",
        "            handler.saved.ready_to_save(writes=engine.save_non_zero_checkpoint),\n",
        "",
        "test_failed_saves.py 3-scheduler",
    ),
    Fault(
        "masters are not made of codes in a model file",
        "zero_fp8/checkpoint/manifest.py",
        'return encoded if self.weights == "codes" else set()',
        "return set()",
        "test_o3_checkpoints.py weights_alone",
    ),
    Fault(
        "values given to an FP8 weight are kept for its master",
        "zero_fp8/weights/tiled.py",
        "self.given(part.piece).copy_(values.detach().reshape(-1)[part.piece.elements])",
        "pass",
        "test_o3_checkpoints.py weights_alone",
    ),
    Fault(
        "an edit of an FP8 weight is over after a step",
        "zero_fp8/weights/tiled.py",
        "        self._given.clear()\n",
        "",
        "test_o3_checkpoints.py edits",
    ),
    Fault(
        "what was written to a gathered FP8 weight is dropped",
        "zero_fp8/weights/sliced/codes.py",
        "                codes.take(each)\n",
        "                pass\n",
        "test_zero3_o3.py edits",
    ),
    Fault(
        "a fetch does not wait for the sweep on a GPU",
        "zero_fp8/weights/sliced/fetch.py",
        "    slices.wait()\n",
        "",
        "test_zero3_o3.py waits_for_what_writes",
    ),
    Fault(
        "ranks have scales of their own for parts of a tile",
        "zero_fp8/weights/tiled.py",
        "        max_over_ranks(agreed, nodes.group)\n",
        "",
        "test_zero3_o3.py bit_for_bit",
    ),
    Fault(
        "a save drops what was gathered",
        "zero_fp8/handlers/fetching.py",
        "                put_back()\n",
        "                pass\n",
        "test_zero3_checkpoints.py odd_moments",
    ),
    Fault(
        "masters lie where blocks cut them",
        "zero_fp8/placement/even_slices.py",
        "            target = starts[piece.slot.parameter] + low - wanted.start\n",
        "            target = starts[piece.slot.parameter]\n",
        "test_partition.py even_slices",
    ),
    Fault(
        "stock states are taken for one another",
        "zero_fp8/checkpoint/foreign/stock3.py",
        "                first = slices.start + low - held.start\n",
        "                first = low - held.start\n",
        "test_zero3_checkpoints.py stock_deepspeed",
    ),
    Fault(
        "the whole model is put together in FP32",
        "ds_fp8/seam/loading.py",
        "    if engine.zero_optimization_partition_weights():\n",
        "    if False:\n",
        "test_zero3_checkpoints.py weights_without_states",
    ),
    Fault(
        "ranks read the first rank's model file",
        "zero_fp8/checkpoint/model_files.py",
        "    name = names[turn_of(rank, len(names))]\n",
        "    name = names[0]\n",
        "test_zero3_checkpoints.py resume_is_exact",
    ),
    Fault(
        "persistent parameters are whole before the first forward",
        "zero_fp8/handlers/fetching.py",
        "return [] if self.offload.get_param_coordinator().is_invalid_trace() else self.persistent",
        "return self.persistent",
        "test_zero3.py read_between",
    ),
    Fault(
        "what lies between slices travels",
        "zero_fp8/gradients/packing.py",
        "            blocks[end : piece.first_row].zero_()\n",
        "",
        "test_zero3.py bit_for_bit",
    ),
    Fault(
        "what lies past a parameter's end stays",
        "zero_fp8/weights/sliced/slices.py",
        "    parameter.ds_tensor[max(0, held) :].zero_()\n",
        "",
        "test_zero3.py past_the_end",
    ),
    # Sequence parallelism and micro-steps
    Fault(
        "ZeRO 2 averages over the ranks of a sequence",
        "zero_fp8/wiring.py",
        "return fleet.size if settings.stage == 3 else fleet.sequences(settings.sequence_parallel_size)",
        "return fleet.size",
        "test_sequence_parallel.py whole_sequences",
    ),
    Fault(
        "ZeRO 3 averages over sequences",
        "zero_fp8/wiring.py",
        "return fleet.size if settings.stage == 3 else fleet.sequences(settings.sequence_parallel_size)",
        "return fleet.sequences(settings.sequence_parallel_size)",
        "test_sequence_parallel.py equals_stock 3",
    ),
    Fault(
        "micro-steps add up in BF16",
        "zero_fp8/gradients/pending.py",
        "    parameter.grad_dtype = dtype\n    parameter.grad = None if gradient is None else",
        "    parameter.grad = gradient if True else",
        "test_accumulation.py in_fp32",
    ),
    Fault(
        "the caller's own boundary adds up in BF16",
        "zero_fp8/gradients/pending.py",
        "if self._adds_in_fp32 and not self._is_wide and self.late:",
        "if False:",
        "test_accumulation.py in_fp32",
    ),
    # Tensor parallelism
    Fault(
        "split: every rank is given the states of the first",
        "ds_fp8/seam/load_checks.py",
        "Checkpoint(folder, manifest, engine.optimizer.ranks.part, unpickle=True)",
        "Checkpoint(folder, manifest, 0, unpickle=True)",
        "test_split_checkpoints.py test_resume_is_exact autotp",
    ),
    Fault(
        "split: every rank is given the model file of the first",
        "ds_fp8/seam/model_file.py",
        "return listed(folder, manifest, ranks.part,",
        "return listed(folder, manifest, 0,",
        "test_split_checkpoints.py test_resume_is_exact autotp",
    ),
    Fault(
        "split: what peers hold alike counts twice in the norm",
        "zero_fp8/verdict.py",
        "if parts is not None and mine:",
        "if parts is not None:",
        "test_tensor_parallel.py norms_are_those",
    ),
    Fault(
        "split: replicas of one part skip alone",
        "zero_fp8/verdict.py",
        "    sum_over_ranks(sums, ranks)",
        "    sum_over_ranks(sums, ranks.group)",
        "test_tensor_parallel.py every_rank_skips",
    ),
    Fault(
        "split: random bits follow the rank",
        "zero_fp8/states/shard.py",
        "                piece.slot.parameter,\n",
        "                __import__('torch').distributed.get_rank(),\n",
        "test_split_checkpoints.py rounded_alike",
    ),
    Fault(
        "split: gathered weights stay outside their buffers",
        "ds_fp8/seam/engine.py",
        "            self.optimizer.binding.require()\n",
        "            pass\n",
        "test_split_checkpoints.py test_save_16bit_model",
    ),
    # FP8 products
    Fault(
        "zeros have the smallest scale",
        "ops/products.py",
        "torch.where((parts == 0).all(1), 1.0, power_of_two(e))",
        "power_of_two(e)",
        "test_products.py rows_of_zeros",
    ),
    Fault(
        "what another rank needs of a tile is forgotten",
        "ops/products.py",
        'scatter_reduce_(0, where, found, "amax")',
        'scatter_reduce_(0, where, found, "amax", include_self=False)',
        "test_products.py larger_byte",
    ),
    Fault(
        "Triton gives zeros the smallest scale",
        "ops/triton/products/casts.py",
        "tl.where(amax == 0, 1.0, power_of_two(e))",
        "power_of_two(e)",
        "test_triton_products.py test_casts finite",
    ),
    Fault(
        "x for wgrad has scales of rows",
        "ops/triton/products/casts.py",
        "inverse, scale = scale_of(tl.max(amax, axis=0))",
        "inverse, scale = scale_of(tl.max(tl.where(token == 0, amax, 0), axis=0))",
        "test_triton_products.py test_casts normal",
    ),
    Fault(
        "scales of tiles are not padded",
        "ops/triton/products/scales.py",
        "tl.where(place == 0, stored, 1.0)",
        "tl.where(place == 0, stored, 0.0)",
        "test_triton_products.py padding",
    ),
    Fault(
        "two gradients' casts do not fit on a multiprocessor",
        "ops/triton/products/casts.py",
        "REGISTERS = 128 ",
        "REGISTERS = 168 ",
        "test_product_ptx.py registers",
    ),
    Fault(
        "a tile without an element of the run is raised",
        "ops/triton/products/weights.py",
        "if amax >= 0:",
        "if amax >= -1:",
        "test_triton_products.py left_alone",
    ),
    Fault(
        "tiles of the transpose stay where they are",
        "ops/triton/products/weights.py",
        "tile % across * down + tile // across",
        "tile",
        "test_triton_products.py test_weights",
    ),
    Fault(
        "scales of the transpose stay where they are",
        "ops/triton/products/weights.py",
        "tile % across, tile // across, down, groups",
        "tile // across, tile % across, across, groups",
        "test_triton_products.py test_weights",
    ),
    Fault(
        "a cast is shared across the begin of a CUDA graph",
        "zero_fp8/products/shared_casts.py",
        "x.is_inference() or captured(x):",
        "x.is_inference():",
        "test_cuda_graphs.py cast_before",
    ),
    Fault(
        "a weight stored as [K, N] is expanded, not transposed",
        "ops/hopper/functions.py",
        "transpose(*weight) if swapped else expand(*weight)",
        "expand(*weight) if swapped else transpose(*weight)",
        "test_hopper.py prepares_its_weight",
    ),
    Fault(
        "a compiled graph counts for the first matrix",
        "zero_fp8/product_health.py",
        "if each.codes.data_ptr() == address), None)",
        "), None)",
        "test_o3_health.py graphs_count",
    ),
    Fault(
        "a run that ends inside a row is rounded up",
        "ops/csrc/weights.h",
        "std::min(start + std::min(column + TILE, columns), count)",
        "std::min(start + std::min(column + TILE, columns), (count + 15) / 16 * 16)",
        "test_cpu_products.py test_runs",
    ),
    Fault(
        "C++ raises a tile without an element of the run",
        "ops/csrc/weights.h",
        "each.any)",
        "true)",
        "test_cpu_products.py left_alone",
    ),
    Fault(
        "threads that meet in a tile do not agree",
        "ops/csrc/weights.h",
        "    while (old < to &&",
        "    *exponent = to;\n    while (old < to &&",
        "test_cpu_products.py test_weights finite",
    ),
    Fault(
        "cuBLAS is given the scales of the other operand",
        "ops/cublas_lt.py",
        "self._point(A_SCALE_POINTER, right_scales)",
        "self._point(A_SCALE_POINTER, left_scales)",
        "test_triton_products.py cublas",
    ),
    Fault(
        "a plan serves a product with a bias that it was not made for",
        "ops/cublas.py",
        "layout = None if bias is None else Layout.of(bias)",
        "layout = None",
        "test_triton_products.py cublas",
    ),
    Fault(
        "sums over tokens forget the last tile",
        "ops/triton/products/casts.py",
        "return CastGradient(rows, turned, None), sums",
        "return CastGradient(rows, turned, None), sums if sums is None else sums[:1]",
        "test_triton_products.py test_casts normal",
    ),
    Fault(
        "a cast is launched before the kernel that adds its sums is known",
        "ops/hopper/launches.cpp",
        "if (!kernel || (sums && !summing)) return {};",
        "if (!kernel) return {};",
        "test_hopper.py test_sums_wait",
    ),
    Fault(
        "a backward is launched before the kernel that adds a bias's gradient is known",
        "ops/hopper/launches.cpp",
        "if (!casting || (bias && !summing) || (input && !stored)) return {};",
        "if (!casting || (input && !stored)) return {};",
        "test_hopper.py test_sums_wait",
    ),
    # Offload
    Fault(
        "a chunk comes up before it has gone down",
        "zero_fp8/states/ring.py",
        "self._up.after(written, buffer.free)",
        "self._up.after(buffer.free)",
        "test_offload_executors.py no_state",
    ),
    Fault(
        "a chunk is swept before it has come",
        "zero_fp8/states/ring.py",
        "            follow(self.device, self._up.mark())\n",
        "",
        "test_offload_executors.py no_state",
    ),
    Fault(
        "weights are written over on their way up",
        "zero_fp8/states/host_sweep.py",
        "        wait(buffer.free)\n",
        "",
        "test_offload_executors.py no_weight",
    ),
    Fault(
        "the host adds messages that have not come",
        "zero_fp8/gradients/landing.py",
        "        wait(came)\n",
        "",
        "test_offload_executors.py no_gradient",
    ),
    Fault(
        "a skipped step uploads what the host has left",
        "zero_fp8/states/host_sweep.py",
        "        if not control[1]:\n            return\n",
        "",
        "test_offload.py same_bits",
    ),
    Fault(
        "a chunk's random bits begin anew",
        "zero_fp8/states/shard.py",
        "piece.first_element + (each.start - piece.rows.start) * self.block_size,",
        "piece.first_element,",
        "test_offload.py same_bits",
    ),
    # Pairs of features
    Fault(
        "ZeRO 3 takes the mean over sequences",
        "zero_fp8/wiring.py",
        "return fleet.size if settings.stage == 3 else fleet",
        "return fleet",
        "test_pairs.py works ALST",
    ),
    Fault(
        "two hops pass beside AutoTP",
        "ds_fp8/config/ds_config.py",
        "if config.gradients.intra_node_size not in (None, 1):",
        "if False:",
        "test_pairs.py refused AutoTP",
    ),
)


def plant(fault: Fault, copy: Path) -> bool:
    """Whether the test fails in a copy of the checkout that has the fault, which is then taken out again."""
    path, (file, *words) = copy / fault.path, fault.test.split()
    right = path.read_text()
    path.write_text(right.replace(fault.right, fault.wrong))
    chosen = ["-k", " and ".join(words)] if words else []
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{file}", *chosen]
    try:
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS, check=False
        )
    finally:
        path.write_text(right)
    return done.returncode == 1 or done.returncode < 0  # a test failed, or a kernel reached foreign memory


def unseen(words: str) -> Iterator[str]:
    """Names of faults that no test sees, as they are found; what is tried is told."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "build"))
        for fault in (each for each in FAULTS if words in each.name):
            seen = plant(fault, copy)
            sys.stdout.write(f"{'seen' if seen else 'NOT SEEN'}: {fault.name} ({fault.test})\n")
            sys.stdout.flush()
            if not seen:
                yield fault.name


if __name__ == "__main__":
    sys.exit(1 if list(unseen(" ".join(sys.argv[1:]))) else 0)
