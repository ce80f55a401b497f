"""The `ds_fp8` command.

    ds_fp8 report                           versions, devices, kernels, and what a ds_config would do
    ds_fp8 estimate --params 7G --gpus 8    bytes per GPU, beside stock DeepSpeed
    ds_fp8 configs                          the ds_configs that come with the package
    ds_fp8 configs zero2_o2 > ds_config.json
    ds_fp8 inspect CHECKPOINT               what a checkpoint holds, and whether it is whole
    ds_fp8 export CHECKPOINT OUT            its weights as safetensors or torch files
    ds_fp8 to-universal CHECKPOINT OUT      a universal checkpoint of DeepSpeed

`--json` is for programs. A wrong command line is one line on stderr and exit status 2.
"""

import os
import sys
from collections.abc import Sequence

from ds_fp8 import __version__
from ds_fp8.cli import checkpoints, configs, estimate, report
from ds_fp8.output import Parser


def build_parser() -> Parser:
    parser = Parser(prog="ds_fp8", description="FP8 gradients, communication and Adam states for DeepSpeed")
    parser.add_argument("--version", action="version", version=f"ds_fp8 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    report.add_to(commands)
    estimate.add_to(commands)
    configs.add_to(commands)
    checkpoints.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
