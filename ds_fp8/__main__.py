"""Run a training script with the "fp8" section of its ds_config honoured, the script unchanged.

    deepspeed --module ds_fp8 train.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 2 -m ds_fp8 -m package.train ...
    accelerate launch -m ds_fp8 train.py ...

DeepSpeed's launcher puts `--local_rank=N` before the script; the script finds it first among its own
arguments, as if it had been launched itself; `sys.argv[0]` is its absolute path.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from typing import NoReturn

from ds_fp8.config.refusals import cut

USAGE = "usage: python -m ds_fp8 (SCRIPT | -m MODULE) [arguments of the script]"
COMMANDS = ("report", "estimate", "configs", "inspect", "export", "to-universal")
HELP = f"""{USAGE}

{__doc__}
This wraps a training. Reports, estimates and conversions are commands of `ds_fp8`
({", ".join(COMMANDS)}): see `ds_fp8 --help`.
"""


def split(arguments: Sequence[str]) -> tuple[str, bool, list[str]]:
    """The script or module, whether it is a module, and its arguments. Raises SystemExit, as help does."""
    rest, launcher = list(arguments), []
    while rest and rest[0].replace("-", "_").startswith("__local_rank="):
        launcher.append(rest.pop(0))
    if rest[:1] in (["-h"], ["--help"]):
        sys.stdout.write(HELP)
        raise SystemExit(0)
    is_module = rest[:1] == ["-m"]
    if is_module:
        rest.pop(0)
    if not rest or rest[0].startswith("-"):
        received = " ".join(arguments) or "no arguments"
        refuse(f"received {cut(repr(received))}, allowed: a script or -m and a module; --help says more")
    return rest[0], is_module, [*launcher, *rest[1:]]


def refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"{USAGE}\nds_fp8: {reason}\n")
    raise SystemExit(2)


def check_script(target: str) -> None:
    """Refuse a script that Python could not open, before anything is imported for it."""
    if os.path.isdir(target):
        target = os.path.join(target, "__main__.py")
    if not os.path.exists(target):
        hint = f"; the command is `ds_fp8 {target}`" if target in COMMANDS else ""
        refuse(f"{cut(target)}: no such script{hint}")


def check_module(target: str) -> None:
    """Refuse a module that Python could not find; what a package of it raises is raised."""
    try:
        spec = None if target.startswith(".") else importlib.util.find_spec(target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{target}.__main__")
    except ModuleNotFoundError as error:
        if not f"{target}.__main__.".startswith(f"{error.name}."):
            raise
        spec = None
    except ValueError:  # no name of a module
        spec = None
    if spec is None:
        refuse(f"{cut(target)}: no such module, or a package without __main__")


def main() -> None:
    target, is_module, arguments = split(sys.argv[1:])
    if not is_module:
        check_script(target)

    from ds_fp8.seam.registration import register

    register()
    sys.argv = [target, *arguments]
    if is_module:
        check_module(target)
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.realpath(target))
        runpy.run_path(os.path.abspath(target), run_name="__main__")


if __name__ == "__main__":
    main()
