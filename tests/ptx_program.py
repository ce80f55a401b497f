"""A program of a compiled kernel, walked through statement by statement for all its threads at once.

Integers are followed, floats are not: no address, mask or number of rounds depends on one.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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

    def __init__(
        self, ptx: str, number: int, parameters: dict[str, Any], memory: dict[tuple[str, int], int]
    ) -> None:
        self.statements, self.labels = parse(ptx)
        self.parameters = list(parameters.items())
        self.memory = memory  # (tensor, byte) -> word; zero elsewhere
        self.threads = int(ptx.split(".reqntid ")[1].split(maxsplit=1)[0])
        # A register that is not here is not followed.
        self.registers = {"%tid.x": np.arange(self.threads), "%ctaid.x": self.filled(number)}
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
            followed = width in (4, 8) and ".v" not in statement.op and active.all()
            self.write(statement.operands[0], words if followed else None, f"b{8 * width}")
