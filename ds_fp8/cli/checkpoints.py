"""`ds_fp8 inspect`, `export` and `to-universal`: checkpoints of ours, without a run.

CHECKPOINT is the folder of a tag, or the one that holds `latest`. Every file is verified before it is
opened. torch is imported by the commands that need it.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_fp8.output import add_command, progress_bar, show_json, show_table
from ds_fp8.zero_fp8.checkpoint import tags
from ds_fp8.zero_fp8.checkpoint.manifest import NAME, Manifest, read, verify

if TYPE_CHECKING:
    from ds_fp8.zero_fp8.checkpoint.whole.merged import Whole

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

CONFIG = "config.json"  # of a Hugging Face model


def add_to(commands: Any) -> None:
    inspecting = _add(commands, "inspect", inspect, "what a checkpoint holds, and whether it is whole")
    inspecting.add_argument("--no-verify", action="store_true", help="do not compute checksums")
    exporting = _add(commands, "export", export, "write the weights as a model's files")
    exporting.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    exporting.add_argument("--format", choices=("safetensors", "torch"), default="safetensors")
    exporting.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="default: fp32, with --fp8 bf16, for what is not FP8",
    )
    exporting.add_argument(
        "--fp8", action="store_true", help="FP8 weights as codes, in Hugging Face's fine-grained FP8 layout"
    )
    exporting.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="with --fp8: the model's config.json, if not in CHECKPOINT",
    )
    exporting.add_argument(
        "--max-shard-size", metavar="SIZE", type=byte_count, default="5GB", help="default: 5GB"
    )
    converting = _add(commands, "to-universal", to_universal, "write a universal checkpoint of DeepSpeed")
    converting.add_argument("out", metavar="OUT", type=Path, help="a new folder, beside `latest_universal`")
    for command in (exporting, converting):
        command.add_argument(
            "--unpickle",
            action="store_true",
            help="let DeepSpeed's model file hold objects of a client: only if you trust its author",
        )


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    parser = add_command(commands, name, run, text)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="the folder given to save_checkpoint, or a tag's"
    )
    parser.add_argument("--tag", help="instead of the one that `latest` names")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def byte_count(text: str) -> int:
    """Bytes: "5GB", "500MiB", "1000000"."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?i?B?)", text, re.IGNORECASE)
    unit = match and UNITS.get(match[2].upper())
    if match is None or unit is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"received {text!r}, allowed: as 5GB, 500MiB or 1000000")
    return int(match[1]) * unit


def find(path: Path, tag: str | None) -> tuple[Path, Manifest]:
    """The folder of a tag and its manifest. Raises ValueError if there is none of ours."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    folder = path
    if tag is not None or not (path / NAME).exists():
        name = tags.find(path, tag)
        if name is None:
            raise ValueError(
                f"{path}: neither {NAME} nor {tags.LATEST}, expected one of them: the folder "
                f"{tags.contents(path)}"
            )
        folder = path / name
    manifest = read(folder)
    if manifest is None:
        raise ValueError(
            f"{folder / NAME}: missing: not a checkpoint of ds_fp8, or never finished: the folder "
            f"{tags.contents(folder)}"
        )
    return folder, manifest


def inspect(arguments: argparse.Namespace) -> None:
    folder, manifest = find(arguments.checkpoint, arguments.tag)
    verified = not arguments.no_verify
    if verified:
        verify(folder, manifest, manifest.files)
    if arguments.json:
        show_json({"folder": str(folder), "verified": verified, **manifest.model_dump()})
        return
    show_table(("checkpoint", ""), overview(folder, manifest, verified=verified).items())
    sizes = {name: f"{file.size:,}" for name, file in manifest.files.items()}
    show_table(("file", "bytes"), sizes.items())


def _of_codes(manifest: Manifest) -> str:
    """What of FP8 weights is saved beside their masters."""
    if not manifest.places[0].has_whole_weights:
        return "saved as masters alone (ZeRO 3)"
    return f"of which model files hold {manifest.weights}"


def overview(folder: Path, manifest: Manifest, *, verified: bool) -> dict[str, Any]:
    """Rows of `inspect` about the checkpoint as a whole."""
    parameters = manifest.places[0].parameters
    encoded = sum(each.codes_of is not None for each in parameters.values())
    return {
        "folder": folder,
        "files": "whole: every size and checksum is right" if verified else "not verified",
        "step": f"{manifest.steps} of the optimizer, {manifest.global_steps} of the engine",
        "saved by": f"{_ranks(manifest)}, ZeRO {manifest.zero_stage}",
        "with": f"ds_fp8 {manifest.ds_fp8_version}, deepspeed {manifest.deepspeed_version}",
        **manifest.recipe.model_dump(),
        "parameters": _trained(manifest),
        "FP8 weights": f"{encoded} tensors, {_of_codes(manifest)}" if encoded else "none",
        "view of zero_to_fp32.py": "yes" if manifest.fp32_master else "no: use ds_fp8 export",
    }


def _ranks(manifest: Manifest) -> str:
    ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
    places = len(manifest.places)
    return ranks if places == 1 else f"{ranks}, model parallel {places}"


def _trained(manifest: Manifest) -> str:
    """Number of trained parameters: of one place, or the range over several."""
    sizes = [sum(math.prod(each.shape) for each in place.parameters.values()) for place in manifest.places]
    tensors = f"trained, in {len(manifest.places[0].parameters)} tensors"
    if len(sizes) == 1:
        return f"{sizes[0]:,} {tensors}"
    return f"{min(sizes):,} to {max(sizes):,} per model-parallel rank {tensors}"


def export(arguments: argparse.Namespace) -> None:
    from ds_fp8.zero_fp8.checkpoint.whole.export import DTYPES, model_tensors
    from ds_fp8.zero_fp8.checkpoint.whole.export import export as write

    if arguments.config is not None and not arguments.fp8:
        raise ValueError(f"--config: received {arguments.config}, allowed: beside --fp8")
    checkpoint = open_verified(arguments)
    dtype = arguments.dtype or ("bf16" if arguments.fp8 else "fp32")
    tensors = model_tensors(checkpoint, DTYPES[dtype], fp8=arguments.fp8)
    with advancing("exporting", sum(tensor.numel for tensor in tensors)) as advance:
        files = write(
            checkpoint,
            arguments.out,
            tensors,
            kind=arguments.format,
            limit=arguments.max_shard_size,
            advance=advance,
            texts=config_texts(arguments, checkpoint) if arguments.fp8 else {},
        )
    show_rows([{"file": str(path), "bytes": path.stat().st_size} for path in files], arguments)


def config_texts(arguments: argparse.Namespace, checkpoint: "Whole") -> dict[str, str]:
    """config.json with what it has to say of FP8 weights; without a config.json that part alone."""
    from ds_fp8.zero_fp8.checkpoint.whole.fp8_layout import quantization_config

    said = quantization_config(checkpoint)
    places = [folder / CONFIG for folder in (arguments.checkpoint, checkpoint.folder.parent)]
    path = arguments.config or next((each for each in places if each.is_file()), None)
    if path is None:
        return {"quantization_config.json": json.dumps(said, indent=2) + "\n"}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: received a {type(config).__name__}, allowed: an object, as of Hugging Face"
        )
    return {CONFIG: json.dumps({**config, "quantization_config": said}, indent=2) + "\n"}


def to_universal(arguments: argparse.Namespace) -> None:
    from ds_fp8.zero_fp8.checkpoint.foreign.universal import write

    checkpoint = open_verified(arguments)
    total = sum(math.prod(parameter.shape) for parameter in checkpoint.parameters.values())
    with advancing("converting", total) as advance:
        write(checkpoint, arguments.out, advance)
    files = [path for path in sorted(arguments.out.rglob("*")) if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    show_rows([{"folder": str(arguments.out), "files": len(files), "bytes": written}], arguments)


def open_verified(arguments: argparse.Namespace) -> "Whole":
    """The checkpoint, once its files are known to be whole."""
    from ds_fp8.zero_fp8.checkpoint.whole.merged import open_whole

    folder, manifest = find(arguments.checkpoint, arguments.tag)
    with advancing("verifying", len(manifest.files)) as advance:
        for name in manifest.files:
            verify(folder, manifest, [name])
            advance(1)
    return open_whole(folder, manifest, unpickle=arguments.unpickle)


@contextmanager
def advancing(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; what it yields is called with how much more is done."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def show_rows(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.json:
        show_json(rows)
    else:
        show_table(tuple(rows[0]), (row.values() for row in rows))
