"""Runs the project's kernels in the emulator of PTX, through the project's own code around them.

    with emulation.emulated(policy=Policy.RANDOM, seed=0) as runs:
        y, pull = jax.vjp(lambda x: mosaic_gpu.propagate(x, ...), x)      # eagerly: no jit around it

Each kernel is lowered for CUDA and compiled to PTX by Mosaic GPU's own compiler; its host code runs against a stand-in
driver, which encodes its TMA descriptors and takes its launch; the launch is emulated thread by thread.
"""

import contextlib
import ctypes
import dataclasses
import enum
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax.kernels import compat
from tests.ptx import ptx, toolchain

GUARD = 4096
"""Bytes around each array that belong to no other."""
ALIGNMENT = 256
"""Of arrays and of the block of parameters, as XLA and CUDA align them."""
REPORT_BYTES = 1 << 20


class Policy(enum.IntEnum):
    """How warps are interleaved, and when copies arrive (enum Policy of emulator/program.h)."""

    ROUND_ROBIN = 0
    RANDOM = 1
    UNTIL_IT_WAITS = 2
    LATE_COPIES = 3
    EARLY_COPIES = 4


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a detector reported."""

    kind: str
    line: int
    """Of the PTX, -1 if it has none."""
    times: int
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} at line {self.line} of the PTX ({self.times} times): {self.detail}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What one launch did."""

    program: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    registers: int
    instructions: int
    """Of warps."""
    seconds: float
    faults: list[Fault]

    def __str__(self) -> str:
        said = (
            f"{self.program}: grid {self.grid}, {self.threads} threads, {self.shared_bytes} bytes shared, "
            f"{self.registers} registers, {self.instructions} warp instructions in {self.seconds:.1f} s"
        )
        return "\n  ".join([said, *map(str, self.faults)])


class _Array(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("number", ctypes.c_int32),
    )


class _Launch(ctypes.Structure):
    """struct Launch of emulator/program.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "lists", "constants32", "constants64", "parameters", "arrays")),
        ("seed", ctypes.c_uint64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "code_length",
                "registers32",
                "registers64",
                "predicates",
                "constants32_length",
                "constants64_length",
                "parameter_bytes",
                "array_count",
            )
        ),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("shared_bytes", ctypes.c_int32),
        ("policy", ctypes.c_int32),
        ("noise", ctypes.c_int32),
    )


@functools.cache
def _emulator() -> tuple[ctypes.CDLL, dict[str, int]]:
    """(the library, numbers of its operations)"""
    library = ctypes.CDLL(str(toolchain.build("emulator.cc")))
    library.emulate.restype = ctypes.c_uint64
    library.operation_name.restype = ctypes.c_char_p
    operations = {}
    while name := library.operation_name(len(operations)):
        operations[name.decode()] = len(operations)
    return library, operations


def guarded(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of NaN, aligned, with a guard on either side."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    block = np.full(size + 2 * GUARD + ALIGNMENT, 0xFF, np.uint8)  # all bits set are NaN
    start = GUARD + -(block.ctypes.data + GUARD) % ALIGNMENT
    return block[start : start + size].view(dtype).reshape(shape)


class Parameters:
    """The block of parameters of a launch, whose address is part of the program."""

    def __init__(self):
        self.block = guarded((8192,), np.uint8)

    @property
    def address(self) -> int:
        return self.block.ctypes.data


def parse(source: str, parameters: Parameters) -> ptx.Program:
    return ptx.parse(source, _emulator()[1], parameters.address)


def emulate(
    program: ptx.Program,
    parameters: Parameters,
    arrays: list[np.ndarray],
    outputs: int,
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    threads: int = 32,
    shared_bytes: int = 0,
    registers: int = 0,
    seed: int = 0,
    policy: Policy = Policy.RANDOM,
    noise: int = 0,
) -> Run:
    """Runs a program on these arrays, of which the last `outputs` may be written.

    `parameters` hold what the host code left there. With `noise` approximate instructions are off by up to that many
    units in the last place.
    """
    places = [(a.ctypes.data, a.ctypes.data + a.nbytes, n >= len(arrays) - outputs, n) for n, a in enumerate(arrays)]
    places.append((parameters.address, parameters.address + program.parameter_bytes, False, -1))
    table = (_Array * len(places))(*places)
    code, text = np.ascontiguousarray(program.code), ctypes.create_string_buffer(REPORT_BYTES)
    small, wide = program.constants["w"], program.constants["d"]
    launch = _Launch(
        code.ctypes.data, program.lists.ctypes.data, small.ctypes.data, wide.ctypes.data, parameters.address,
        ctypes.addressof(table), seed, len(code), program.registers["w"], program.registers["d"],
        max(program.registers["p"], 1), len(small), len(wide), program.parameter_bytes, len(table),
        grid, (threads, 1, 1), shared_bytes, policy, noise)  # fmt: skip
    start = time.perf_counter()
    instructions = _emulator()[0].emulate(ctypes.byref(launch), text, ctypes.c_uint64(REPORT_BYTES))
    seconds = time.perf_counter() - start
    faults = [
        Fault(kind, int(line), int(times), detail)
        for kind, line, times, detail in (row.split("\t") for row in text.value.decode().splitlines())
    ]
    return Run(program.name, grid, threads, shared_bytes, registers, instructions, seconds, faults)


class Kernel:
    """A kernel that was compiled, and how it is launched."""

    def __init__(self, compiled: toolchain.Assembled, edit: Callable[[str], str]):
        self.compiled = compiled
        self.parameters = Parameters()
        self.program = parse(edit(compiled.ptx), self.parameters)

    def __call__(self, arrays: list[np.ndarray], outputs: int, **options: Any) -> list[Run]:
        """Runs it on these arrays, of which the last `outputs` are written."""
        runs = []

        def on_launch(grid, threads, shared_bytes, sources):
            for parameter, source in zip(self.program.parameters, sources, strict=False):
                ctypes.memmove(self.parameters.address + parameter.offset, source, parameter.size)
            runs.append(
                emulate(
                    self.program,
                    self.parameters,
                    arrays,
                    outputs,
                    grid=grid,
                    threads=threads,
                    shared_bytes=shared_bytes,
                    registers=self.compiled.registers,
                    **options,
                )
            )

        self.compiled.launch([array.ctypes.data for array in arrays], on_launch)
        return runs


_assembled: dict[bytes, toolchain.Assembled] = {}


def call(
    function: Callable,
    arrays: Sequence[jax.Array],
    outputs: Sequence[Any],
    *,
    edit: Callable[[str], str] = str,
    **options: Any,
) -> tuple[list[jax.Array], list[Run]]:
    """(results, what ran) of a function that is one kernel and gives arrays of the shapes and types of `outputs`.

    `edit` changes the PTX before it runs; `options` are those of `emulate`: seed, policy, noise. Results are NaN where
    nothing is stored.
    """
    (module,) = toolchain.lower(function, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays))
    if module not in _assembled:
        _assembled[module] = toolchain.assemble(module)
    inputs = [guarded(array.shape, array.dtype) for array in arrays]
    for copy, array in zip(inputs, arrays, strict=True):
        copy[...] = np.asarray(array)
    found = [guarded(output.shape, output.dtype) for output in outputs]
    runs = Kernel(_assembled[module], edit)([*inputs, *found], len(found), **options)
    return [jnp.asarray(output) for output in found], runs


@contextlib.contextmanager
def emulated(**options: Any) -> Iterator[list[Run]]:
    """Inside, the project's kernels are emulated, with `options` of `call`; yields the list of what ran."""
    runs: list[Run] = []
    original = compat.kernel

    def kernel(body, made_of, arrays, **arguments):
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            raise TypeError("an emulated kernel runs eagerly, without jit")

        def lowered(*arrays):
            return original(body, made_of, arrays, **arguments)

        results, ran = call(lowered, arrays, arguments["out_type"], **options)
        runs.extend(ran)
        return results

    compat.kernel = kernel
    try:
        yield runs
    finally:
        compat.kernel = original
