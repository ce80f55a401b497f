"""What the estimator says that ZeRO 3 keeps whole and fetches, against DeepSpeed's own rules."""

from types import SimpleNamespace
from unittest.mock import patch

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from hypothesis import given
from hypothesis import strategies as st

from ds_fp8.estimate.fetching import Fetching, fetching_of, persistent, whole

sizes = st.lists(st.integers(0, 50), max_size=30)
thresholds = st.integers(0, 60)


@given(sizes, thresholds, st.integers(0, 500))
def test_persistent_parameters_are_deepspeeds(sizes: list[int], small: int, together: int) -> None:
    parameters = [SimpleNamespace(ds_numel=numel) for numel in sizes]
    module = SimpleNamespace(named_parameters=lambda recurse: ((str(each), each) for each in parameters))
    with patch("deepspeed.runtime.zero.parameter_offload.print_rank_0"):  # asks for the rank
        offload = SimpleNamespace(module=module)
        marked = DeepSpeedZeRoOffload.mark_persistent_parameters(offload, small, together)
    keys = Fetching(param_persistence_threshold=small, model_persistence_threshold=together)
    kept = [each for each, stays in zip(parameters, persistent(sizes, keys), strict=True) if stays]
    assert list(map(id, kept)) == list(map(id, marked))


@given(sizes, thresholds, st.integers(0, 500), st.integers(0, 500))
def test_what_is_whole(sizes: list[int], small: int, live: int, ahead: int) -> None:
    """Small parameters always, the others up to the keys' limits, those of two bytes first."""
    keys = Fetching(small, max_live_parameters=live, prefetch_bucket_size=ahead)
    itemsizes = [1 + numel % 2 for numel in sizes]
    kept, gathered = ([times * numel for numel in sizes] for times in (2, 3))
    always, at_a_time = whole(sizes, kept, gathered, keys, itemsizes)
    assert always == 2 * sum(numel * (1 + numel % 2) for numel in sizes if numel <= small)
    elements = [each for numel in sizes if numel > small for each in 3 * numel * [1 + numel % 2]]
    assert at_a_time == sum(sorted(elements, reverse=True)[: live + ahead])


def test_defaults_are_deepspeeds() -> None:
    assert fetching_of(DeepSpeedZeroConfig(stage=3)) == Fetching()
