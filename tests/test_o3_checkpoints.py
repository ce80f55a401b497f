"""Checkpoints of runs whose weights are FP8 codes: masters and codes are the same bits wherever they go."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engines import assert_same_bits as assert_same
from engines import batches, build_gpt, ds_config, packed, train_losses, whole_states
from ranks import RankPools
from torch import Tensor

from ds_fp8.config import section
from ds_fp8.zero_fp8.products.fp8_parameter import FP8Parameter
from ds_fp8.zero_fp8.weights.tiled import matrices_of

O3 = {"weights": {"dtype": "e4m3", "min_elements": 1024}, "optimizer": {"exp_avg_sq_dtype": "ue4m4"}}
O2 = {"optimizer": {"exp_avg_sq_dtype": "ue4m4"}}
BUILT = {"weights.dtype": (None, "e4m3"), "products.dtype": (None, "e4m3", "bf16")}


@contextmanager
def engine_of(fp8: dict[str, Any], *, seed: int = 0, way: str = "decoded", **options: Any) -> Iterator[Any]:
    """An engine of the GPT, destroyed at the end."""
    with patch.dict(section.BUILT, BUILT), patch.dict(os.environ, DS_FP8_PRODUCTS=way):
        engine = build_gpt(ds_config(fp8, **options), seed=seed)
        yield engine
        engine.destroy()


def codes_of(engine: Any) -> dict[str, Tensor]:
    """Codes, exponents and scales of every matrix, by name."""
    found = {}
    for matrix in matrices_of(engine.optimizer.parts.weights):
        found[f"{matrix.name}/codes"] = matrix.codes.view(torch.uint8).clone()
        found[f"{matrix.name}/exponents"] = matrix.exponents.clone()
        found[f"{matrix.name}/scales"] = matrix.scales.view(torch.int32).clone()
        found[f"{matrix.name}/transposed"] = matrix.transposed_scales.view(torch.int32).clone()
    return found


def facts(engine: Any) -> dict[str, Any]:
    """This rank's packed states; all codes; all plain weights."""
    plain = {
        name: each.detach().clone().view(torch.int16)
        for name, each in engine.module.named_parameters()
        if not isinstance(each, FP8Parameter)
    }
    return {"packed": packed(engine.optimizer), "codes": codes_of(engine), "plain": plain}


def train_and_save(folder: str, fp8: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    with engine_of(fp8, way="emulated", bucket=10_000, **options) as engine:
        source = batches(engine)
        train_losses(engine, source, 2)
        engine.save_checkpoint(folder, tag="start")
        return {**facts(engine), "losses": train_losses(engine, source, 2), "after": facts(engine)}


def move(source: str, target: str, fp8: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Load and save, without training between."""
    with engine_of(fp8, seed=7, **options) as engine:
        assert engine.load_checkpoint(source)[0] is not None
        engine.save_checkpoint(target, tag="moved")
        return facts(engine)


def assert_moved(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert_same(*(whole_states([each["packed"] for each in run]) for run in (first, second)))
    for each in (*first, *second):
        assert_same(first[0]["codes"], each["codes"] or first[0]["codes"])


def test_other_ranks_stages_buckets_and_o2(ranks: RankPools, tmp_path: Path) -> None:
    """States and codes are the same bits after every hop; between two of O3 lies one of O2."""
    start = ranks.run(2, train_and_save, str(tmp_path / "0"), O3, {"stage": 2})
    assert len(start[0]["codes"]) == 4 * 8
    hops = [(1, O3, 2, 10**6), (3, O3, 1, 500), (2, O2, 2, 3_000), (2, O3, 1, 10_000)]
    for hop, (world_size, fp8, stage, bucket) in enumerate(hops):
        folders = str(tmp_path / str(hop)), str(tmp_path / str(hop + 1))
        moved = ranks.run(world_size, move, *folders, fp8, {"stage": stage, "bucket": bucket})
        assert_moved(start, moved)
        assert bool(moved[0]["codes"]) == (fp8 is O3)
        if fp8 is O3:
            assert_same(start[0]["plain"], moved[0]["plain"])


def resume(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    with engine_of(O3, seed=7, way="emulated", bucket=10_000, **options) as engine:
        source = batches(engine)
        for _ in range(2):
            next(source)
        engine.load_checkpoint(folder)
        return {"losses": train_losses(engine, source, 2), "after": facts(engine)}


def test_a_run_goes_on_bit_for_bit(ranks: RankPools, tmp_path: Path) -> None:
    start = ranks.run(2, train_and_save, str(tmp_path), O3, {"stage": 2})
    for before, now in zip(start, ranks.run(2, resume, str(tmp_path), {"stage": 2}), strict=True):
        assert now["losses"] == before["losses"]
        assert_moved([before["after"]], [now["after"]])
