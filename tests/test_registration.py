"""register() and unregister(): the seam goes in once, comes out whole, and knows its DeepSpeed."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ds_fp8
from ds_fp8.compat import (
    OVERRIDE,
    SIGNATURES,
    TESTED_TORCH,
    DeepSpeedConfig,
    DeepSpeedEngine,
    Init,
    OpBuilder,
    check_autograd,
    check_signatures,
    check_version,
    warn_of_newer_torch,
)
from ds_fp8.seam import registration

Attributes = dict[tuple[type, str], Any]


def attributes() -> Attributes:
    """Everything that the patched classes hold, as it lies in their `vars`."""
    owners = (DeepSpeedConfig, DeepSpeedEngine, OpBuilder)
    found = {(owner, name): value for owner in owners for name, value in vars(owner).items()}
    return found | {(Init, "__init__"): vars(Init)["__init__"]}  # another method of Init is replaced for good


def changed(before: Attributes, after: Attributes) -> set[tuple[type, str]]:
    assert before.keys() == after.keys()
    return {key for key in before if before[key] is not after[key]}


@pytest.fixture
def original() -> Iterator[Attributes]:
    """DeepSpeed as it is without the seam; the seam is afterwards as it was before."""
    was_registered = bool(registration._patches)
    ds_fp8.unregister()
    yield attributes()
    ds_fp8.unregister()
    if was_registered:
        ds_fp8.register()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the logger of ds_fp8 says; it does not propagate to the one that caplog watches."""
    logger = logging.getLogger("ds_fp8")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


class TestSeam:
    def test_replaces_what_the_seam_lists(self, original: Attributes) -> None:
        ds_fp8.register()
        assert changed(original, attributes()) == {(owner, name) for owner, name, _ in registration.SEAM}

    def test_every_replaced_method_is_checked_first(self) -> None:
        assert {(owner, name) for owner, name, _ in registration.SEAM} <= set(SIGNATURES)

    def test_unregister_puts_the_very_objects_back(self, original: Attributes) -> None:
        ds_fp8.register()
        ds_fp8.unregister()
        assert changed(original, attributes()) == set()

    def test_register_again_changes_nothing(self, original: Attributes) -> None:
        ds_fp8.register()
        once = attributes()
        ds_fp8.register()
        assert changed(once, attributes()) == set()
        ds_fp8.unregister()
        assert changed(original, attributes()) == set()

    def test_unregister_again_changes_nothing(self, original: Attributes) -> None:
        ds_fp8.unregister()
        assert changed(original, attributes()) == set()

    def test_goes_in_again_after_it_came_out(self, original: Attributes) -> None:
        for _ in range(2):
            ds_fp8.register()
            ds_fp8.unregister()
        ds_fp8.register()
        assert len(changed(original, attributes())) == len(registration.SEAM)

    def test_keeps_names_and_signatures(self, original: Attributes) -> None:
        ds_fp8.register()
        for owner, name, _ in registration.SEAM:
            assert getattr(owner, name).__name__ == original[owner, name].__name__
        check_signatures()

    def test_the_log_handler_is_added_once(self, original: Attributes) -> None:
        ds_fp8.register()
        handlers = list(logging.getLogger("ds_fp8").handlers)
        ds_fp8.unregister()
        ds_fp8.register()
        assert logging.getLogger("ds_fp8").handlers == handlers

    def test_nothing_is_replaced_where_a_signature_is_another(
        self, original: Attributes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(SIGNATURES, (DeepSpeedEngine, "_configure_zero_optimizer"), ("self",))
        with pytest.raises(RuntimeError, match="_configure_zero_optimizer"):
            ds_fp8.register()
        assert changed(original, attributes()) == set()


def test_a_torch_whose_backwards_cannot_be_told_apart_is_refused() -> None:
    check_autograd()
    with pytest.raises(RuntimeError, match=r"torch .*_no_such_node, which is not there"):
        check_autograd(((torch._C, "_no_such_node"),))


class TestSignatures:
    def test_of_the_installed_deepspeed(self, original: Attributes) -> None:
        check_signatures()

    @pytest.mark.parametrize(
        ("table", "sentence"),
        [
            (
                {(DeepSpeedEngine, "_configure_zero_optimizer"): ("self", "optimizer", "stage")},
                "DeepSpeedEngine._configure_zero_optimizer: "
                "expected (self, optimizer, stage), found (self, optimizer)",
            ),
            (
                {(DeepSpeedConfig, "_initialize_params"): ("self", "config")},
                "DeepSpeedConfig._initialize_params: expected (self, config), found (self, param_dict)",
            ),
            (
                {(DeepSpeedEngine, "_no_such"): ("self",)},
                "DeepSpeedEngine._no_such: expected (self), found no such method",
            ),
        ],
    )
    def test_another_is_named_with_what_was_expected(
        self, table: dict[tuple[type, str], tuple[str, ...]], sentence: str
    ) -> None:
        with pytest.raises(RuntimeError) as refused:
            check_signatures(table)
        assert sentence in str(refused.value)
        assert "\n" not in str(refused.value)


class TestVersion:
    @pytest.mark.parametrize("installed", ["0.18.0", "0.19.4", "0.20.0", "0.20.0.dev3", "0.20.1", "1.0"])
    def test_another_is_refused_with_the_way_round(
        self, installed: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(OVERRIDE, raising=False)
        with pytest.raises(RuntimeError) as refused:
            check_version(installed)
        for part in (installed, ">=0.19.5", "<0.20", "DS_FP8_ALLOW_UNTESTED_DEEPSPEED=1"):
            assert part in str(refused.value)

    @pytest.mark.parametrize("installed", ["0.18.0", "0.20.1"])
    def test_another_is_warned_of_where_the_user_insists(
        self, installed: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("DS_FP8_ALLOW_UNTESTED_DEEPSPEED", "1")
        check_version(installed)
        (record,) = log.records
        assert record.levelno == logging.WARNING
        assert installed in record.getMessage()

    def test_any_other_value_is_no_insisting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DS_FP8_ALLOW_UNTESTED_DEEPSPEED", "0")
        with pytest.raises(RuntimeError, match=r"0\.20\.1"):
            check_version("0.20.1")

    @pytest.mark.parametrize("installed", ["0.19.5", "0.19.8", "0.19.8+abcdef", "0.19.9.dev1"])
    def test_a_supported_one_passes_without_a_word(
        self, installed: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.delenv(OVERRIDE, raising=False)
        check_version(installed)
        assert not log.records


class TestTorch:
    @pytest.fixture(autouse=True)
    def nothing_said_yet(self) -> Iterator[None]:
        warn_of_newer_torch.cache_clear()
        yield
        warn_of_newer_torch.cache_clear()

    @pytest.mark.parametrize("installed", ["2.16.0", "2.16.0.dev20270101+cu130", "3.0"])
    def test_one_above_what_was_tested_is_warned_of_once_on_rank_0(
        self,
        installed: str,
        original: Attributes,
        monkeypatch: pytest.MonkeyPatch,
        log: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(registration, "version", lambda name: {"torch": installed}[name])
        for rank in ("1", "0", "0"):
            monkeypatch.setenv("RANK", rank)
            ds_fp8.register()
            ds_fp8.unregister()
        (record,) = (each for each in log.records if "torch" in each.getMessage())
        assert record.levelno == logging.WARNING
        assert f"up to {TESTED_TORCH}, installed is {installed}" in record.getMessage()

    @pytest.mark.parametrize("installed", ["2.11.0", "2.13.0+cpu", "2.15.0", "2.15.1"])
    def test_a_tested_one_passes_without_a_word(self, installed: str, log: pytest.LogCaptureFixture) -> None:
        warn_of_newer_torch(installed)
        assert not log.records

    def test_only_the_warning_of_deepspeeds_gather_is_kept_from_users(self, original: Attributes) -> None:
        """In the words of the installed torch, if it has them; what else torch deprecates is shown."""
        gather = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use something else."
        words = getattr(torch.distributed.all_gather_into_tensor, "__deprecated__", gather)
        others = [
            ("`torch.distributed.reduce_scatter_tensor` is deprecated.", "torch.distributed.c10d_logger"),
            (words, "users.own"),
        ]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ds_fp8.register()
            for number, (text, module) in enumerate([(words, "torch.distributed.c10d_logger"), *others]):
                warnings.warn_explicit(text, FutureWarning, "file.py", number + 1, module)
        assert [str(each.message) for each in seen] == [text for text, _ in others]


def test_register_after_an_engine_was_built_warns(
    original: Attributes, log: pytest.LogCaptureFixture
) -> None:
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)  # alive, if unbuilt
    ds_fp8.register()
    (warning,) = (each for each in log.records if each.levelno == logging.WARNING)
    assert "before deepspeed.initialize()" in warning.getMessage()
    del engine
