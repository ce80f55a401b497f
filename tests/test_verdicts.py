"""`ds_fp8 report` and DeepSpeed judge a ds_config alike, with the "fp8" section registered."""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import ds_config
from test_cli import output

import ds_fp8
from ds_fp8.cli import main
from ds_fp8.compat import DeepSpeedConfig, DeepSpeedEngine

GOOD = json.dumps(ds_config({}))
ON = '{"enabled": true}'
MICRO = "train_micro_batch_size_per_gpu"
BODY = GOOD[1:-1]


def with_zero(text: str, stage: str = "2") -> str:
    return f'{{"train_batch_size": 4, "fp8": {ON}, "zero_optimization": {{"stage": {stage}{text}}}}}'


def with_key(text: str) -> str:
    return f'{{"zero_optimization": {{"stage": 2}}, "fp8": {{"enabled": true}}, {text}}}'


FILES = {  # text of the file: whether a run takes it
    "plain": (GOOD, True),
    "comments": (f"# one\n{{ // two\n/* three */ {BODY} }}", True),
    "trailing comma": (f"{{{BODY},}}", True),
    "no braces, no quotes": (
        "train_batch_size: 4\nzero_optimization: {stage: 2}\nfp8: {enabled: true}",
        True,
    ),
    "a byte order mark": (f"\ufeff{GOOD}", True),
    "single quotes": ("{'train_batch_size': 4}", True),
    "a key twice": (f'{{{BODY}, "gradient_clipping": 2.0}}', False),
    "a key twice, inside": (with_zero(', "overlap_comm": true, "overlap_comm": false'), False),
    "a key twice in the section": (
        '{"train_batch_size": 4, "fp8": {"enabled": false, "enabled": 0}}',
        False,
    ),
    "empty": ("", False),
    "empty object": ("{}", False),
    "a list": (f"[{GOOD}]", False),
    "a number": ("5", False),
    "null": ("null", False),
    "a string": ('"zero2_o2"', False),
    "half": (GOOD[:-10], False),
    "two objects": (GOOD + GOOD, False),
    "another language": ("<config/>", False),
    "no text": ("\x00\x01", False),
    "deep": ('{"a":' * 5000 + "1" + "}" * 5000, False),
    "an include": (with_key('"train_batch_size": 4, "include": "other.json"'), True),  # nothing reads it
    "bucket 5e8": (with_zero(', "reduce_bucket_size": 5e8'), True),
    "bucket 5.0": (with_zero(', "reduce_bucket_size": 5.0'), True),
    "bucket in quotes": (with_zero(', "reduce_bucket_size": "500000000"'), True),
    "bucket 5e8 in quotes": (with_zero(', "reduce_bucket_size": "5e8"'), False),
    "bucket 5e8.5": (with_zero(', "reduce_bucket_size": 5e8.5'), False),
    "bucket 5.5": (with_zero(', "reduce_bucket_size": 5.5'), False),
    "bucket auto": (with_zero(', "reduce_bucket_size": "auto"'), True),
    "bucket null": (with_zero(', "reduce_bucket_size": null'), False),
    "bucket negative": (with_zero(', "reduce_bucket_size": -1'), False),
    "bucket zero": (with_zero(', "reduce_bucket_size": 0'), False),
    "bucket true": (with_zero(', "reduce_bucket_size": true'), True),
    "bucket of 30 digits": (with_zero(f', "reduce_bucket_size": {10**30}'), True),
    "bucket of 5000 digits": (with_zero(f', "reduce_bucket_size": {"9" * 5000}'), False),
    "bucket 1e400": (with_zero(', "reduce_bucket_size": 1e400'), False),
    "bucket NaN": (with_zero(', "reduce_bucket_size": NaN\n'), False),
    "overlap yes": (with_zero(', "overlap_comm": "yes"'), True),
    "overlap 2": (with_zero(', "overlap_comm": 2'), False),
    "stage 2.0": (with_zero("", "2.0"), True),
    "stage in quotes": (with_zero("", '"2"'), False),
    "stage true": (with_zero("", "true"), False),
    "stage 0 and no optimizer": (with_zero("", "0"), True),
    "batch negative": (with_key('"train_batch_size": -4'), False),
    "batch zero": (with_key('"train_batch_size": 0'), False),
    "batch 4.0": (with_key('"train_batch_size": 4.0'), True),
    "batch 4.5": (with_key('"train_batch_size": 4.5'), False),
    "batch true": (with_key('"train_batch_size": true'), False),
    "batch in quotes": (with_key('"train_batch_size": "4"'), False),
    "batch null": (with_key('"train_batch_size": null'), False),
    "batch of 30 digits": (with_key(f'"train_batch_size": {10**30}'), True),
    "micro-steps 1.5": (
        with_key(f'"{MICRO}": 2, "gradient_accumulation_steps": 1.5'),
        False,
    ),
    "micro-steps null": (with_key('"train_batch_size": 4, "gradient_accumulation_steps": null'), True),
    "batches that do not fit": (
        with_key(
            '"train_batch_size": 5, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2'
        ),
        False,
    ),
    "bf16 in quotes": (with_key('"train_batch_size": 4, "bf16": {"enabled": "true"}'), True),
    "bf16 and fp16": (
        with_key(f'"train_batch_size": 4, "bf16": {ON}, "fp16": {ON}'),
        False,
    ),
    "clipping NaN": (with_key('"train_batch_size": 4, "gradient_clipping": "NaN"'), False),
    "a removed key": (with_key('"train_batch_size": 4, "sparse_attention": {"mode": "fixed"}'), False),
    "fp8 true": ('{"train_batch_size": 4, "fp8": true}', False),
    "fp8 null": ('{"train_batch_size": 4, "fp8": null}', False),
    "seed 1e3": ('{"train_batch_size": 4, "fp8": {"optimizer": {"seed": 1e3}}}', True),
    "seed 0.5": ('{"train_batch_size": 4, "fp8": {"optimizer": {"seed": 0.5}}}', False),
    "enabled yes": ('{"train_batch_size": 4, "fp8": {"enabled": yes\n}}', False),
    "fp8 off, nonsense elsewhere": ('{"train_batch_size": 4, "zero_optimization": {"stages": 2}}', False),
    "fp8 off": ('{"train_batch_size": 4, "zero_optimization": {"stage": 3}}', True),
}


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    ds_fp8.register()
    yield
    ds_fp8.unregister()


def taken_by_a_run(source: Any) -> bool:
    try:
        DeepSpeedConfig(source)
    except Exception:
        return False
    return True


def taken_by_the_report(capsys: pytest.CaptureFixture[str], source: str) -> bool:
    """Refused by exit, with the reason; never by another exception."""
    with contextlib.suppress(SystemExit):
        output(capsys, "report", "--json", "--config", source)
        return True
    out, err = capsys.readouterr()
    told = json.loads(out)["config"]["refused"] if out else err
    assert 10 < len(told) < 3000
    return False


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_verdict_of_a_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], registered: None
) -> None:
    text, taken = FILES[name]
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    assert taken_by_a_run(str(path)) is taken
    assert taken_by_the_report(capsys, str(path)) is taken


def test_base64_and_what_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], registered: None
) -> None:
    """A run takes a ds_config in base64, too; there DeepSpeed lets keys be repeated."""
    encoded = base64.urlsafe_b64encode(GOOD.encode()).decode()
    twice = base64.urlsafe_b64encode(f'{{{BODY}, "gradient_clipping": 2.0}}'.encode()).decode()
    nonsense = base64.urlsafe_b64encode(b"[1]").decode()
    given = {encoded: True, twice: True, nonsense: False, "no/such.json": False, "nonsense": False, "": False}
    for source, taken in {**given, str(tmp_path): False, "x" * 5000: False}.items():
        assert taken_by_a_run(source) is taken_by_the_report(capsys, source) is taken, source


def test_an_objection_of_deepspeed_is_told_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds_config.json"
    for name, words in {
        "bucket 5.5": "DeepSpeedZeroConfig: reduce_bucket_size: received 5.5: ",
        "batches that do not fit": "train_batch_size is not equal to micro_batch_per_gpu",
        "micro-steps 1.5": "gradient_accumulation_steps: received 1.5, allowed: an integer, 1 or more",
        "stage true": "zero_optimization.stage: received true, allowed: 1, 2, 3 with fp8 enabled",
    }.items():
        path.write_text(FILES[name][0])
        with pytest.raises(SystemExit):
            main(["report", "--json", "--config", str(path)])
        assert words in json.loads(capsys.readouterr().out)["config"]["refused"]


def test_a_key_that_is_auto_is_refused_without_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(with_key('"train_batch_size": "auto", "gradient_accumulation_steps": "auto"'))
    told = output(capsys, "report", "--config", str(path))
    assert "by the Trainer and accelerate only; DeepSpeed alone: train_batch_size: received" in told


def test_a_section_that_is_no_object_is_told_to_the_callback() -> None:
    """Without registration the section is not read; the report must not require it to be an object."""
    from ds_fp8.hf import _why_off

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.config = {"fp8": True}
    assert "allowed: a ds_config with" in _why_off(engine)
    engine.config = {"fp8": {"enabled": True}}
    assert "was not read" in _why_off(engine)
