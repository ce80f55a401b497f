import sys

sys.path.insert(0, "/work/wt/z3fp8/tests")
import os
from unittest.mock import patch

import pytest
import test_zero3 as t
from engines import ds_config, zero3
from ranks import RankPools


def run(kind, config, options):
    with patch.dict(os.environ, DS_FP8_PRODUCTS="emulated"):
        return t.train(kind, config, **options)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["plain", "checkpointing", "reentrant", "tied", "head by function", "block twice"]
)
def test_x(ranks: RankPools, world_size, kind):
    fp8 = {"opt_level": "O3", "weights": {"min_elements": 128}}
    res = []
    for stage, more in ((2, {}), (3, zero3(persistence=60, prefetch=2000, reuse=1000))):
        res.append(
            ranks.run(
                world_size,
                run,
                kind,
                ds_config(fp8, stage=stage, zero=more, bucket=4000, micro_steps=2),
                {},
                seconds=60.0,
            )
        )
    t.assert_equal(res[1], res[0])
