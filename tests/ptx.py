"""The child of test_ptx.py: compiles the kernels for GPUs that are not here, and walks through their PTX.

A process of its own, because a kernel that is defined under TRITON_INTERPRET=1 cannot be compiled. Nothing
of a launch is written down twice: the launch code itself runs, on tensors without memory and with a recorder
in the kernel's place, and says how many warps, rows and tiles there are and what is constant.

How much a kernel loads and stores cannot be counted in PTX by eye: loops are unrolled or not, and a tile is
spread over threads in one way or another. So a program's statements are executed, for all its threads at
once. Integers are followed, floats are not: no address, mask or number of rounds depends on one.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
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
BLOCKS = 2**20 + 1
BLOCKS_FAR = 2**24 + 1  # so many that the ranks' messages lie more than 2^31 bytes apart
MISSING = 5  # elements that the last block of a vector is short of
BETAS = (0.9, 0.95)
PROGRAM = 3  # the one that is walked through
LEFT = 3  # blocks that it finds where it is the last
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Launch:
    """Stands where a kernel does and keeps what it is launched with."""

    def __init__(self, module: Any, kernel: str, code: Callable[[], object]) -> None:
        self.kernel = getattr(module, kernel)
        with mock.patch.object(module, kernel, self):
            code()

    def __getitem__(self, grid: tuple[int, ...]) -> "Launch":
        return self

    def __call__(self, *arguments: object, **named: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | named
        constant = {each.name for each in self.kernel.params if each.is_constexpr}
        self.constants = {name: given[name] for name in names if name in constant}
        self.parameters = {name: given[name] for name in names if name not in constant}
        self.options = {name: value for name, value in given.items() if name not in names}

    @property
    def rows(self) -> int:
        """Blocks a program."""
        return int(self.constants["ROWS"] * self.constants.get("TILES", 1))


def blocks_of(fmt: Format, blocks: int = BLOCKS) -> Blocks:
    return Blocks.zeros(blocks, BLOCK, fmt, META)


def vector(dtype: torch.dtype) -> Tensor:
    return torch.empty(BLOCKS * BLOCK - MISSING, dtype=dtype, device=META)


def accumulate(ranks: int, shard: Format, fresh: bool) -> Launch:
    message = Message(BLOCKS_FAR, BLOCK, E4M3)
    pieces = [message.blocks_of(each) for each in message.buffer(ranks, META)]
    code = partial(reduction_triton.accumulate, pieces, blocks_of(shard, BLOCKS_FAR), fresh=fresh)
    return Launch(reduction_triton, "accumulate_kernel", code)


def sweep(opt_level: str) -> Launch:
    config = FP8Config.model_validate({"enabled": True, "opt_level": opt_level})
    states, ours = config.states, config.optimizer
    master, m, v = (BY_NAME[name] for name in (states.master, states.exp_avg, states.exp_avg_sq))
    recipe = Recipe(BLOCK, E4M3, E4M3, True, master, m, v, ours.clamp, ours.seed)
    clamp = math.sqrt(next_clamp(None, BETAS)) if recipe.clamped else None
    scalars = AdamScalars(7, 1e-3, *BETAS, 1e-8, 0.1, decoupled=True, bias_correction=True, clamp=clamp)
    segments = [Segment(slice(first, first + 1), first, 0) for first in range(3)]
    plan = adam_triton.plan(segments, BLOCKS, BLOCK, META)
    state = AdamState(blocks_of(master), blocks_of(m), blocks_of(v))
    weights = torch.empty(BLOCKS, BLOCK, dtype=torch.bfloat16, device=META)
    operands = (state, blocks_of(E4M3), weights, plan, scalars, torch.empty(2, device=META))
    code = partial(adam_triton.adam_step, *operands, seed=recipe.seed)
    return Launch(adam_triton, "adam_kernel", code)


def launches() -> dict[str, Launch]:
    """What test_ptx.DESIGN names."""
    quantize = partial(blocks_triton.quantize, vector(torch.bfloat16), blocks_of(E4M3))
    dequantize = partial(blocks_triton.dequantize, blocks_of(E4M3), vector(torch.float32))
    found = {
        "quantize": Launch(blocks_triton, "quantize_kernel", quantize),
        "dequantize": Launch(blocks_triton, "dequantize_kernel", dequantize),
    }
    for ranks in (2, 8):
        for shard in (E4M3, FP32):
            found[f"accumulate {ranks} into a fresh {shard.name}"] = accumulate(ranks, shard, True)
            found[f"accumulate {ranks} into an old {shard.name}"] = accumulate(ranks, shard, False)
    return found | {f"sweep {level}": sweep(level) for level in ("O1", "O2")}


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(launch: Launch, architecture: int) -> Any:
    """The kernel for one compute capability; tensors and 64-bit distances are divisible by 16."""
    constants = dict(launch.constants)
    constants["HARDWARE"] = divmod(architecture, 10) >= blocks_triton.FIRST_WITH_FP8
    types = {name: type_of(value) for name, value in launch.parameters.items()}
    assert all(value % 16 == 0 for name, value in launch.parameters.items() if types[name] == "i64")
    names = launch.kernel.arg_names
    wide = [name for name, each in types.items() if each == "i64" or each[0] == "*"]
    source = ASTSource(
        fn=launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in wide},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(\w+):(\d+)", printed))
    return {name: int(found[name]) for name in ("REG", "STACK", "LOCAL")}


Bits = NDArray[np.int64]  # a register in every thread
SHIFT = 44  # a tensor's address is its parameter's number, counted from 1, times 2^44
INTEGER = re.compile(r"pred|[bus](?:16|32|64)")
UNDERSTOOD: dict[str, Callable[..., Any]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "neg": np.negative,
    "not": np.invert,
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
    "mad": lambda a, b, c: a * b + c,
    "bfe": lambda a, start, length: (a >> start) & ((1 << length) - 1),
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
    "setp.eq": np.equal,
    "setp.ne": np.not_equal,
    "setp.lt": np.less,
    "setp.le": np.less_equal,
    "setp.gt": np.greater,
    "setp.ge": np.greater_equal,
}


@dataclass(frozen=True)
class Statement:
    guard: str  # "", "%p1" or "!%p1"
    op: str
    operands: list[str]


def parse(ptx: str) -> tuple[list[Statement], dict[str, int]]:
    """Statements, and which of them each label stands before."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in ptx.split(".section", maxsplit=1)[0].splitlines():
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = len(statements)
        elif found := re.match(r"\s*(?:@(!?%p\d+)\s+)?([a-z][\w.:]+)\s*(.*);", line):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
            statements.append(Statement(found[1] or "", found[2], operands))
    return statements, labels


@cache
def width_of(op: str) -> int:
    """Bytes of a global access, 0 of any other operation; no other way to global memory is allowed."""
    name, *rest = op.split(".")
    assert name not in ("atom", "red", "cp"), op
    if name not in ("ld", "st") or rest[0].split("::")[0] in ("shared", "param"):
        return 0
    assert rest[0] == "global", op
    vector = math.prod(int(each[1:]) for each in rest if re.fullmatch(r"v\d", each))
    return vector * int(rest[-1][1:]) // 8


@cache
def meaning(op: str) -> tuple[Callable[..., Any], list[str], str] | None:
    """What an operation on integers computes, the types of its operands and that of its result."""
    name, *rest = op.split(".")
    kind = rest[-1] if rest else ""
    function = UNDERSTOOD.get(f"setp.{rest[0]}" if name == "setp" else name)
    out = {"setp": "pred", "cvt": rest[0] if rest else ""}.get(name, kind)
    if function is None or not INTEGER.fullmatch(kind) or not INTEGER.fullmatch(out):
        return None
    if "wide" in rest:
        out = {"s32": "s64", "u32": "u64"}[kind]
    return function, [kind, kind, {"selp": "pred", "mad": out}.get(name, kind)], out


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def fitted(bits: Bits, kind: str) -> Bits:
    """Cut to a type's width, and extended by its sign where it has one."""
    width = bits_of(kind)
    if kind[0] == "s":
        return (bits << (64 - width)) >> (64 - width)
    return bits & ((1 << width) - 1) if width < 64 else bits


class Program:
    """One program of a kernel: its threads walk through the statements together."""

    def __init__(self, ptx: str, parameters: dict[str, Any], memory: dict[tuple[str, int], int]) -> None:
        self.statements, self.labels = parse(ptx)
        self.parameters = list(parameters.items())
        self.memory = memory  # (tensor, byte) -> word; zero elsewhere
        self.threads = int(ptx.split(".reqntid ")[1].split(maxsplit=1)[0])
        # A register that is not here is not followed.
        self.registers = {"%tid.x": np.arange(self.threads), "%ctaid.x": self.filled(PROGRAM)}
        self.executed: Counter[str] = Counter()
        self.tensors: dict[int, str] = {}  # of the statements that reach one
        self.asked: Counter[str] = Counter()  # bytes, times threads
        # Bytes, each once.
        self.touched: defaultdict[str, Bits] = defaultdict(lambda: np.zeros(0, np.int64))

    def filled(self, value: int) -> Bits:
        return np.full(self.threads, value)

    def run(self) -> "Program":
        at = 0
        while self.statements[at].op != "ret":
            statement = self.statements[at]
            self.executed[statement.op] += 1
            assert self.executed.total() < 10**6, "a loop without end"
            if width_of(statement.op):
                self.access(at, statement)
            elif statement.op[:2] not in ("st", "br"):
                self.compute(statement)
            at = self.labels[statement.operands[0]] if self.taken(statement) else at + 1
        return self

    def taken(self, statement: Statement) -> bool:
        if statement.op not in ("bra", "bra.uni"):
            return False
        taken = self.active(statement.guard)
        assert taken.all() or not taken.any(), "the threads part"
        return bool(taken.all())

    def active(self, guard: str) -> NDArray[np.bool_]:
        """The threads that a statement is for."""
        if not guard:
            return np.ones(self.threads, dtype=np.bool_)
        set_in = self.registers[guard.lstrip("!")].astype(np.bool_)
        return np.logical_not(set_in) if guard[0] == "!" else set_in

    def write(self, operand: str, bits: Bits | None, kind: str = "b64") -> None:
        """To a register, or to several that share the bits; None where they are not known."""
        registers = re.findall(r"%\w+|\b_\b", operand)
        for index, register in enumerate(registers):
            self.registers.pop(register, None)
            if bits is not None:
                part = bits_of(kind) // len(registers)
                self.registers[register] = fitted(bits >> (index * part), f"u{part}")

    def read(self, operand: str, kind: str) -> Bits | None:
        """The value of a number, of a register, or of several that share its bits."""
        if re.fullmatch(r"-?\d+|0x\w+", operand):
            return self.filled(int(operand.rstrip("U"), 0))
        registers = re.findall(r"%[\w.]+", operand)
        if not registers or any(each not in self.registers for each in registers):
            return None
        part = bits_of(kind) // len(registers)
        bits = self.filled(0)
        for index, register in enumerate(registers):
            bits |= fitted(self.registers[register], f"u{part}") << (index * part)
        return fitted(bits, kind)

    def compute(self, statement: Statement) -> None:
        """What a statement makes of integers, where its operands are known."""
        if statement.op.startswith("ld.param"):
            return self.write(statement.operands[0], self.parameter(statement.operands[1]))
        known = meaning(statement.op)
        if known is None or statement.guard:
            return self.write(",".join(statement.operands[:1]), None)
        function, kinds, out = known
        values = [self.read(*each) for each in zip(statement.operands[1:], kinds, strict=False)]
        complete = all(each is not None for each in values)
        bits = np.asarray(function(*values), dtype=np.int64) if complete else None
        return self.write(statement.operands[0], bits, out)

    def parameter(self, operand: str) -> Bits | None:
        number = int(operand.rstrip("]").split("_param_")[1])
        value = self.parameters[number][1]
        if isinstance(value, Tensor):
            return self.filled((number + 1) << SHIFT)
        return self.filled(value) if isinstance(value, int) else None

    def access(self, at: int, statement: Statement) -> None:
        """Note which bytes of which tensor are loaded or stored; words that are loaded are followed."""
        kind, width, active = statement.op[:2], width_of(statement.op), self.active(statement.guard)
        place = re.findall(r"%\w+|-?\d+", statement.operands[0 if kind == "st" else 1])
        address = self.registers[place[0]] + sum(map(int, place[1:]))
        name = self.parameters[int(address[0] >> SHIFT) - 1][0]
        offset = address & ((1 << SHIFT) - 1)
        assert len(set(address >> SHIFT)) == 1, f"{statement}: two tensors"
        assert not (offset[active] % width).any(), f"{statement}: not aligned"
        self.tensors[at] = name
        self.asked[f"{kind} {name}"] += int(active.sum()) * width
        touched = (offset[active][:, None] + np.arange(width)).ravel()
        self.touched[f"{kind} {name}"] = np.union1d(self.touched[f"{kind} {name}"], touched)
        if kind == "ld":
            words = np.array([self.memory.get((name, each), 0) for each in offset.tolist()])
            self.write(statement.operands[0], words if width == 4 and active.all() else None, "b32")


def walked(ptx: str, launch: Launch, *, last: bool) -> dict[str, Any]:
    """What a program does; `last`: at the ragged end of the tensors, and a second segment begins."""
    parameters = dict(launch.parameters)
    if last:
        blocks = PROGRAM * launch.rows + LEFT
        changed = {"blocks": blocks, "numel": blocks * BLOCK - MISSING}
        parameters |= {name: value for name, value in changed.items() if name in parameters}
    one = int(np.float32(1).view(np.int32))  # the step is taken
    memory = {("control", 4): one, ("tile_segments", 4 * (PROGRAM + 1)): int(last)}
    program = Program(ptx, parameters, memory).run()
    return {
        "threads": program.threads,
        "executed": program.executed,
        "tensors": program.tensors,
        "asked": program.asked,
        "touched": {name: len(each) for name, each in program.touched.items()},
    }


def report(launch: Launch, architecture: int) -> dict[str, Any]:
    kernel = compiled(launch, architecture)
    ptx = kernel.asm["ptx"]
    return {
        "ptx": ptx,
        "resources": resources(kernel.asm["cubin"]),
        "rows": launch.rows,
        "widths": {at: width_of(each.op) for at, each in enumerate(parse(ptx)[0]) if width_of(each.op)},
        "whole": walked(ptx, launch, last=False),
        "last": walked(ptx, launch, last=True),
    }


def main() -> None:
    kernels = {
        f"{name}, sm_{architecture}": report(launch, architecture)
        for name, launch in launches().items()
        for architecture in ARCHITECTURES
    }
    figures = {"triton": triton.__version__, "left": LEFT, "missing": MISSING, "kernels": kernels}
    Path(sys.argv[1]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
