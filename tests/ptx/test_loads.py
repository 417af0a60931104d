"""Where ptxas puts the loads of a line: it may move what the program says, so the machine code itself is read."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from gspn_jax.kernels import bodies, mosaic_gpu
from tests.ptx import toolchain

pytestmark = pytest.mark.ptx
EXPONENTIALS = 24
"""Of a thread and line of 16 positions, 64 channels and 3 logits; what tells the loop over lines from others."""
LOADS = {"forward": 24, "forward, h saved": 24, "backward": 44}
"""Of a thread and line, 4 for each term: x, 3 logits, lam, out_gate; backward also gy, h and 3 states of the line
before. None is of `merge`."""
AHEAD = {"forward": 0.8, "forward, h saved": 0.8, "backward": 0.2}
"""Least part of the instructions of a line between a load and what needs it. Backward has two phases: what one of them
needs is loaded before the other, the shorter of which has a quarter of the line."""
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")


@dataclasses.dataclass(frozen=True)
class Line:
    """The instructions of the loop over lines of one direction: (operation, operands)."""

    code: list[tuple[str, str]]

    def count(self, operation: str) -> int:
        return sum(found.split(".")[0] == operation for found, _ in self.code)

    def ahead(self) -> float:
        """The least number of instructions between a load and the first that names its register, as part of a line."""
        least = len(self.code)
        for n, (operation, operands) in enumerate(self.code):
            if operation.split(".")[0] in ("LD", "LDG"):
                register = re.compile(rf"\b{re.match(r'R[0-9]+', operands)[0]}\b")
                coming = [*self.code[n + 1 :], *self.code[:n]]
                least = min(least, next(m for m, (_, text) in enumerate(coming) if register.search(text)))
        return least / len(self.code)


def lines(sass: str) -> list[Line]:
    """The loops over lines of the four directions."""
    code, labels, found = [], {}, []
    for text in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", text):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.search(text):
            code.append(instruction.groups())
    for end, (operation, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands)
        if operation.startswith("BRA") and target and labels.get(target[0], len(code)) <= end:
            line = Line(code[labels[target[0]] : end + 1])
            if line.count("MUFU") and sum(op == "MUFU.EX2" for op, _ in line.code) == EXPONENTIALS:
                found.append(line)
    return sorted(found, key=lambda line: len(line.code))[:4]  # longer ones go through what comes after a loop


def assembled() -> dict[str, toolchain.Assembled]:
    def shape(*terms, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, 16, 16, *terms), dtype)

    c = 1536
    arguments = shape(c), shape(4, 3, c), shape(4, c), shape(4, c), jax.ShapeDtypeStruct((4,), jnp.float32)

    def forward(*arrays):
        return mosaic_gpu.propagate(*arrays, None, None)

    def both(*arrays):
        y, pull = jax.vjp(forward, *arrays)
        return pull(y)

    modules = [*toolchain.lower(forward, *arguments), *toolchain.lower(both, *arguments)]
    return dict(zip(LOADS, (toolchain.assemble(module, disassemble=True) for module in modules), strict=True))


passes = functools.cache(assembled)


@pytest.mark.parametrize("name", LOADS)
def test_loads_stand_before_the_computation_that_they_are_not_for(name):
    found = passes()[name]
    directions = lines(found.sass)
    assert len(directions) == 4
    for line in directions:
        assert line.count("LD") + line.count("LDG") == LOADS[name]
        assert line.ahead() >= AHEAD[name]
    assert found.spilled_bytes == 0


@pytest.mark.parametrize("name", LOADS)
def test_threads_of_a_warpgroup_meet_once_a_line(name):
    assert [line.count("BAR") for line in lines(passes()[name].sass)] == [1] * 4


def test_loads_that_come_late_are_told(monkeypatch):
    monkeypatch.setattr(bodies, "MOST_AHEAD", 0)
    for name, found in assembled().items():
        assert min(line.ahead() for line in lines(found.sass)) < AHEAD[name]


@pytest.mark.slow
def test_wide_proxies_do_not_spill_where_a_line_has_several_tiles():
    """With two tiles ahead, as narrower ones have them, they would."""

    def forward(*arrays):
        return mosaic_gpu.propagate_low_rank(*arrays, None, 4)

    rank, channels = 160, 128
    shapes = (1, 512, 512, channels), (1, 512, 512, rank), (rank, 4, 3, channels), *[(rank, 4, channels)] * 2, (4,)
    (module,) = toolchain.lower(forward, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    assert toolchain.assemble(module).spilled_bytes == 0
