"""Optimised HLO text of a program: its instructions, how often each runs, the bytes it moves and its operations."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}
FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
}
"""Instructions that are no kernel."""
ASYNC_STARTS = ("fusion-start", "async-start", "call-start")

_ARRAY = re.compile(rf"\b({'|'.join(ITEM_BYTES)})\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BRANCHES = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, dimensions) of every array that a shape names, tuples included."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(text)]


def nbytes(text: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(ITEM_BYTES[kind] * math.prod(dims) for kind, dims in arrays(text))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def calls(self) -> str | None:
        """Name of the computation that a fusion or an asynchronous start runs."""
        return self.attribute(r"calls=%?([\w.\-]+)")

    @property
    def target(self) -> str:
        """Name of the library call, or ''."""
        return self.attribute(r'custom_call_target="([^"]+)"') or ""

    @property
    def source(self) -> str:
        """JAX's name of the operation it comes from, or ''."""
        return self.attribute(r'op_name="([^"]*)"') or ""


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "({[") - (text[index] in ")}]")
        if not depth:
            return index
    raise ValueError(f"an instruction must close its brackets, found {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    rest = re.sub(r"/\*.*?\*/", "", match[3])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[begin:end]))
    return Instruction(match[2], shape, rest[:begin].strip(), operands, rest[end + 1 :], bool(match[1]))


class Program:
    """The computations of a compiled program by name, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            begins = _COMPUTATION.match(line)
            if begins:
                current = self.computations.setdefault(begins[2], {})
                self.entry = begins[2] if begins[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _instruction(line)):
                current[found.name] = found
        if not self.entry:
            raise ValueError("the text must be the HLO of a compiled program, found no ENTRY computation")
        self._frames = _frames(text)

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """(name of the loop, computation, times a run of the program) of what kernels are in; "entry" is no loop.

        A loop whose turns the compiler does not know counts once.
        """
        yield "entry", self.entry, 1
        yield from self._loops(self.entry, 1)

    def _loops(self, computation: str, times: int) -> Iterator[tuple[str, str, int]]:
        for found in self.computations[computation].values():
            if found.opcode == "while":
                turns = int(found.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1)
                body = found.attribute(r"body=%?([\w.\-]+)")
                yield found.name, body, times * turns
                yield from self._loops(body, times * turns)
            elif found.opcode in ("call", "async-start", "conditional"):
                called = _BRANCHES.findall(found.attributes)
                for group in re.findall(r"branch_computations=\{([^}]*)\}", found.attributes):
                    called += re.findall(r"%([\w.\-]+)", group)
                for name in called:
                    if name in self.computations:
                        yield from self._loops(name, times)

    def kernels(self, computation: str) -> list[Instruction]:
        """The instructions that do work, in the order of the schedule."""
        return [found for found in self.computations[computation].values() if found.opcode not in FREE]

    def inside(self, kernel: Instruction) -> Iterator[Instruction]:
        """The instructions that a fusion is made of, or the kernel itself."""
        body = self.computations.get(kernel.calls or "")
        if body is None or kernel.opcode not in ("fusion", *ASYNC_STARTS):
            yield kernel
            return
        for found in body.values():
            yield from self.inside(found)

    def where(self, kernel: Instruction) -> list[tuple[str, str]]:
        """(file, function) of the project's own frames that a kernel comes from, innermost first."""
        return self._frames.get(int(kernel.attribute(r"stack_frame_id=(\d+)") or 0), [])

    def traffic(self, computation: str, kernel: Instruction) -> tuple[int, int]:
        """(bytes read, bytes written) by a kernel, every operand once; slices and updates in place count as such."""
        body = self.computations[computation]
        if kernel.opcode.endswith("-done"):
            return 0, 0
        if kernel.opcode in ASYNC_STARTS and kernel.calls:
            parts = [self.traffic(kernel.calls, found) for found in self.kernels(kernel.calls)]
            return sum(read for read, _ in parts), sum(written for _, written in parts)
        if kernel.opcode == "fusion":
            return self._fusion_traffic(kernel.calls)
        if kernel.opcode == "copy-start":
            size = nbytes(body[kernel.operands[0]].shape)
            return size, size
        if kernel.opcode == "dynamic-slice":
            return nbytes(kernel.shape), nbytes(kernel.shape)
        if kernel.opcode == "dynamic-update-slice":
            size = nbytes(body[kernel.operands[1]].shape)
            return size, size
        read = sum(nbytes(body[name].shape) for name in kernel.operands if name in body)
        if kernel.opcode in ("all-gather-start", "reduce-scatter-start") or (
            kernel.opcode == "all-reduce-start" and kernel.shape.startswith("((")
        ):
            return read, nbytes(kernel.shape) - read  # the shape has the operands, then the results
        workspace = r"s8\[\d+\]" if "cublas" in kernel.target else "$^"
        return read, nbytes(re.sub(workspace, "", kernel.shape))

    def _fusion_traffic(self, name: str) -> tuple[int, int]:
        body = self.computations[name]
        users = collections.defaultdict(list)
        for found in body.values():
            for operand in found.operands:
                users[operand].append(found)

        def read(array: str, size: int) -> int:
            if body[array].root:
                return size
            total = 0
            for user in users[array]:
                if user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and user.operands[0] == array):
                    total += nbytes(user.shape)
                elif user.opcode in ("bitcast", "get-tuple-element", "convert"):  # what is cut off is not converted
                    total += min(size, read(user.name, nbytes(user.shape)) * size // max(nbytes(user.shape), 1))
                elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == array):
                    return size
            return min(total, size)

        def written(found: Instruction) -> int:
            if found.opcode == "get-tuple-element" and found.shape.startswith("s8["):
                return 0  # workspace of cuBLAS
            if found.opcode == "tuple":
                return sum(written(body[operand]) for operand in found.operands)
            if found.opcode == "dynamic-update-slice":
                return nbytes(body[found.operands[1]].shape)
            inner = body.get(found.operands[0]) if found.opcode == "bitcast" else None
            return written(inner) if inner and inner.opcode == "dynamic-update-slice" else nbytes(found.shape)

        reads = sum(read(found.name, nbytes(found.shape)) for found in body.values() if found.opcode == "parameter")
        return reads, written(next(found for found in body.values() if found.root))

    def operations(self, computation: str, kernel: Instruction) -> int:
        """Operations of matrix products and convolutions: 2 per multiply-add."""
        body = self.computations[computation]
        if kernel.opcode == "fusion":
            return sum(self.operations(kernel.calls, found) for found in self.computations[kernel.calls].values())
        if kernel.opcode == "dot":
            return _product(kernel, body, r"lhs_contracting_dims=\{([0-9,]*)\}")
        if kernel.opcode != "custom-call":
            return 0
        if "conv" in kernel.target:
            return _depthwise(kernel, body)
        if "gemm" in kernel.target or "matmul" in kernel.target:
            return _product(kernel, body, r'"lhs_contracting_dimensions":\["([0-9,]*)"')
        return 0


def _product(kernel: Instruction, body: dict[str, Instruction], contracted: str) -> int:
    (_, result), *_ = arrays(kernel.shape)
    (_, left), *_ = arrays(body[kernel.operands[0]].shape)
    axes = [int(axis) for axis in (kernel.attribute(contracted) or "").split(",") if axis]
    return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)


def _depthwise(kernel: Instruction, body: dict[str, Instruction]) -> int:
    """Of a grouped convolution: the window times its largest array; of others 0."""
    window = kernel.attribute(r"window=\{size=([0-9x]+)")
    if kernel.attribute(r"feature_group_count=(\d+)") is None or window is None:
        return 0
    shapes = [kernel.shape, *(body[name].shape for name in kernel.operands)]
    largest = max(math.prod(dims) for shape in shapes for _, dims in arrays(shape))
    return 2 * math.prod(map(int, window.split("x"))) * largest


def _frames(text: str) -> dict[int, list[tuple[str, str]]]:
    """stack_frame_id -> frames, from the tables in front of the computations."""
    tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
    section = None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif section and (row := re.match(r"^(\d+) (.*)$", line)):
            tables[section][int(row[1])] = row[2]

    def fields(row: str) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row)}

    @functools.cache
    def chain(frame: int) -> list[tuple[str, str]]:
        row = fields(tables["StackFrames"][frame])
        place = fields(tables["FileLocations"][row["file_location_id"]])
        file = tables["FileNames"][place["file_name_id"]].strip('"')
        own = re.search(r"\bgspn_jax/[^/].*", file)
        here = [(own[0], tables["FunctionNames"][place["function_name_id"]].strip('"'))] if own else []
        parent = row.get("parent_frame_id", 0)
        return here + (chain(parent) if parent in tables["StackFrames"] and parent != frame else [])

    return {frame: chain(frame) for frame in tables["StackFrames"]}
