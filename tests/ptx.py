"""The child of test_ptx.py: compile the kernels for GPUs that are not here, and run their addresses.

It is a process of its own because a kernel defined under TRITON_INTERPRET=1 cannot be compiled. Nothing of
a launch is written down twice: the launch code itself runs, on tensors without memory and with a recorder
in the kernel's place, and says how many warps, rows and tiles there are and what is constant.

What a thread loads and stores cannot be counted in PTX by eye (loops are unrolled or not, a tile is spread
over threads in this way or that), so every statement is executed, for all threads of a program at once.
Integers are followed, floats are not: addresses, loop counts and masks do not depend on them.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_fp8.config import FP8Config
from ds_fp8.ops import adam_triton, blocks_triton, reduction_triton
from ds_fp8.ops.adam import AdamScalars, AdamState, Segment, next_clamp
from ds_fp8.ops.blocks import Blocks
from ds_fp8.ops.formats import BY_NAME, E4M3, FP32, Format
from ds_fp8.zero_fp8.comm import Message
from ds_fp8.zero_fp8.optimizer import Recipe

META = torch.device("meta")
ARCHITECTURES = (80, 89, 90)
BLOCK = 128
BLOCKS = 2**25 - 1  # so many that the ranks' messages lie more than 2^31 bytes apart
BETAS = (0.9, 0.95)
PROGRAM = 3  # the one that runs
LEFT = 3  # blocks that a ragged program finds, the last of them MISSING elements short
MISSING = 5
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TYPES = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


# ---- what the launch code launches


class Recorder:
    """Stands where a kernel does and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.given: dict[str, Any] = {}  # by the names of the kernel's parameters
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        return self

    def __call__(self, *arguments: object, **named: object) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | named
        self.given = {name: given[name] for name in names}
        self.options = {name: value for name, value in given.items() if name not in names}


def recorded(module: Any, kernel: str, launch: Callable[[], object]) -> Recorder:
    recorder = Recorder(getattr(module, kernel))
    with mock.patch.object(module, kernel, recorder):
        launch()
    return recorder


def blocks_of(fmt: Format) -> Blocks:
    return Blocks.zeros(BLOCKS, BLOCK, fmt, META)


def vector(dtype: torch.dtype) -> Tensor:
    return torch.empty(BLOCKS * BLOCK, dtype=dtype, device=META)


def quantize() -> Recorder:
    launch = partial(blocks_triton.quantize, vector(torch.bfloat16), blocks_of(E4M3))
    return recorded(blocks_triton, "quantize_kernel", launch)


def dequantize() -> Recorder:
    launch = partial(blocks_triton.dequantize, blocks_of(E4M3), vector(torch.float32))
    return recorded(blocks_triton, "dequantize_kernel", launch)


def accumulate(ranks: int, shard: Format, fresh: bool) -> Recorder:
    message = Message(BLOCKS, BLOCK, E4M3)
    pieces = [message.blocks_of(each) for each in message.buffer(ranks, META)]
    launch = partial(reduction_triton.accumulate, pieces, blocks_of(shard), fresh=fresh)
    return recorded(reduction_triton, "accumulate_kernel", launch)


def sweep(opt_level: str) -> Recorder:
    config = FP8Config.model_validate({"enabled": True, "opt_level": opt_level})
    states = config.states
    formats = [BY_NAME[name] for name in (states.master, states.exp_avg, states.exp_avg_sq)]
    recipe = Recipe(BLOCK, E4M3, E4M3, True, *formats, config.optimizer.clamp, config.optimizer.seed)
    clamp = math.sqrt(next_clamp(None, BETAS)) if recipe.clamped else None
    scalars = AdamScalars(7, 1e-3, *BETAS, 1e-8, 0.1, decoupled=True, bias_correction=True, clamp=clamp)
    segments = [Segment(slice(0, 1), 0, 0), Segment(slice(1, 2), 1, 0), Segment(slice(2, BLOCKS), 2, 0)]
    with mock.patch.object(torch, "searchsorted", lambda table, rows, **_: torch.zeros_like(rows)):
        plan = adam_triton.plan(segments, 2, BLOCK, META)  # its content is not read
    launch = partial(
        adam_triton.adam_step,
        AdamState(*(blocks_of(fmt) for fmt in formats)),
        blocks_of(E4M3),
        vector(torch.bfloat16).view(-1, BLOCK),
        plan,
        scalars,
        torch.empty(2, device=META),
        seed=recipe.seed,
    )
    return recorded(adam_triton, "adam_kernel", launch)


def launches() -> dict[str, Recorder]:
    found = {"quantize": quantize(), "dequantize": dequantize()}
    for ranks in (2, 8):
        for shard in (E4M3, FP32):
            for fresh in (True, False):
                name = f"accumulate {ranks} into {'a fresh' if fresh else 'an old'} {shard.name}"
                found[name] = accumulate(ranks, shard, fresh)
    return found | {f"sweep {level}": sweep(level) for level in ("O1", "O2")}


# ---- the compiler


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def divisible(value: object) -> bool:
    """By 16: addresses, and distances between the ranks' messages."""
    return isinstance(value, Tensor) or (type_of(value) == "i64" and int(str(value)) % 16 == 0)


def compiled(launch: Recorder, architecture: int) -> Any:
    kernel, given = launch.kernel, dict(launch.given)
    given["HARDWARE"] = divmod(architecture, 10) >= blocks_triton.FIRST_WITH_FP8
    constant = {each.name for each in kernel.params if each.is_constexpr}
    positions = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constant else type_of(given[name]) for name in given},
        constexprs={positions[name]: given[name] for name in constant},
        attrs={
            positions[name]: [["tt.divisibility", 16]]
            for name in given
            if name not in constant and divisible(given[name])
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", printed))
    return {name: int(found[name]) for name in ("REG", "STACK", "LOCAL")}


# ---- PTX

Bits = NDArray[Any]  # a register in every thread, uint64
Value = Bits | None  # None: not followed
SHIFT = 44  # a tensor's address is its parameter's number, counted from 1, times 2^44

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "shl": np.left_shift,
    "shr": np.right_shift,
}
COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "neu": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
FOLLOWED = {*BINARY, "mov", "cvt", "mad", "bfe", "neg", "not", "selp", "setp"}


@dataclass(frozen=True)
class Statement:
    guard: str  # "", "%p1" or "!%p1"
    op: str
    operands: tuple[str, ...]


def parse(ptx: str) -> tuple[list[Statement], dict[str, int]]:
    """Statements, and which of them each label stands before."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in ptx.split(".section", maxsplit=1)[0].splitlines():
        text = line.split("//")[0].strip().removeprefix("{ ").strip()
        if label := re.match(r"(\$\w+):", text):
            labels[label[1]] = len(statements)
        elif text.endswith(";") and text[0] != ".":
            found = re.match(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*);", text)
            assert found, line
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*", found[3])
            statements.append(Statement(found[1] or "", found[2], tuple(each.strip() for each in operands)))
    return statements, labels


def width_of(type_name: str) -> int:
    return 1 if type_name == "pred" else int(type_name[1:])


def global_width(op: str) -> int:
    """Bytes of a global access, 0 of any other statement. Accesses of kinds unknown here are refused."""
    name, *rest = op.split(".")
    assert name not in ("atom", "red", "cp"), op
    if name not in ("ld", "st") or rest[0] in ("shared", "param"):
        return 0
    assert rest[0] == "global", op
    vectors = [int(each[1:]) for each in rest if re.fullmatch(r"v\d", each)]
    return math.prod(vectors) * width_of(rest[-1]) // 8


class Program:
    """One program of a kernel: its threads walk through the statements together."""

    def __init__(self, ptx: str, parameters: dict[str, Any], memory: dict[tuple[str, int], int]) -> None:
        self.statements, self.labels = parse(ptx)
        self.parameters = parameters  # by name, in the kernel's order; those that are not constants
        self.memory = memory  # (parameter, byte) -> word; zero elsewhere
        found = re.search(r"\.reqntid (\d+)", ptx)
        assert found
        self.threads = int(found[1])
        self.registers: dict[str, Value] = {
            "%tid.x": np.arange(self.threads, dtype=np.uint64),
            "%ctaid.x": self.filled(PROGRAM),
        }
        self.executed: Counter[int] = Counter()
        self.accesses: dict[int, str] = {}  # statement -> parameter
        self.asked: Counter[str] = Counter()  # bytes times threads
        self.bytes: dict[str, set[int]] = {}

    def filled(self, value: int) -> Bits:
        return np.full(self.threads, value % 2**64, dtype=np.uint64)

    # operands

    def read(self, operand: str, type_name: str) -> Value:
        """A register or number as int64 or uint64 of its value, or bool of a predicate."""
        width = width_of(type_name)
        bits = self.registers.get(operand)
        if bits is None:
            with suppress(ValueError):
                number = int(operand[2:], 16) if operand[:2] == "0f" else int(operand.rstrip("U"), 0)
                bits = self.filled(number)
        if bits is None or type_name == "pred":
            return bits
        if type_name == "f32":
            return bits.astype(np.uint32).view(np.float32)
        up = np.uint64(64 - width)
        if type_name[0] == "s":
            return (bits << up).view(np.int64) >> np.int64(up)
        return (bits << up) >> up

    def write(self, operand: str, type_name: str, value: Value, active: Any = None) -> None:
        if value is not None and type_name != "pred":
            up = np.uint64(64 - width_of(type_name))
            value = (value.astype(np.int64).view(np.uint64) << up) >> up
        if active is not None and not active.all():
            old = self.registers.get(operand)
            value = None if value is None or old is None else np.where(active, value, old)
        self.registers[operand] = value

    def forget(self, operands: Iterable[str]) -> None:
        for operand in operands:
            for register in re.findall(r"%\w+", operand):
                self.registers[register] = None

    def active(self, guard: str) -> Bits:
        if not guard:
            return np.ones(self.threads, dtype=bool)
        value = self.registers.get(guard.lstrip("!"))
        assert value is not None, f"{guard} depends on what is not followed"
        return ~value if guard[0] == "!" else value

    # statements

    def run(self) -> None:
        at = 0
        while True:
            statement = self.statements[at]
            self.executed[at] += 1
            assert self.executed.total() < 10**6, "a loop without end"
            name = statement.op.split(".")[0]
            if name in ("bra", "ret"):
                taken = self.active(statement.guard)
                assert taken.all() or not taken.any(), "threads part"
                if taken.all() and name == "ret":
                    return
                at = self.labels[statement.operands[0]] if taken.all() else at + 1
                continue
            self.execute(at, statement)
            at += 1

    def execute(self, at: int, statement: Statement) -> None:
        name, *rest = statement.op.split(".")
        operands = statement.operands
        if global_width(statement.op):
            self.access(at, statement)
        elif statement.op.startswith("ld.param"):
            self.load_parameter(operands, rest[-1])
        elif name in FOLLOWED and not statement.guard and operands[0][0] == "%":
            self.compute(name, rest, operands)
        elif name not in ("st", "bar"):
            self.forget(operands[:1])

    def load_parameter(self, operands: tuple[str, ...], type_name: str) -> None:
        found = re.fullmatch(r"\[\w+_param_(\d+)\]", operands[1])
        assert found, operands
        index = int(found[1])
        value = list(self.parameters.values())[index]
        if isinstance(value, Tensor):
            value = (index + 1) << SHIFT
        self.write(operands[0], type_name, self.filled(value) if isinstance(value, int) else None)

    def compute(self, name: str, rest: list[str], operands: tuple[str, ...]) -> None:
        out, type_name = operands[0], rest[-1]
        if name == "setp":
            a, b = (self.read(each, type_name) for each in operands[1:])
            known = a is not None and b is not None
            return self.write(out, "pred", COMPARED[rest[0]](a, b) if known else None)
        if type_name[0] == "f" or rest[0][0] == "f":
            return self.forget([out])
        if name == "cvt":
            return self.write(out, rest[0], self.read(operands[1], type_name))
        if name == "selp":
            chosen = self.read(operands[3], "pred")
            a, b = (self.read(each, type_name) for each in operands[1:3])
            known = chosen is not None and a is not None and b is not None
            return self.write(out, type_name, np.where(chosen, a, b) if known else None)
        result = self.integer(name, [self.read(each, type_name) for each in operands[1:]])
        wide = f"{type_name[0]}{2 * width_of(type_name)}" if "wide" in rest else type_name
        if name == "mad":
            addend = self.read(operands[3], wide)
            product = self.integer("mul", [self.read(each, type_name) for each in operands[1:3]])
            result = None if product is None else self.integer("add", [product, addend])
        return self.write(out, wide, result)

    @staticmethod
    def integer(name: str, values: list[Value]) -> Value:
        known = [each for each in values if each is not None]
        if len(known) < len(values) or name == "mad":
            return None
        if name == "mov":
            return known[0]
        if name in ("neg", "not"):
            return -known[0] if name == "neg" else ~known[0]
        if name == "bfe":
            one = np.uint64(1)
            return (known[0] >> known[1]) & ((one << known[2]) - one)
        result: Bits = BINARY[name](known[0], known[1].astype(known[0].dtype))
        return result

    # memory

    def access(self, at: int, statement: Statement) -> None:
        """Note which bytes of which tensor are loaded or stored, and load words that are known."""
        kind, width = statement.op[:2], global_width(statement.op)
        place = statement.operands[0 if kind == "st" else 1]
        found = re.fullmatch(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", place)
        assert found, place
        base, active = self.registers.get(found[1]), self.active(statement.guard)
        assert base is not None, f"{statement} goes where it cannot be followed"
        address = base + np.uint64(int(found[2] or 0))
        assert not (address[active] % np.uint64(width)).any(), f"{statement} is not aligned"
        name, offsets = self.place(address)
        self.accesses[at] = name
        self.asked[f"{kind} {name}"] += int(active.sum()) * width
        touched = self.bytes.setdefault(f"{kind} {name}", set())
        touched.update((offsets[active][:, None] + np.arange(width)).ravel().tolist())
        if kind == "ld" and width == 4:
            words = np.array([self.memory.get((name, int(each)), 0) for each in offsets], dtype=np.uint64)
            self.write(statement.operands[0].strip("{ }"), "b32", words, active)
        elif kind == "ld":
            self.forget(statement.operands[:1])

    def place(self, address: Bits) -> tuple[str, Any]:
        number = {int(each) for each in address >> np.uint64(SHIFT)}
        assert len(number) == 1, "one statement, two tensors"
        offsets = (address & np.uint64(2**SHIFT - 1)).astype(np.int64)
        return list(self.parameters)[number.pop() - 1], offsets


# ---- what is reported


def control_words(ragged: bool) -> dict[tuple[str, int], int]:
    """The sweep takes its step; in a ragged program a second segment begins."""
    one = int(np.float32(1).view(np.uint32))
    return {("control", 4): one, ("tile_segments", 4 * (PROGRAM + 1)): int(ragged)}


def walked(ptx: str, launch: Recorder, rows: int, *, ragged: bool) -> dict[str, Any]:
    """A program whose blocks are all there, or one at the end of the tensors."""
    constant = {each.name for each in launch.kernel.params if each.is_constexpr}
    parameters = {name: value for name, value in launch.given.items() if name not in constant}
    if ragged:
        left = PROGRAM * rows + LEFT
        changed = {"blocks": left, "numel": left * BLOCK - MISSING}
        parameters |= {name: value for name, value in changed.items() if name in parameters}
    program = Program(ptx, parameters, control_words(ragged))
    program.run()
    ops: Counter[str] = Counter()
    for at, times in program.executed.items():
        ops[program.statements[at].op] += times
    return {
        "threads": program.threads,
        "ops": ops,
        "accesses": [
            {"statement": at, "width": global_width(program.statements[at].op), "tensor": name}
            for at, name in program.accesses.items()
        ],
        "asked": program.asked,
        "bytes": {name: len(each) for name, each in program.bytes.items()},
    }


def report(launch: Recorder, architecture: int) -> dict[str, Any]:
    kernel = compiled(launch, architecture)
    ptx = kernel.asm["ptx"]
    rows = launch.given["ROWS"] * launch.given.get("TILES", 1)
    return {
        "ptx": ptx,
        "resources": resources(kernel.asm["cubin"]),
        "rows": rows,
        "left": LEFT,
        "missing": MISSING,
        "accesses": [at for at, each in enumerate(parse(ptx)[0]) if global_width(each.op)],
        "whole": walked(ptx, launch, rows, ragged=False),
        "ragged": walked(ptx, launch, rows, ragged=True),
    }


def main() -> None:
    found = launches()
    kernels = {
        f"{name} sm_{architecture}": report(launch, architecture)
        for name, launch in found.items()
        for architecture in ARCHITECTURES
    }
    json.dump({"triton": triton.__version__, "kernels": kernels}, sys.stdout)


if __name__ == "__main__":
    main()
