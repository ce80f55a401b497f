"""The "fp8" section and what becomes of the rest of a ds_config."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import keys
import pytest
from pydantic import BaseModel, ValidationError

from ds_fp8.config import ds_config, rules
from ds_fp8.config.optimizer_params import OptimizerParams
from ds_fp8.config.parsing import parse
from ds_fp8.config.refusals import show
from ds_fp8.config.section import LEVELS, FP8Config, Level
from ds_fp8.estimate import dry_run
from ds_fp8.ops.formats import E4M3
from ds_fp8.zero_fp8.recipe import recipe_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHIPPED = sorted(
    each.name for each in resources.files("ds_fp8.configs").iterdir() if each.name.endswith(".json")
)


def section(path: str, value: Any, **others: Any) -> dict[str, Any]:
    """`section("a.b", 1)` is {"a": {"b": 1}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return {**value, **others}


def strict_json(text: str) -> Any:
    """json.loads, which takes NaN and repeated keys as they come, without that leniency."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"a key is repeated: {[key for key, _ in pairs]}"
        return dict(pairs)

    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeats)


class TestSection:
    def test_defaults(self) -> None:
        config = parse({"fp8": {}})
        assert config is not None
        assert config.model_dump() == {
            "enabled": False,
            "opt_level": "O2",
            "scaling": "block",
            "block_size": 128,
            "gradients": {
                "dtype": "e4m3",
                "reduction": "fp32",
                "autoscale": None,
                "accum_dtype": None,
                "intra_node_size": None,
                "inter_node_dtype": None,
            },
            "optimizer": {
                "master_dtype": None,
                "exp_avg_dtype": None,
                "exp_avg_sq_dtype": None,
                "rounding": None,
                "draws": None,
                "clamp": True,
                "seed": 0,
            },
            "weights": {"dtype": None, "exclude": [], "min_elements": 2_097_152, "frozen": "bf16"},
            "products": {"dtype": None},
            "offload": {"executor": "auto", "threads": None, "ratio": 1.0},
            "checkpoint": {"fp32_master": True, "allow_conversion": False, "weights": "codes"},
            "stats": {"interval": 0},
            "max_consecutive_skips": 50,
        }

    @pytest.mark.parametrize(
        "others", [{}, {"train_batch_size": 8}, {"bf16": {"enabled": True}}, {"msamp": {"enabled": False}}]
    )
    def test_no_section(self, others: dict[str, Any]) -> None:
        assert parse(others) is None

    def test_switched_off(self) -> None:
        config = parse({"fp8": {"enabled": False, "opt_level": "O1"}})
        assert config is not None
        assert not config.enabled

    def test_frozen(self) -> None:
        config = FP8Config()
        with pytest.raises(ValidationError, match="frozen"):
            config.enabled = True
        with pytest.raises(ValidationError, match="frozen"):
            config.gradients.dtype = "bf16"

    @pytest.mark.parametrize(
        ("level", "states"),
        [
            ("O1", ("fp32", "fp32", "fp32", None)),
            ("O2", ("fp16", "int8", "fp16", None)),
            ("O2+", ("split16", "int8", "ue4m4", None)),
            ("O3", ("fp16", "int8", "ue4m4", "e4m3")),
        ],
    )
    def test_level_table(self, level: str, states: tuple[str, str, str, str | None]) -> None:
        config = parse({"fp8": {"enabled": True, "opt_level": level}})
        assert config is not None
        assert config.states == Level(*states)
        assert config.gradients.dtype == "e4m3"

    @pytest.mark.parametrize(
        ("key", "value", "states"),
        [
            ("master_dtype", "bf16", Level("bf16", "int8", "fp16")),
            ("exp_avg_dtype", "e5m2", Level("fp16", "e5m2", "fp16")),
            ("exp_avg_sq_dtype", "fp32", Level("fp16", "int8", "fp32")),
        ],
    )
    def test_a_named_format_goes_before_the_level(self, key: str, value: str, states: Level) -> None:
        config = parse({"fp8": {"enabled": True, "opt_level": "O2", "optimizer": {key: value}}})
        assert config is not None
        assert config.states == states

    def test_one_scale_per_tensor_has_the_published_exp_avg(self) -> None:
        config = parse({"fp8": {"enabled": True, "scaling": "tensor"}})
        assert config is not None
        assert config.states == Level("fp16", "e4m3", "fp16")
        assert not config.spread

    @pytest.mark.parametrize(
        ("section", "spread"),
        [
            ({}, True),
            ({"opt_level": "O1"}, False),
            ({"optimizer": {"exp_avg_dtype": "e4m3"}}, False),
            ({"optimizer": {"exp_avg_dtype": "e4m3", "draws": "spread"}}, True),
            ({"optimizer": {"draws": "independent"}}, False),
            ({"scaling": "tensor", "optimizer": {"rounding": "stochastic", "draws": "spread"}}, True),
        ],
    )
    def test_draws_spread_beside_int8(self, section: dict[str, Any], spread: bool) -> None:
        config = parse({"fp8": {"enabled": True, **section}})
        assert config is not None
        assert config.spread == spread

    @pytest.mark.parametrize("level", ["O1", "O2", "O3"])
    def test_fp8_weights_at_each_level(self, level: str) -> None:
        """The states stay as the level has them."""
        without = parse({"fp8": {"enabled": True, "opt_level": level}})
        config = parse({"fp8": {"enabled": True, "opt_level": level, "weights": {"dtype": "e4m3"}}})
        assert config is not None
        assert without is not None
        assert config.states == replace(without.states, weights="e4m3")
        assert recipe_of(config).weights is E4M3

    @pytest.mark.parametrize(
        ("given", "stochastic"),
        [
            ({"opt_level": "O1"}, False),
            ({"opt_level": "O2"}, True),
            ({"opt_level": "O2+"}, False),
            ({"opt_level": "O2", "optimizer": {"rounding": "nearest"}}, False),
            ({"opt_level": "O2", "optimizer": {"master_dtype": "fp32"}}, False),
            ({"opt_level": "O2+", "optimizer": {"master_dtype": "split8"}}, True),
        ],
    )
    def test_masters_that_lose_bits_are_rounded_stochastically(
        self, given: dict[str, Any], stochastic: bool
    ) -> None:
        config = parse({"fp8": {"enabled": True, **given}})
        assert config is not None
        assert config.stochastic == stochastic


UNKNOWN = "unknown key with the value "

IDLE_ROUNDING = ("fp8.optimizer.rounding", '"stochastic"', '"nearest" with the master split16')
BESIDE_WEIGHTS = 'the key left out, or fp8.weights.dtype "e4m3" beside it'
WRONG = [  # section, path in the message, value in the message, a part of what is allowed
    # unknown keys, at each depth
    ({"levl": "O2"}, "fp8.levl", UNKNOWN + '"O2"', "opt_level, scaling"),
    ({"enable": True}, "fp8.enable", "unknown key with the value true", 'did you mean "enabled"?'),
    ({"optlevel": "O2"}, "fp8.optlevel", UNKNOWN + '"O2"', 'did you mean "opt_level"?'),
    (
        {"gradients": {"dtyp": "e4m3"}},
        "fp8.gradients.dtyp",
        UNKNOWN + '"e4m3"',
        'did you mean "dtype"?',
    ),
    (
        {"optimizer": {"exp_avg": "e4m3"}},
        "fp8.optimizer.exp_avg",
        UNKNOWN + '"e4m3"',
        '"exp_avg_dtype"?',
    ),
    (
        {"optimizer": {"lr": 0.1}},
        "fp8.optimizer.lr",
        "unknown key with the value 0.1",
        "master_dtype, exp_avg_dtype",
    ),
    (
        {"weights": {"dtypes": "e4m3"}},
        "fp8.weights.dtypes",
        UNKNOWN + '"e4m3"',
        'did you mean "dtype"?',
    ),
    ({"checkpoint": {"fp32": True}}, "fp8.checkpoint.fp32", "unknown key with the value true", "fp32_master"),
    (
        {"stats": {"intervall": 1}},
        "fp8.stats.intervall",
        "unknown key with the value 1",
        'did you mean "interval"?',
    ),
    # wrong types
    ({"enabled": "true"}, "fp8.enabled", '"true"', "true, false"),
    ({"enabled": 1}, "fp8.enabled", "1", "true, false"),
    ({"enabled": None}, "fp8.enabled", "null", "true, false"),
    ({"block_size": "128"}, "fp8.block_size", '"128"', "32, 64, 128, 256"),
    ({"block_size": 128.0}, "fp8.block_size", "128.0", "32, 64, 128, 256"),
    ({"block_size": 128.5}, "fp8.block_size", "128.5", "32, 64, 128, 256"),
    ({"block_size": True}, "fp8.block_size", "true", "32, 64, 128, 256"),
    ({"max_consecutive_skips": "50"}, "fp8.max_consecutive_skips", '"50"', "integer"),
    ({"max_consecutive_skips": 2.0}, "fp8.max_consecutive_skips", "2.0", "integer"),
    ({"optimizer": {"seed": True}}, "fp8.optimizer.seed", "true", "integer"),
    ({"optimizer": {"clamp": 0}}, "fp8.optimizer.clamp", "0", "true, false"),
    ({"checkpoint": {"fp32_master": "no"}}, "fp8.checkpoint.fp32_master", '"no"', "true, false"),
    ({"gradients": {"dtype": ["e4m3"]}}, "fp8.gradients.dtype", '["e4m3"]', '"e5m2"'),
    ({"gradients": "e4m3"}, "fp8.gradients", '"e4m3"', "an object of dtype"),
    ({"optimizer": None}, "fp8.optimizer", "null", "an object of master_dtype"),
    ({"stats": 10}, "fp8.stats", "10", "an object of interval"),
    # "auto", which accelerate could not fill
    ({"enabled": "auto"}, "fp8.enabled", '"auto"', "true, false"),
    ({"opt_level": "auto"}, "fp8.opt_level", '"auto"', '"O2"'),
    ({"block_size": "auto"}, "fp8.block_size", '"auto"', "128"),
    ({"gradients": {"dtype": "auto"}}, "fp8.gradients.dtype", '"auto"', '"e4m3"'),
    ({"optimizer": {"seed": "auto"}}, "fp8.optimizer.seed", '"auto"', "integer"),
    ({"max_consecutive_skips": "auto"}, "fp8.max_consecutive_skips", '"auto"', "integer"),
    # wrong literals and ranges
    ({"opt_level": "o2"}, "fp8.opt_level", '"o2"', '"O2"'),
    ({"opt_level": "O4"}, "fp8.opt_level", '"O4"', '"O1"'),
    ({"scaling": "row"}, "fp8.scaling", '"row"', '"block"'),
    ({"block_size": 100}, "fp8.block_size", "100", "32, 64, 128, 256"),
    ({"gradients": {"dtype": "fp8"}}, "fp8.gradients.dtype", '"fp8"', '"e4m3"'),
    ({"gradients": {"dtype": "E4M3"}}, "fp8.gradients.dtype", '"E4M3"', '"e4m3"'),
    ({"gradients": {"reduction": "bf16"}}, "fp8.gradients.reduction", '"bf16"', '"fp32"'),
    ({"gradients": {"accum_dtype": "e5m2"}}, "fp8.gradients.accum_dtype", '"e5m2"', '"fp32"'),
    ({"optimizer": {"master_dtype": "float32"}}, "fp8.optimizer.master_dtype", '"float32"', '"fp32"'),
    ({"optimizer": {"exp_avg_dtype": "ue4m4"}}, "fp8.optimizer.exp_avg_dtype", '"ue4m4"', '"e4m3"'),
    ({"optimizer": {"exp_avg_sq_dtype": "int8"}}, "fp8.optimizer.exp_avg_sq_dtype", '"int8"', '"fp16"'),
    ({"optimizer": {"rounding": "up"}}, "fp8.optimizer.rounding", '"up"', '"nearest"'),
    ({"optimizer": {"seed": -1}}, "fp8.optimizer.seed", "-1", "an integer, 0 or more"),
    ({"weights": {"dtype": "bf16"}}, "fp8.weights.dtype", '"bf16"', "left out"),
    (
        {"gradients": {"intra_node_size": 0}},
        "fp8.gradients.intra_node_size",
        "0",
        "an integer, 1 or more",
    ),
    ({"gradients": {"intra_node_size": "8"}}, "fp8.gradients.intra_node_size", '"8"', "integer"),
    ({"gradients": {"inter_node_dtype": "e5m2"}}, "fp8.gradients.inter_node_dtype", '"e5m2"', '"bf16"'),
    (
        {"enabled": True, "gradients": {"inter_node_dtype": "bf16"}},
        "fp8.gradients.inter_node_dtype",
        '"bf16"',
        "the key left out, or fp8.gradients.intra_node_size beside it",
    ),
    ({"stats": {"interval": -1}}, "fp8.stats.interval", "-1", "0"),
    ({"max_consecutive_skips": 0}, "fp8.max_consecutive_skips", "0", "an integer, 1 or more"),
    # nothing is rounded away
    ({"enabled": True, "opt_level": "O2+", "optimizer": {"rounding": "stochastic"}}, *IDLE_ROUNDING),
    (
        {"enabled": True, "optimizer": {"rounding": "stochastic", "master_dtype": "fp32"}},
        "fp8.optimizer.rounding",
        '"stochastic"',
        '"stochastic" with fp16, bf16, split8',
    ),
    (
        {"enabled": True, "gradients": {"reduction": "fp8"}},
        "fp8.gradients.reduction",
        '"fp8"',
        'fp8.scaling "tensor" beside it',
    ),
    (
        {"enabled": True, "scaling": "tensor", "gradients": {"autoscale": "pre"}},
        "fp8.gradients.autoscale",
        '"pre"',
        'fp8.gradients.reduction "fp8" beside it',
    ),
    (
        {"enabled": True, "scaling": "tensor", "gradients": {"reduction": "fp8", "dtype": "bf16"}},
        "fp8.gradients.dtype",
        '"bf16"',
        '"e4m3", "e5m2"',
    ),
    (
        {"enabled": True, "scaling": "tensor", "gradients": {"intra_node_size": 2}},
        "fp8.gradients.intra_node_size",
        "2",
        "one hop",
    ),
    (
        {"enabled": True, "scaling": "tensor", "opt_level": "O2+"},
        "fp8.optimizer.exp_avg_sq_dtype",
        '"ue4m4"',
        "fp32, bf16, fp16, e4m3, e5m2",
    ),
    (
        {"enabled": True, "scaling": "tensor", "optimizer": {"exp_avg_dtype": "int8"}},
        "fp8.optimizer.exp_avg_dtype",
        '"int8"',
        "fp32, bf16, fp16, e4m3, e5m2",
    ),
    ({"optimizer": {"draws": "golden"}}, "fp8.optimizer.draws", '"golden"', '"independent", "spread"'),
    (
        {"enabled": True, "opt_level": "O1", "optimizer": {"draws": "spread"}},
        "fp8.optimizer.draws",
        '"spread"',
        "the key left out",
    ),
    (
        {"enabled": True, "scaling": "tensor", "optimizer": {"draws": "spread"}},
        "fp8.optimizer.draws",
        '"spread"',
        "the key left out",
    ),
    (
        {"enabled": True, "scaling": "tensor", "optimizer": {"clamp": True}},
        "fp8.optimizer.clamp",
        "true",
        "false, or the key left out",
    ),
    # FP8 weights: what they go with, and what only they use
    ({"weights": {"exclude": "a"}}, "fp8.weights.exclude", '"a"', "a list, each a text"),
    ({"weights": {"exclude": [1]}}, "fp8.weights.exclude.0", "1", "a list, each a text"),
    ({"weights": {"min_elements": 0}}, "fp8.weights.min_elements", "0", "an integer, 1 or more"),
    ({"products": {"dtype": "fp8"}}, "fp8.products.dtype", '"fp8"', '"e4m3", "bf16"'),
    ({"enabled": True, "weights": {"exclude": ["a"]}}, "fp8.weights.exclude", '["a"]', BESIDE_WEIGHTS),
    ({"enabled": True, "weights": {"exclude": []}}, "fp8.weights.exclude", "[]", BESIDE_WEIGHTS),
    ({"enabled": True, "weights": {"min_elements": 1}}, "fp8.weights.min_elements", "1", BESIDE_WEIGHTS),
    ({"enabled": True, "products": {"dtype": "e4m3"}}, "fp8.products.dtype", '"e4m3"', BESIDE_WEIGHTS),
    (
        {"enabled": True, "opt_level": "O3", "scaling": "tensor"},
        "fp8.scaling",
        '"tensor"',
        '"block" with fp8.opt_level "O3"',
    ),
    (
        {"enabled": True, "opt_level": "O3", "optimizer": {"master_dtype": "split16"}},
        "fp8.optimizer.master_dtype",
        '"split16"',
        '"fp32", "fp16", "bf16" with fp8.opt_level "O3"',
    ),
    (
        {"enabled": True, "opt_level": "O2+", "weights": {"dtype": "e4m3"}},
        "fp8.weights.dtype",
        '"e4m3"',
        'the key left out with fp8.opt_level "O2+"',
    ),
    # the section is no object
    (None, "fp8", "null", "an object of enabled, opt_level"),
    (True, "fp8", "true", "an object of enabled, opt_level"),
    ("O2", "fp8", '"O2"', "an object of enabled, opt_level"),
    ([], "fp8", "[]", "an object of enabled, opt_level"),
]

ODD: list[Any] = [
    "true",
    "x" * 1000,
    [],
    [[1]],
    {},
    {"a": {"b": 1}},
    None,
    True,
    0,
    -1,
    10**30,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
]


def keys_of(model: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all keys of a section, and of the sections in it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


def assert_refusal(message: str, path: str, received: str, allowed: str) -> None:
    """The one form of a refusal; `received` is the whole value, `allowed` a part."""
    assert re.search(rf"^{re.escape(path)}: received (an )?{re.escape(received)}, allowed: ", message), (
        message
    )
    assert allowed in message.split(", allowed: ", 1)[1]


class TestRefusals:
    @pytest.mark.parametrize(("fp8", "path", "received", "allowed"), WRONG)
    def test_wrong_section(self, fp8: Any, path: str, received: str, allowed: str) -> None:
        with pytest.raises(ValueError, match=re.escape(path)) as refused:
            parse({"fp8": fp8})
        assert_refusal(str(refused.value), path, received, allowed)

    @pytest.mark.parametrize("value", ODD, ids=lambda value: show(value)[:20])
    def test_what_is_allowed_is_in_our_words(self, value: Any) -> None:
        """Every key, with a value that hardly any takes; pydantic's sentences are not ours."""
        for model, path, judge in (
            (FP8Config, "fp8", lambda given: parse({"fp8": given})),
            (OptimizerParams, "optimizer.params", ds_config.optimizer_params),
        ):
            for key in keys_of(model):
                try:
                    judge(section(key, value))
                except ValueError as refused:
                    message = str(refused)
                else:
                    continue  # this one takes it
                assert message.startswith(f"{path}.{key}"), message
                received, allowed = message.removeprefix(f"{path}.{key}").split(", allowed: ", 1)
                assert len(received) < 300, message
                assert allowed, message
                assert not re.search(r"[Ii]nput|valid|should|than or equal|boolean|type=|pydantic", message)

    def test_values_are_cut_and_mistakes_are_counted(self) -> None:
        """A message stays short, whatever was given; deep, circular and huge values have one, too."""
        circle: list[Any] = []
        circle.append(circle)
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        for value in ("x" * 10**6, ["y"] * 10**5, 10**5000, deep, circle, {(1, 2): 3}, object()):
            for config in (
                {"fp8": {"enabled": value}},
                {"fp8": {"x" * 1000: value}},
                {"fp8": {1: value}},
                {"fp-8": value},
                {"msamp": {"enabled": value}},
            ):
                with pytest.raises(ValueError, match="received") as refused:
                    parse(config)
                assert len(str(refused.value)) < 900
            with pytest.raises(ValueError, match="received") as refused:
                ds_config.check({**MINIMAL, "q." * 500: value})
            assert len(str(refused.value)) < 500
        with pytest.raises(ValueError, match="990 mistakes more") as refused:
            parse({"fp8": {f"key{number}": 1 for number in range(1000)}})
        assert str(refused.value).count("\n") == 10

    def test_two_mistakes_are_both_named(self) -> None:
        with pytest.raises(ValueError, match=r"fp8\.scaling") as refused:
            parse({"fp8": {"scaling": "row", "stats": {"interval": "x"}}})
        assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
            "fp8.scaling",
            "fp8.stats.interval",
        ]

    @pytest.mark.parametrize("key", ["fp_8", "FP8", "Fp8", "fp-8", "float8", "ds_fp8"])
    def test_near_typos_of_the_section(self, key: str) -> None:
        with pytest.raises(ValueError, match="spelled") as refused:
            parse({"train_batch_size": 8, key: {"enabled": True}})
        assert_refusal(str(refused.value), key, '{"enabled": true}', '"fp8"')

    @pytest.mark.parametrize(
        ("level", "equivalent"), [({}, "O1"), ({"opt_level": "O2"}, "O2"), ({"opt_level": "O3"}, "O3")]
    )
    def test_msamp_is_answered_with_the_equivalent_section(
        self, level: dict[str, str], equivalent: str
    ) -> None:
        msamp = {"enabled": True, **level}
        answer = json.dumps({"fp8": {"enabled": True, "opt_level": equivalent}})
        with pytest.raises(ValueError, match="MS-AMP") as refused:
            parse({"msamp": msamp})
        assert_refusal(str(refused.value), "msamp", json.dumps(msamp), answer)
        assert parse(json.loads(answer)) is not None


MINIMAL: dict[str, Any] = {"zero_optimization": {"stage": 2}}

REFUSED = [  # ds_config, path in the message, value in the message, a part of what is allowed
    ({}, "zero_optimization.stage", "0", "1, 2, 3"),
    ({"zero_optimization": {}}, "zero_optimization.stage", "0", "1, 2, 3"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "0", "1, 2, 3"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "4", "1, 2, 3"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage", '"auto"', "1, 2, 3"),
    ({"zero_optimization": 1}, "zero_optimization", "1", "object"),
    ({"zero_optimization": None}, "zero_optimization", "null", "object"),
    ({**MINIMAL, "bf16": True}, "bf16", "true", "object"),
    ({**MINIMAL, "optimizer": "AdamW"}, "optimizer", '"AdamW"', "object"),
    (
        {**MINIMAL, "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        "fp16.fp16_master_weights_and_grads",
        "true",
        "false",
    ),
    (
        {**MINIMAL, "checkpoint": {"checkpoint_serialization": False}},
        "checkpoint.checkpoint_serialization",
        "false",
        "true",
    ),
    (
        {**MINIMAL, "fp16": {"enabled": True}, "fp8": {"opt_level": "O3"}},
        "fp16.enabled",
        "true",
        'false with fp8.opt_level "O3"',
    ),
    ({**MINIMAL, "data_types": {"grad_dtype": "fp32"}}, "data_types.grad_dtype", '"fp32"', "left out"),
    (
        {"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel",
        '{"autotp_size": 2}',
        "left out",
    ),
    (
        {**MINIMAL, "tensor_parallel": {"autotp_size": 2.0}},
        "tensor_parallel.autotp_size",
        "2.0",
        "an integer",
    ),
    *(
        ({**MINIMAL, "tensor_parallel": {"autotp_size": 2}, **keys}, path, value, "autotp_size 2")
        for keys, path, value in (
            ({"fp8": {"enabled": True, "opt_level": "O3"}}, "fp8.opt_level", '"O3"'),
            ({"fp8": {"enabled": True, "scaling": "tensor"}}, "fp8.scaling", '"tensor"'),
            (
                {"fp8": {"enabled": True, "gradients": {"intra_node_size": 2}}},
                "fp8.gradients.intra_node_size",
                "2",
            ),
            ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint.use_node_local_storage", "true"),
            ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "true"),
        )
    ),
    ({**MINIMAL, "gradient_clipping": -1.0}, "gradient_clipping", "-1.0", "0 or more"),
    ({**MINIMAL, "gradient_clipping": "auto"}, "gradient_clipping", '"auto"', "0 or more"),
    (
        {**MINIMAL, "data_parallel_size": 2, "sequence_parallel_size": 4},
        "data_parallel_size",
        "2",
        "UlyssesSPAttentionHF.register_with_transformers",
    ),
    ({**MINIMAL, "sequence_parallel_size": 0}, "sequence_parallel_size", "0", "1 or more"),
    ({**MINIMAL, "sequence_parallel_size": 1.5}, "sequence_parallel_size", "1.5", "1 or more"),
    ({**MINIMAL, "expert_parallel": {"enabled": True}}, "expert_parallel", '{"enabled": true}', "left out"),
    ({**MINIMAL, "torch_autocast": {"enabled": True}}, "torch_autocast.dtype", "null", "bfloat16"),
    (
        {**MINIMAL, "torch_autocast": {"enabled": True, "dtype": "float16"}},
        "torch_autocast.dtype",
        '"float16"',
        "bfloat16",
    ),
    (
        {"zero_optimization": {"stage": 3}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "torch_autocast",
        '{"enabled": true, "dtype": "bfloat16"}',
        '{"enabled": false}',
    ),
    (
        {**MINIMAL, "communication_data_type": "fp16"},
        "communication_data_type",
        '"fp16"',
        '"fp8": {"gradients": {"dtype": "bf16"}}',
    ),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "0", "stage 1 trains the same numbers"),
    ({**MINIMAL, "overlap_comm": True}, "overlap_comm", "true", "the section zero_optimization"),
    ({**MINIMAL, "micro_batch_size_per_gpu": 1}, "micro_batch_size_per_gpu", "1", "train_micro_batch_size"),
    ({**MINIMAL, "optimizer": {"eps": 1e-6}}, "optimizer.eps", "1e-06", "the section optimizer.params"),
    (
        {**MINIMAL, "gradient_accumulation_dtype": "fp32"},
        "gradient_accumulation_dtype",
        '"fp32"',
        "data_types",
    ),
    ({**MINIMAL, "elasticity": {"enabled": True}}, "elasticity", '{"enabled": true}', "left out"),
    (
        {**MINIMAL, "quantize_training": {"enabled": True}},
        "quantize_training",
        '{"enabled": true}',
        "left out",
    ),
    ({**MINIMAL, "optimiser": {}}, "optimiser", "{}", 'did you mean "optimizer"'),
    ({**MINIMAL, "hybrid_engine": {"enabled": True}}, "hybrid_engine", '{"enabled": true}', "left out"),
    (
        {**MINIMAL, "compile": {"deepcompile": True, "passes": ["autosp"]}},
        "compile.passes",
        '["autosp"]',
        "left out",
    ),
    ({**MINIMAL, "compile": {"autoep_non_moe": True}}, "compile.autoep_non_moe", "true", "false"),
    ({**MINIMAL, "optimizer": {"type": "SGD"}}, "optimizer.type", '"SGD"', "Adam, AdamW, FP8AdamW"),
    ({**MINIMAL, "optimizer": {"type": "Lamb"}}, "optimizer.type", '"Lamb"', "Adam, AdamW, FP8AdamW"),
    (
        {**MINIMAL, "optimizer": {"params": {"momentum": 0.9}}},
        "optimizer.params.momentum",
        "unknown key with the value 0.9",
        "betas",
    ),
    ({**MINIMAL, "optimizer": {"params": 1e-3}}, "optimizer.params", "0.001", "object"),
    ({**MINIMAL, "nebula": {"enabled": True}}, "nebula", '{"enabled": true}', "left out"),
    ({**MINIMAL, "gradient_cliping": 1.0}, "gradient_cliping", "1.0", "left out"),
    (
        {**MINIMAL, "bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "bf16.bf16_optimizer_states",
        "true",
        "exp_avg_dtype",
    ),
    (
        {**MINIMAL, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads",
        "true",
        "master_dtype",
    ),
    ({**MINIMAL, "bfloat16": {"enable": True}}, "bfloat16.enable", "true", "left out"),
]

REFUSED_IN_ZERO = [  # field, value, a part of what is allowed
    ("zenflow", {"topk_ratio": 0.05}, "null"),
    ("overlap_com", True, "left out"),
]

REFUSED_IN_ZERO_3 = [  # field, value, a part of what is allowed
    ("use_all_reduce_for_fetch_params", True, "false (use_all_reduce_for_fetch_params does not work"),
    ("stage3_use_all_reduce_for_fetch_params", True, "false"),
    ("zero_hpz_partition_size", 8, "fp8.gradients.intra_node_size"),
    ("zero_quantized_weights", True, "weights travel in the model's dtype"),
    ("zero_quantized_nontrainable_weights", True, "weights travel in the model's dtype"),
    ("zero_quantized_gradients", True, "is replaced by fp8.gradients.dtype"),
    ("mics_shard_size", 2, "-1"),
    ("mics_hierarchical_params_gather", True, "false"),
    ("zeropp_loco_param", {"err_beta": 0.8}, "null"),
    ("zenflow", {"topk_ratio": 0.05}, "null"),
    ("offload_param", {"device": "cpu"}, '{"device": "none"}'),
    ("cpu_offload_param", True, "false"),
    ("stage3_prefetch_bucket", 1, "left out"),
]

# As the templates of transformers and LLaMA-Factory have it, numbers filled in.
ZERO_3: dict[str, Any] = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 900_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
    "offload_optimizer": {"device": "none"},
    "offload_param": {"device": "none"},
}
ONLY_UNDER_3 = {  # honoured there
    "prefetch_bucket_size": 1,
    "stage3_model_persistence_threshold": 1,
    "stage3_gather_fp16_weights_on_model_save": True,
    "stage3_module_granularity_threshold": 1,
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "leaf_module": {"classes": ["a.B"]},
}

HARMLESS: list[dict[str, Any]] = [
    {},
    {"bf16": {"enabled": True}},
    {"bf16": {"enabled": False}},
    {"bf16": {"enabled": True, "bf16_optimizer_states": False}},
    {"fp16": {}},
    {"fp16": {"enabled": False}},
    {"fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 2}},
    {"torch_autocast": {"enabled": False, "dtype": "float16"}},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {"torch_autocast": {"enabled": True, "dtype": "bf16"}, "bf16": {"enabled": True}},
    {"sequence_parallel_size": 2},
    {"disable_allgather": False, "data_parallel_size": 1},
    {"zero_optimization": {"stage": 2, "round_robin_gradients": False, "zero_hpz_partition_size": 1}},
    {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"pin_memory": True},
            "elastic_checkpoint": False,
        }
    },
    {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0, "offload_param": {"pin_memory": True}}},
    {"zero_optimization": True},  # of old configs: stage 1
    {"communication_data_type": None},
    {"hybrid_engine": {"enabled": False}},
    {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}},
    {"managed_gradient_accumulation": False, "gradient_allreduce_op": "sum", "sequence_parallel_size": 1},
    {"bf16": None, "tensor_parallel": {"autotp_size": 1}},
    {"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 1}},
    {  # LLaMA-Factory's ds_z2_autotp, but for what the Trainer fills in
        "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": True},
        "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True},
    },
    {"_comment": "ours", "comment": "too"},
    {"data_types": {"grad_accum_dtype": "fp32"}, "checkpoint": {"tag_validation": "Fail"}},
    {"optimizer": {"type": "adam", "params": {"lr": 1e-3}}},
    {"optimizer": {"type": "FP8AdamW", "params": {"lr": 1e-3}}},
    {"optimizer": {}},
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"stage": 2, "overlap_comm": True}},
    {"zero_optimization": {"stage": 2, "zenflow": None, "offload_optimizer": None}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
    {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}, "cpu_offload": False}},
    {"zero_optimization": {"stage": 3}},
    {"zero_optimization": {"stage": 3, "enable_sanity_checks": True, **ONLY_UNDER_3}},
    {"zero_optimization": {"stage": 3, "stage3_use_all_reduce_for_fetch_params": False}},
    # as many templates write it, and DeepSpeed offloads nothing
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}}},
]

# As people have them, with what rank 0 then says.
IDLE: list[tuple[dict[str, Any], str]] = [
    ({"disable_allgather": True}, "disable_allgather (DeepSpeed's ZeRO does not read it)"),
    ({"data_parallel_size": 8}, "data_parallel_size (it follows from the number of ranks)"),
    ({"comms_config": {"verbose": False}}, "comms_config (DeepSpeed does not read it)"),
    ({"monitor_config": {"enabled": True}}, "monitor_config (DeepSpeed does not read it)"),
    (
        {"compile": {"deepcompile": True, "passes": ["z3"], "free_activation": False}},
        "compile.deepcompile (engine.compile() is torch.compile; DeepCompile's passes act on buffers of "
        "DeepSpeed's own ZeRO); compile.passes (a key of DeepCompile); "
        "compile.free_activation (a key of DeepCompile)",
    ),
    ({"my_project": "a name"}, "my_project (DeepSpeed does not read it)"),
    ({"optimizer": {"no_decay": ["bias"]}}, "optimizer.no_decay (DeepSpeed does not read it)"),
    ({"checkpoint": {"save_states": False}}, "checkpoint.save_states (DeepSpeed does not read it)"),
    (
        {"seq_parallel_communication_data_type": "fp32"},
        "seq_parallel_communication_data_type (gradients travel in fp8.gradients.dtype and are added in "
        "FP32)",
    ),
    (
        {
            "torch_autocast": {
                "enabled": True,
                "dtype": "bf16",
                "lower_precision_safe_modules": ["torch.nn.Linear"],
            }
        },
        "torch_autocast.lower_precision_safe_modules (decides in which dtype gradients travel: "
        "fp8.gradients.dtype)",
    ),
    *(
        (
            {"compile": {key: value}},
            f"compile.{key} (DeepSpeed no longer reads it: call engine.compile(backend=...))",
        )
        for key, value in {
            "disable": False,
            "enabled": True,
            "backend": "inductor",
            "kwargs": {"mode": "default"},
        }.items()
    ),
]
IDLE_IN_ZERO = [  # under ZeRO 1 and 2
    ("round_robin_gradients", True, "every bucket is spread evenly over the ranks"),
    ("elastic_checkpoint", True, "checkpoints load at any world size"),
    ("zero_hpz_partition_size", 8, "a key of ZeRO 3"),
    ("zero_quantized_weights", True, "a key of ZeRO 3"),
    ("zero_quantized_nontrainable_weights", True, "a key of ZeRO 3"),
    ("zero_quantized_gradients", True, "a key of ZeRO 3"),
    ("zeropp_loco_param", {"err_beta": 0.8}, "a key of ZeRO 3"),
    ("offload_param", {"device": "cpu"}, "a key of ZeRO 3"),
    ("cpu_offload_param", True, "a key of ZeRO 3"),
]

# accelerate, utils/dataclasses.py, DeepSpeedPlugin: what it adds to the user's ds_config, and the
# "zero_optimization" that it makes for a user who has none
ADDED_BY_ACCELERATE: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "steps_per_print": float("inf"),
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": False},
    "bf16": {"enabled": False},
}
MADE_BY_ACCELERATE: dict[str, Any] = {
    "stage": 2,
    "offload_optimizer": {"device": "none", "nvme_path": None},
    "offload_param": {"device": "none", "nvme_path": None},
    "stage3_gather_16bit_weights_on_model_save": False,
}


class TestRestOfTheConfig:
    @pytest.mark.parametrize(("config", "path", "received", "allowed"), REFUSED)
    def test_refused(self, config: dict[str, Any], path: str, received: str, allowed: str) -> None:
        with pytest.raises(ValueError, match=re.escape(path)) as refused:
            ds_config.check(config)
        assert_refusal(str(refused.value), path, received, allowed)

    @pytest.mark.parametrize(("field", "value", "allowed"), REFUSED_IN_ZERO)
    def test_refused_in_zero(self, field: str, value: Any, allowed: str) -> None:
        with pytest.raises(ValueError, match=field) as refused:
            ds_config.check({"zero_optimization": {"stage": 2, field: value}})
        assert_refusal(str(refused.value), f"zero_optimization.{field}", json.dumps(value), allowed)

    @pytest.mark.parametrize(("field", "value", "allowed"), REFUSED_IN_ZERO_3)
    def test_refused_in_zero_3(self, field: str, value: Any, allowed: str) -> None:
        with pytest.raises(ValueError, match=field) as refused:
            ds_config.check({"zero_optimization": {"stage": 3, field: value}})
        assert_refusal(str(refused.value), f"zero_optimization.{field}", json.dumps(value), allowed)

    def test_a_template_for_zero_3(self) -> None:
        assert ds_config.check({"zero_optimization": ZERO_3}) == [
            "zero_optimization.contiguous_gradients (gradients are packed into the message that travels)",
            "zero_optimization.sub_group_size (the step processes one bucket at a time)",
        ]

    @pytest.mark.parametrize("stage", [1, 2])
    def test_keys_of_zero_3_have_no_effect_below(self, stage: int) -> None:
        of_3 = {key: value for key, value in ZERO_3.items() if key.startswith("stage3_")} | ONLY_UNDER_3
        assert ds_config.check({"zero_optimization": {"stage": stage, **of_3}}) == [
            f"zero_optimization.{key} (a key of ZeRO 3{' and AutoTP' if '16' in key else ''})" for key in of_3
        ]

    def test_keys_of_zero_1_and_2_have_no_effect_under_3(self) -> None:
        zero = {"stage": 3, "round_robin_gradients": True, "allgather_bucket_size": 1}
        assert ds_config.check({"zero_optimization": zero}) == [
            "zero_optimization.round_robin_gradients (a key of ZeRO 1 and 2)",
            "zero_optimization.allgather_bucket_size (weights are fetched when a module needs them)",
        ]

    @pytest.mark.parametrize("stage", [2, 3])
    def test_whole_tensors_do_not_go_with_slices(self, stage: int) -> None:
        """Both keys are named, since one alone is refused by the section itself."""
        fp8 = {"enabled": True, "scaling": "tensor", "gradients": {"reduction": "fp8"}}
        config = {"zero_optimization": {"stage": stage}, "fp8": fp8}
        if stage == 2:
            assert ds_config.check(config) == []
            return
        with pytest.raises(ValueError, match="slices") as refused:
            ds_config.check(config)
        scaling, reduction = str(refused.value).splitlines()
        beside = "with zero_optimization.stage 3, which cuts every tensor into slices"
        assert scaling == f'fp8.scaling: received "tensor", allowed: "block" {beside}'
        assert reduction == f'fp8.gradients.reduction: received "fp8", allowed: "fp32" {beside}'

    @pytest.mark.parametrize("given", HARMLESS)
    def test_harmless(self, given: dict[str, Any]) -> None:
        assert ds_config.check({**MINIMAL, **given}) == []

    @pytest.mark.parametrize(("given", "said"), IDLE)
    @pytest.mark.parametrize("stage", [1, 2])
    def test_idle(self, given: dict[str, Any], said: str, stage: int) -> None:
        assert "; ".join(ds_config.check({"zero_optimization": {"stage": stage}, **given})) == said

    @pytest.mark.parametrize(("field", "value", "why"), IDLE_IN_ZERO)
    @pytest.mark.parametrize("stage", [1, 2])
    def test_idle_in_zero(self, field: str, value: Any, why: str, stage: int) -> None:
        zero = {"stage": stage, field: value}
        assert ds_config.check({"zero_optimization": zero}) == [f"zero_optimization.{field} ({why})"]

    def test_deepspeed_does_not_see_keys_of_compile_that_have_no_effect(self) -> None:
        compiled = {"disable": False, "backend": "inductor", "deepcompile": True}
        given = {"train_batch_size": 1, "fp8": {"enabled": True}, **MINIMAL, "compile": compiled}
        assert dry_run.judge(given, gpus=1).compile_config.deepcompile is False
        assert given["compile"] is compiled
        assert len(compiled) == 3
        with pytest.raises(ValueError, match="CompileConfig: disable"):
            dry_run.judge({**given, "fp8": {"enabled": False}}, gpus=1)

    def test_what_accelerate_adds(self) -> None:
        idle = ds_config.check({**MINIMAL, **ADDED_BY_ACCELERATE})
        assert idle == ["zero_allow_untested_optimizer (FP8AdamW replaces the optimizer)"]

    def test_what_accelerate_makes(self) -> None:
        idle = ds_config.check({"zero_optimization": MADE_BY_ACCELERATE})
        assert idle == [
            "zero_optimization.stage3_gather_16bit_weights_on_model_save (a key of ZeRO 3 and AutoTP)"
        ]

    def test_keys_without_effect_are_returned_with_the_reason(self) -> None:
        idle = ds_config.check(
            {
                "train_batch_size": 8,
                "aio": {"block_size": 1},
                "bf16": {"enabled": True, "immediate_grad_update": True},
                "zero_optimization": {"stage": 2, "reduce_scatter": True, "allgather_partitions": True},
            }
        )
        assert idle == [
            "aio (states are not written to files)",
            "zero_optimization.reduce_scatter (gradients go to their owners by all-to-all)",
            "zero_optimization.allgather_partitions (weights are gathered one bucket at a time)",
            "bf16.immediate_grad_update (a key of DeepSpeed's BF16 optimizer)",
        ]


# trl, models/utils.py, prepare_deepspeed: what it adds to the config of a reference model under ZeRO 3
ADDED_BY_TRL = {
    "zero_optimization.reduce_bucket_size": 4096,
    "zero_optimization.stage3_param_persistence_threshold": 640,
    "zero_optimization.stage3_prefetch_bucket_size": 3686.4,
}


class TestEnginesWithoutOptimizer:
    REFERENCE: ClassVar[dict[str, Any]] = {"zero_optimization": ZERO_3, **ADDED_BY_TRL}

    def test_trls_reference_model(self) -> None:
        assert ds_config.may_be_frozen(self.REFERENCE)
        assert not ds_config.never_trains(self.REFERENCE)
        idle = ds_config.check_before_engine(self.REFERENCE)
        assert idle[:3] == [f"{key} (DeepSpeed reads no key with a dot)" for key in ADDED_BY_TRL]
        assert idle[3:] == ds_config.check({"zero_optimization": ZERO_3})

    def test_a_clients_optimizer_makes_it_strict(self) -> None:
        with pytest.raises(ValueError, match=r"^zero_optimization\.reduce_bucket_size: received 4096"):
            ds_config.check_trained(self.REFERENCE)
        ds_config.check_trained({"zero_optimization": ZERO_3})

    @pytest.mark.parametrize(
        "given",
        [
            {"optimizer": {"type": "AdamW"}},
            {"zero_optimization": {"stage": 2}},
            {"zero_optimization.reduce_bucket": 1},
            {"optimiser.lr": 1},
            {"fp8.enabled": True},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {"fp8": {"enabled": True, "scaling": "tensor"}},
        ],
    )
    def test_all_else_is_refused_while_it_is_parsed(self, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="allowed"):
            ds_config.check_before_engine({**self.REFERENCE, **given})

    def test_without_zero(self) -> None:
        """Nothing is looked at until an optimizer shows."""
        config = {"zero_optimization": {"stage": 0}, "anything": True}
        assert ds_config.never_trains(config)
        assert ds_config.check_before_engine(config) == []
        with pytest.raises(ValueError, match="stage: received 0"):
            ds_config.check_trained(config)
        assert not ds_config.may_be_frozen({"zero_optimization": {"stage": False}})


class Recorder(dict[str, Any]):
    """A ds_config that remembers which keys were asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> "Recorder":  # type: ignore[override]
        return self  # `key in config.keys()` is asking, too


def test_the_page_of_keys_is_what_the_tables_say() -> None:
    assert (ROOT / "docs" / "keys.md").read_text() == keys.markdown(), "run `make support`"


class TestTablesAgainstDeepSpeed:
    """A key that a new DeepSpeed reads must be classed before anybody relies on it."""

    def test_every_top_level_key_is_classed(self) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig

        recorder = Recorder({"train_micro_batch_size_per_gpu": 1})
        DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(recorder)
        assert {"zero_optimization", "bf16", "fp16", "optimizer", "compile", "aio"} <= recorder.asked
        assert recorder.asked <= set(rules.TOP_LEVEL), recorder.asked - set(rules.TOP_LEVEL)

    def test_every_field_of_the_sections_is_classed(self) -> None:
        from deepspeed.compile.config import CompileConfig
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        for model, table in (
            (DeepSpeedZeroConfig, rules.ZERO),
            (DeepSpeedBF16Config, rules.BF16),
            (DeepSpeedFP16Config, rules.FP16),
            (CompileConfig, rules.COMPILE),
        ):
            assert unclassed(model, table) == set()
            assert set(table) - fields_of(model) <= rules.NOT_IN_EVERY_VERSION | set(rules.OLD_COMPILE)

    def test_a_missing_field_is_noticed(self) -> None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        table = {key: rule for key, rule in rules.ZERO.items() if key != "round_robin_gradients"}
        assert unclassed(DeepSpeedZeroConfig, table) == {"round_robin_gradients"}


def fields_of(model: Any) -> set[str]:
    return set(model.model_fields) | {each.alias for each in model.model_fields.values() if each.alias}


def unclassed(model: Any, table: rules.Rules) -> set[str]:
    return fields_of(model) - set(table)


LEVEL_KINDS = [name.lower().replace("+", "plus") for name in LEVELS]


class TestShippedConfigs:
    def test_there_is_one_a_stage_and_level(self) -> None:
        assert set(SHIPPED) >= {
            f"zero{n}_{kind}.json"
            for n in ds_config.STAGES
            for kind in ("bf16", *LEVEL_KINDS)
            if (n, kind) != (3, "o3")
        }

    @pytest.mark.parametrize("name", SHIPPED)
    def test_parses_and_passes(self, name: str) -> None:
        config = strict_json(resources.files("ds_fp8.configs").joinpath(name).read_text())
        stage, kind = re.fullmatch(r"zero(\d)_(\w+?)(?:_offload)?\.json", name).groups()  # type: ignore[union-attr]
        assert config["zero_optimization"]["stage"] == int(stage)
        offloaded = config["zero_optimization"].get("offload_optimizer")
        assert offloaded == ({"device": "cpu"} if name.endswith("_offload.json") else None)
        fp8 = parse(config)
        if kind == "bf16":
            assert fp8 is None
            assert config["bf16"] == {"enabled": True}
        else:
            assert fp8 is not None
            assert fp8.enabled
            assert fp8.opt_level == kind.upper().replace("PLUS", "+")
            assert ds_config.check(config) == []


def json_blocks() -> Iterator[str]:
    for page in (README, *(ROOT / "docs").glob("*.md")):
        yield from re.findall(r"^```json\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_json_in_the_documentation() -> None:
    configs = [strict_json(block) for block in json_blocks() if '"fp8"' in block]
    assert len(configs) > 3
    for config in configs:
        assert parse(config) is not None
