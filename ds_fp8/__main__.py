"""Run a training script with the "fp8" section of its ds_config honoured, the script unchanged.

    deepspeed --module ds_fp8 train.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 2 -m ds_fp8 -m package.train ...
    accelerate launch -m ds_fp8 train.py ...

DeepSpeed's launcher puts `--local_rank=N` before the script; the script finds it first among its own
arguments, as if it had been launched itself; `sys.argv[0]` is its absolute path.
"""

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = "usage: python -m ds_fp8 (SCRIPT | -m MODULE) [arguments of the script]"


def split(arguments: Sequence[str]) -> tuple[str, bool, list[str]]:
    """The script or module, whether it is a module, and its arguments. Raises SystemExit(2)."""
    rest, launcher = list(arguments), []
    while rest and rest[0].replace("-", "_").startswith("__local_rank="):
        launcher.append(rest.pop(0))
    is_module = rest[:1] == ["-m"]
    if is_module:
        rest.pop(0)
    if not rest or rest[0].startswith("-"):
        received = " ".join(arguments) or "no arguments"
        sys.stderr.write(f"{USAGE}\nds_fp8: received {received!r}, allowed: a script or -m and a module\n")
        raise SystemExit(2)
    return rest[0], is_module, [*launcher, *rest[1:]]


def main() -> None:
    target, is_module, arguments = split(sys.argv[1:])

    from ds_fp8.registration import register

    register()
    sys.argv = [target, *arguments]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.realpath(target))
        runpy.run_path(os.path.abspath(target), run_name="__main__")


if __name__ == "__main__":
    main()
