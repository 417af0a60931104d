"""Parses the PTX that Mosaic GPU makes of a kernel into the records that the emulator runs (emulator/program.h).

It knows the instructions that our kernels are made of; another one raises `NotImplementedError` with its line.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

SHARED_BASE = 1024
"""Address of the first byte of shared memory, kSharedBase of emulator/shared_memory.h."""
INSTRUCTION = np.dtype([
    ("operation", "i4"), ("predicate", "i4"), ("negated", "i4"), ("line", "i4"), ("operand", "i4", 8),
    ("immediate", "i8"), ("kind", "i4"), ("mode", "i4"), ("bytes", "i4"), ("count", "i4"), ("list", "i4"),
    ("list_length", "i4")])  # fmt: skip
"""struct Instruction."""

SPACES = {"": 0, "global": 1, "shared": 2}
SPECIAL_REGISTERS = {
    "%tid.x": 0, "%ctaid.x": 1, "%ctaid.y": 2, "%ctaid.z": 3, "%ntid.x": 4, "%laneid": 5, "%nctaid.x": 6,
    "%nctaid.y": 7, "%nctaid.z": 8, "%tid.y": 9, "%tid.z": 9}  # fmt: skip
COMPARED_TYPES = {"u32": 0, "b32": 0, "s32": 1, "f32": 2, "u64": 3, "b64": 3, "s64": 4, "u16": 5, "b16": 5, "s16": 6}
COMPARISONS = {
    "eq": 0, "ne": 1, "lt": 2, "lo": 2, "le": 3, "ls": 3, "gt": 4, "hi": 4, "ge": 5, "hs": 5, "equ": 6, "neu": 7,
    "ltu": 8, "leu": 9, "gtu": 10, "geu": 11, "num": 12, "nan": 13}  # fmt: skip
COMBINATIONS = {"": 0, "and": 1, "or": 2, "xor": 3}

IGNORED = (
    "prefetch",
    "fence.mbarrier_init",
    "fence.sc",
    "fence.acq_rel",
    "membar",
    "wgmma.fence",
    "griddepcontrol",
    "setmaxnreg",
    "nanosleep",
    "discard",
)
"""What changes neither values nor the order of accesses here: `bar.sync` and mbarriers order them."""
PLAIN = {  # operation: (types of its operands: w 32 bits, d 64, p predicate; opcodes)
    "MOV32": ("ww", "mov.b32 mov.f32 mov.b16 mov.u32 mov.s32"),
    "MOV64": ("dd", "mov.b64 mov.u64 cvta.to.global.u64 cvta.param.u64 cvta.global.u64"),
    "SELP32": ("wwwp", "selp.b32 selp.f32 selp.b16 selp.u32 selp.s32"), "SELP64": ("dddp", "selp.b64"),
    "ADD32": ("www", "add.s32 add.u32"), "SUB32": ("www", "sub.s32 sub.u32"),
    "MUL32": ("www", "mul.lo.s32 mul.lo.u32"), "MAD32": ("wwww", "mad.lo.s32 mad.lo.u32"),
    "ADD64": ("ddd", "add.s64 add.u64"), "SUB64": ("ddd", "sub.s64 sub.u64"),
    "MUL64": ("ddd", "mul.lo.s64 mul.lo.u64"), "MAD64": ("dddd", "mad.lo.s64"),
    "MUL_WIDE_U32": ("dww", "mul.wide.u32"), "MUL_WIDE_S32": ("dww", "mul.wide.s32"),
    "MUL_HI_U16": ("www", "mul.hi.u16"), "MUL_WIDE_U16": ("www", "mul.wide.u16"),
    "MUL_HI_U32": ("www", "mul.hi.u32"), "MUL_HI_S32": ("www", "mul.hi.s32"),
    "DIV_U32": ("www", "div.u32"), "DIV_S32": ("www", "div.s32"), "REM_U32": ("www", "rem.u32"),
    "REM_S32": ("www", "rem.s32"), "MIN_S32": ("www", "min.s32"), "MAX_S32": ("www", "max.s32"),
    "MAX_RELU_S32": ("www", "max.relu.s32"),
    "NEG32": ("ww", "neg.s32"), "MIN_U32": ("www", "min.u32"), "MAX_U32": ("www", "max.u32"),
    "MIN_U64": ("ddd", "min.u64"),
    "ADD16": ("www", "add.s16 add.u16"), "SUB16": ("www", "sub.s16"), "MUL16": ("www", "mul.lo.s16 mul.lo.u16"),
    "MAD16": ("wwww", "mad.lo.s16"),
    "AND32": ("www", "and.b32 and.b16"), "OR32": ("www", "or.b32 or.b16"), "XOR32": ("www", "xor.b32 xor.b16"),
    "NOT32": ("ww", "not.b32"), "AND64": ("ddd", "and.b64"), "OR64": ("ddd", "or.b64"), "XOR64": ("ddd", "xor.b64"),
    "NOT64": ("dd", "not.b64"), "ANDP": ("ppp", "and.pred"), "ORP": ("ppp", "or.pred"), "XORP": ("ppp", "xor.pred"),
    "NOTP": ("pp", "not.pred"), "SHL32": ("www", "shl.b32"), "SHL16": ("www", "shl.b16"),
    "SHR_U32": ("www", "shr.u32 shr.b32 shr.u16"),
    "SHR_S32": ("www", "shr.s32"), "SHL64": ("ddw", "shl.b64"), "SHR_U64": ("ddw", "shr.u64 shr.b64"),
    "SHR_S64": ("ddw", "shr.s64"), "BFE_U32": ("wwww", "bfe.u32"), "BFE_S32": ("wwww", "bfe.s32"),
    "BFE_U64": ("ddww", "bfe.u64"), "BFE_S64": ("ddww", "bfe.s64"), "BFI32": ("wwwww", "bfi.b32"),
    "PRMT": ("wwww", "prmt.b32"), "LOP3": ("wwwww", "lop3.b32"),
    "U16_TO_U32": ("ww", "cvt.u16.u32 cvt.u32.u16"), "S16_TO_S32": ("ww", "cvt.s32.s16"),
    "U32_TO_U64": ("dw", "cvt.u64.u32"), "S32_TO_S64": ("dw", "cvt.s64.s32"), "U64_TO_U32": ("wd", "cvt.u32.u64"),
    "S32_TO_F32": ("ww", "cvt.rn.f32.s32"), "U32_TO_F32": ("ww", "cvt.rn.f32.u32"),
    "BF16_TO_F32": ("ww", "cvt.f32.bf16"), "F32_TO_BF16": ("ww", "cvt.rn.bf16.f32"),
    "F32_TO_BF16X2": ("www", "cvt.rn.bf16x2.f32"), "F32_TO_S32": ("ww", "cvt.rzi.s32.f32"),
    "ADD_F32": ("www", "add.f32 add.rn.f32"), "SUB_F32": ("www", "sub.f32 sub.rn.f32"),
    "MUL_F32": ("www", "mul.f32 mul.rn.f32"), "FMA_F32": ("wwww", "fma.rn.f32"),
    "DIV_F32": ("www", "div.rn.f32 div.full.f32 div.approx.f32"), "NEG_F32": ("ww", "neg.f32"),
    "ABS_F32": ("ww", "abs.f32"), "MIN_F32": ("www", "min.f32"), "MAX_F32": ("www", "max.f32"),
    "MAX_NAN_F32": ("www", "max.NaN.f32"), "MIN_NAN_F32": ("www", "min.NaN.f32"),
    "EXP2_F32": ("ww", "ex2.approx.f32 ex2.approx.ftz.f32"),
    "LOG2_F32": ("ww", "lg2.approx.f32 lg2.approx.ftz.f32"), "SQRT_F32": ("ww", "sqrt.rn.f32 sqrt.approx.f32"),
    "RSQRT_F32": ("ww", "rsqrt.approx.f32"),
    "RECIPROCAL_F32": ("ww", "rcp.rn.f32 rcp.approx.f32 rcp.approx.ftz.f32"),
    "ADD_BF16X2": ("www", "add.bf16x2 add.rn.bf16x2"), "SUB_BF16X2": ("www", "sub.bf16x2 sub.rn.bf16x2"),
    "MAX_NAN_BF16X2": ("www", "max.NaN.bf16x2"), "MIN_NAN_BF16X2": ("www", "min.NaN.bf16x2"),
    "NEG_BF16X2": ("ww", "neg.bf16x2"), "ABS_BF16X2": ("ww", "abs.bf16x2"),
    "MUL_BF16X2": ("www", "mul.bf16x2 mul.rn.bf16x2"),
    "FMA_BF16X2": ("wwww", "fma.rn.bf16x2"), "ADD_F32X2": ("ddd", "add.f32x2 add.rn.f32x2"),
    "SUB_F32X2": ("ddd", "sub.f32x2 sub.rn.f32x2"), "MUL_F32X2": ("ddd", "mul.f32x2 mul.rn.f32x2"),
    "FMA_F32X2": ("dddd", "fma.rn.f32x2"),
}  # fmt: skip
_PLAIN = {opcode: (operation, types) for operation, (types, opcodes) in PLAIN.items() for opcode in opcodes.split()}


@dataclasses.dataclass(frozen=True)
class Parameter:
    name: str
    size: int
    """Bytes."""
    offset: int
    """In the block of parameters."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel as the emulator takes it."""

    name: str
    parameters: list[Parameter]
    code: np.ndarray
    """[instructions] of INSTRUCTION"""
    lists: np.ndarray
    """int32: registers of vectors, one after the other"""
    registers: dict[str, int]
    """How many there are of "w", "d" and "p"; constants come behind those."""
    constants: dict[str, np.ndarray]
    """Of "w" and "d"."""

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def parse(source: str, operations: dict[str, int], parameters_at: int) -> Program:
    """The one kernel of `source`, with numbers of `operations` and its parameters at that address."""
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{", source, re.S)
    parameters = list(_parameters(entry[2]))
    addresses = {"__dynamic_shmem__0": SHARED_BASE} | {p.name: parameters_at + p.offset for p in parameters}
    scanned = _scan(_statements(source[entry.end() :], 1 + source[: entry.end()].count("\n")))
    assembler = _Assembler(scanned, operations, addresses, {p.name: p.offset for p in parameters})
    code = assembler.assemble()
    constants = {
        kind: np.array([*values] or [0], dtype)
        for (kind, values), dtype in zip(assembler.constants.items(), ("u4", "u8"), strict=True)
    }
    return Program(entry[1], parameters, code, np.array(assembler.lists or [0], np.int32), scanned.registers, constants)


def _parameters(text: str) -> Iterator[Parameter]:
    offset = 0
    for declaration in text.split(","):
        if not (match := re.search(r"\.(u64|u32|b64|b32|b8)\b.*?(\w+)(?:\[(\d+)\])?\s*$", declaration.strip(), re.S)):
            continue
        size = int(match[1][1:]) // 8 * int(match[3] or 1)
        aligned = re.match(r"\.param\s+\.align (\d+)", declaration.strip())
        alignment = int(aligned[1]) if aligned else size
        offset += -offset % alignment
        yield Parameter(match[2], size, offset)
        offset += size


def _statements(body: str, first_line: int) -> Iterator[tuple[int, str]]:
    """(line, text) of braces, labels, declarations and instructions."""
    pending, started = "", 0
    for number, line in enumerate(body.split("\n"), start=first_line):
        line = re.sub(r"//.*", "", line).strip()
        if line.startswith(".section"):
            return
        if line.startswith((".loc", ".file")):
            continue
        while line:
            if not pending and (match := re.match(r"(\{|\}|[$\w]+:)\s*", line)):
                yield number, match[1]
                line = line[match.end() :]
                continue
            started = started if pending else number
            head, semicolon, line = line.partition(";")
            pending = f"{pending} {head}".strip()
            line = line.strip()
            if semicolon:
                yield started, pending
                pending = ""


class _Scope:
    """Names of registers and labels between two braces."""

    def __init__(self, parent: "_Scope | None" = None):
        self.parent = parent
        self.registers: dict[str, tuple[str, int]] = {}
        self.labels: dict[str, int] = {}
        self.targets: dict[str, list[str]] = {}

    def register(self, name: str) -> tuple[str, int]:
        """(kind, number)"""
        return self._find("registers", name)

    def label(self, name: str) -> int:
        return self._find("labels", name)

    def targets_of(self, name: str) -> list[int]:
        """The instructions of a `.branchtargets`."""
        return [self.label(target) for target in self._find("targets", name)]

    def _find(self, table: str, name: str):
        scope = self
        while scope is not None:
            if name in getattr(scope, table):
                return getattr(scope, table)[name]
            scope = scope.parent
        raise KeyError(name)


@dataclasses.dataclass
class _Scanned:
    instructions: list[tuple[int, _Scope, str]]
    registers: dict[str, int]

    def declare(self, scope: _Scope, text: str) -> None:
        """`.reg .b32 %r<3>` or `.reg .pred P1, P2`"""
        kind, names = re.match(r"\.reg \.(\w+)\s+(.+)$", text).groups()
        kind = "p" if kind == "pred" else "d" if kind.endswith("64") else "w"
        for name in names.split(","):
            if match := re.match(r"\s*(%\w+?)<(\d+)>", name):
                declared = [f"{match[1]}{i}" for i in range(int(match[2]))]
            else:
                declared = [name.strip()]
            for register in declared:
                scope.registers[register] = kind, self.registers[kind]
                self.registers[kind] += 1


def _scan(statements: Iterator[tuple[int, str]]) -> _Scanned:
    """Puts registers and labels into their scopes; what is left are instructions."""
    scanned, scope, label = _Scanned([], {"w": 0, "d": 0, "p": 0}), _Scope(), ""
    scanned.declare(scope, ".reg .b32 _")  # half of a register that nobody wants
    for line, text in statements:
        if text == "{":
            scope = _Scope(scope)
        elif text == "}":
            if scope.parent is None:
                break
            scope = scope.parent
        elif text.endswith(":"):
            label = text[:-1]
            scope.labels[label] = len(scanned.instructions)
        elif text.startswith(".branchtargets"):
            scope.targets[label] = _arguments(text.removeprefix(".branchtargets"))
        elif text.startswith(".reg "):
            scanned.declare(scope, text)
        elif not text.startswith("."):
            scanned.instructions.append((line, scope, text))
    return scanned


def _arguments(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class _Assembler:
    """Makes records of instructions; operands are numbers of registers, constants are registers behind the last."""

    def __init__(self, scanned: _Scanned, operations: dict, addresses: dict[str, int], offsets: dict[str, int]):
        self.scanned, self.operations, self.addresses, self.offsets = scanned, operations, addresses, offsets
        self.constants: dict[str, dict[int, int]] = {"w": {}, "d": {}}
        self.lists: list[int] = []
        self.scope = _Scope()
        self.record = None

    def assemble(self) -> np.ndarray:
        code = np.zeros(len(self.scanned.instructions), INSTRUCTION)
        code["predicate"], code["operand"] = -1, -1
        for n, (line, scope, text) in enumerate(self.scanned.instructions):
            self.record, self.scope = code[n], scope
            self.record["line"] = line
            if guard := re.match(r"@(!?)([%\w]+)\s+", text):
                self.record["predicate"], self.record["negated"] = self.register(guard[2], "p"), bool(guard[1])
                text = text[guard.end() :]
            opcode, _, rest = re.sub(r"\s+", " ", text).partition(" ")
            self.instruction(opcode, _arguments(rest))
        return code

    def instruction(self, opcode: str, arguments: list[str]) -> None:
        if opcode.startswith(IGNORED):
            self.put("NOP")
        elif opcode.startswith("mov") and arguments[1] in SPECIAL_REGISTERS:
            self.put("SPECIAL", [self.register(arguments[0], "w")], kind=SPECIAL_REGISTERS[arguments[1]])
        elif opcode in ("mov.b32", "mov.b64") and "{" in "".join(arguments):
            self.pack_or_unpack(*arguments, wide=opcode == "mov.b64")
        elif opcode in _PLAIN:
            operation, types = _PLAIN[opcode]
            self.put(operation, [self.register(a, kind) for a, kind in zip(arguments, types, strict=True)])
        else:
            for pattern, method in _OTHERS:
                if match := re.match(pattern + "$", opcode):
                    return method(self, match, *arguments)
            line = int(self.record["line"])
            raise NotImplementedError(f"PTX line {line}: {opcode} {', '.join(arguments)}")

    def put(self, operation: str, operands: list[int] = (), **fields: int) -> None:
        self.record["operation"] = self.operations[operation]
        self.record["operand"][: len(operands)] = operands
        for name, value in fields.items():
            self.record[name] = value

    # ---- operands

    def register(self, text: str, kind: str) -> int:
        """Number of a register, or of the constant that it stands for."""
        text = text.strip()
        is_address = text in self.addresses
        if kind == "p" or (re.match(r"[%A-Za-z_]", text) and not is_address):
            found, number = self.scope.register(text)
            if found != kind:
                raise ValueError(f"PTX line {self.record['line']}: {text} is of kind {found!r}, not {kind!r}")
            return number
        value = self.addresses[text] if is_address else _constant(text)
        value &= (1 << (64 if kind == "d" else 32)) - 1
        return self.scanned.registers[kind] + self.constants[kind].setdefault(value, len(self.constants[kind]))

    def registers(self, text: str, kind: str = "w") -> list[int]:
        return [self.register(name, kind) for name in re.sub(r"[{}]", "", text).split(",")]

    def vector(self, text: str, kind: str = "w") -> dict[str, int]:
        found = self.registers(text, kind)
        self.lists += found
        return dict(list=len(self.lists) - len(found), list_length=len(found))

    def address(self, text: str) -> tuple[list[int], int]:
        """([64-bit register or -1, 32-bit register or -1], offset)"""
        name, offset = re.match(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text).groups()
        offset = int(offset or 0)
        if not name.startswith("%"):
            return [-1, -1], offset + (self.addresses[name] if name in self.addresses else _constant(name))
        kind, number = self.scope.register(name)
        return ([number, -1] if kind == "d" else [-1, number]), offset

    def shared_address(self, text: str) -> int:
        """A 32-bit register, without offset."""
        (_, number), offset = self.address(text)
        if number < 0 or offset:
            raise NotImplementedError(f"PTX line {self.record['line']}: address {text}")
        return number

    # ---- instructions

    def pack_or_unpack(self, target: str, source: str, *, wide: bool) -> None:
        """{low, high} on one side, a register that holds both on the other."""
        operands = [
            number
            for text in (target, source)
            for number in self.registers(text, "d" if wide and "{" not in text else "w")
        ]
        self.put(("PACK" if "{" in source else "UNPACK") + ("64" if wide else ""), operands)

    def load_parameter(self, match, target, source):
        name, offset = re.match(r"\[(\w+)(?:\+(\d+))?\]", source).groups()
        wide = match[1] == "64"
        self.put(
            "PARAMETER",
            [self.register(target, "d" if wide else "w")],
            bytes=8 if wide else 4,
            immediate=self.offsets[name] + int(offset or 0),
        )

    def move_predicate(self, match, target, source):
        if source.startswith("%"):
            self.put("MOVP", self.registers(f"{target},{source}", "p"))
        else:
            self.put("MOVP", [self.register(target, "p")], immediate=int(source))

    def set_predicate(self, match, target, a, b, other=None):
        comparison, combination, dtype = match.groups()
        if "|" in target or dtype not in COMPARED_TYPES:
            raise NotImplementedError(f"PTX line {self.record['line']}: {match[0]} {target}")
        operands = [self.register(target, "p"), *(self.register(x, "d" if "64" in dtype else "w") for x in (a, b))]
        if other:
            operands.append(self.register(other.lstrip("!"), "p"))
        self.put(
            "SETP",
            operands,
            kind=COMPARED_TYPES[dtype],
            mode=COMPARISONS[comparison],
            count=COMBINATIONS[combination or ""],
            bytes=bool(other and other.startswith("!")),
        )

    def load_or_store(self, match, *arguments):
        operation, modifiers, elements, bits = match.groups()
        value, place = arguments if operation == "ld" else arguments[::-1]
        space = next((s for s in ("shared", "global") if f".{s}" in modifiers), "")
        operands, offset = self.address(place)
        self.put(
            "LOAD" if operation == "ld" else "STORE",
            operands,
            immediate=offset,
            kind=SPACES[space],
            bytes=int(bits) // 8,
            count=int(elements or 1),
            **self.vector(value, "d" if bits == "64" else "w"),
        )

    def move_matrices(self, match, *arguments):
        operation, count, transposed = match.groups()
        if transposed and operation == "stmatrix":
            raise NotImplementedError(f"PTX line {self.record['line']}: transposed {operation}")
        value, place = arguments if operation == "ldmatrix" else arguments[::-1]
        operands, offset = self.address(place)
        self.put(
            "LOAD_MATRIX" if operation == "ldmatrix" else "STORE_MATRIX",
            operands,
            immediate=offset,
            mode=bool(transposed),
            count=int(count),
            **self.vector(value),
        )

    def branch(self, match, target):
        self.put("BRANCH", immediate=self.scope.label(target))

    def branch_by_index(self, match, index, targets):
        found = self.scope.targets_of(targets)
        self.lists += found
        self.put("BRANCH_INDEX", [self.register(index, "w")], list=len(self.lists) - len(found), list_length=len(found))

    def leave(self, match):
        self.put("RETURN")

    def trap(self, match):
        self.put("TRAP")

    def elect(self, match, target, members):
        register, predicate = target.split("|")
        self.put("ELECT", [-1 if register == "_" else self.register(register, "w"), self.register(predicate, "p")])

    def shuffle(self, match, target, source, by, clamp, members):
        if clamp not in ("31", "0x1f") or members != "-1":
            raise NotImplementedError(f"PTX line {self.record['line']}: shuffle of a part of a warp")
        name = {"idx": "INDEX", "bfly": "XOR", "down": "DOWN", "up": "UP"}[match[1]]
        self.put(f"SHUFFLE_{name}", [self.register(a.split("|")[0], "w") for a in (target, source, by)])

    def barrier(self, match, number, threads=None):
        self.put("BARRIER", self.registers(number if threads is None else f"{number},{threads}"))

    def warp_barrier(self, match, *arguments):
        self.put("WARP_BARRIER")

    def create_mbarrier(self, match, place, count):
        operands, offset = self.address(place)
        self.put("MBARRIER_INIT", [*operands, self.register(count, "w")], immediate=offset)

    def arrive(self, match, _, place, count="1"):
        operands, offset = self.address(place)
        self.put("MBARRIER_ARRIVE", operands, immediate=offset, count=int(count))

    def expect(self, match, _, place, count):
        operands, offset = self.address(place)
        self.put("MBARRIER_EXPECT", [*operands, self.register(count, "w")], immediate=offset, count=1)

    def wait(self, match, target, place, parity, *_):
        operands, offset = self.address(place)
        self.put("MBARRIER_WAIT", [*operands, self.register(target, "p"), self.register(parity, "w")], immediate=offset)

    def copy(self, match, destination, source, barrier):
        descriptor, coordinates = re.match(r"\[\s*(%\w+)\s*,\s*(\{.*\})\s*\]", source).groups()
        self.put(
            "TMA_LOAD",
            [self.shared_address(destination), self.shared_address(barrier), self.register(descriptor, "d")],
            **self.vector(coordinates),
        )

    def thread_copy(self, match, destination, source, size):
        operands, offset = self.address(destination)
        (register, _), source_offset = self.address(source)
        if register < 0:
            raise NotImplementedError(f"PTX line {self.record['line']}: address {source}")
        self.put("CP_ASYNC", [*operands, register], immediate=offset, mode=source_offset, bytes=int(size))

    def commit_copies(self, match):
        self.put("CP_ASYNC_COMMIT")

    def wait_for_copies(self, match, groups):
        self.put("CP_ASYNC_WAIT", immediate=int(groups))

    def product(self, match, accumulators, a, b, accumulate, *scales_and_majors):
        *scales, transpose_a, transpose_b = scales_and_majors
        if scales != ["1", "1"]:
            raise NotImplementedError(f"PTX line {self.record['line']}: wgmma that negates")
        self.put(
            "WGMMA",
            [self.register(a, "d"), self.register(b, "d"), self.register(accumulate, "p")],
            kind=int(transpose_a) | int(transpose_b) << 1,
            count=int(match[1]),
            **self.vector(accumulators),
        )

    def fragment_product(self, match, *fragments):
        """d, a, b and c of mma.sync: [16, 16] by [16, 8]."""
        self.put("MMA", **self.vector(",".join(fragments)))

    def commit_products(self, match):
        self.put("WGMMA_COMMIT")

    def wait_for_products(self, match, groups):
        self.put("WGMMA_WAIT", immediate=int(groups))

    def proxy_fence(self, match):
        self.put("PROXY_FENCE")


_OTHERS: list[tuple[str, Callable]] = [
    (r"ld\.param(?:::entry)?\.\w(32|64)", _Assembler.load_parameter),
    (r"mov\.pred", _Assembler.move_predicate),
    (r"setp\.(\w+)(?:\.(and|or|xor))?\.(\w+)", _Assembler.set_predicate),
    (
        r"(ld|st)((?:\.(?:global|shared|volatile|nc|weak)(?:::\w+)*|\.L\w+::\w+(?:::\w+)*)*)(?:\.v(\d))?\.[bfus](8|16|32|64)",
        _Assembler.load_or_store,
    ),
    (r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", _Assembler.move_matrices),
    (r"bra(?:\.uni)?", _Assembler.branch),
    (r"brx\.idx", _Assembler.branch_by_index),
    (r"ret", _Assembler.leave),
    (r"trap", _Assembler.trap),
    (r"elect\.sync", _Assembler.elect),
    (r"shfl\.sync\.(idx|bfly|down|up)\.b32", _Assembler.shuffle),
    (r"(?:bar|barrier(?:\.cta)?)\.sync(?:\.aligned)?", _Assembler.barrier),
    (r"bar\.warp\.sync", _Assembler.warp_barrier),
    (r"mbarrier\.init\S*", _Assembler.create_mbarrier),
    (r"mbarrier\.arrive\.expect_tx\S*", _Assembler.expect),
    (r"mbarrier\.arrive\S*", _Assembler.arrive),
    (r"mbarrier\.(?:try|test)_wait\.parity\S*", _Assembler.wait),
    (r"cp\.async\.bulk\.tensor\.\dd\.shared::c\w+\.global(?:\.tile)?\.mbarrier::complete_tx::bytes", _Assembler.copy),
    (r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\d+B)?", _Assembler.thread_copy),
    (r"cp\.async\.commit_group", _Assembler.commit_copies),
    (r"cp\.async\.wait_group", _Assembler.wait_for_copies),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", _Assembler.product),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32", _Assembler.fragment_product),
    (r"wgmma\.commit_group\S*", _Assembler.commit_products),
    (r"wgmma\.wait_group\S*", _Assembler.wait_for_products),
    (r"fence\.proxy\.async\S*", _Assembler.proxy_fence),
]


def _constant(text: str) -> int:
    """0f3F800000 and 0d... are the bits of a float and a double."""
    return int(text[2:], 16) if re.match(r"0[fd][0-9A-Fa-f]+$", text) else int(text.removesuffix("U"), 0)
