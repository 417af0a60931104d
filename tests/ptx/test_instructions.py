"""What single instructions do, by the definitions of the PTX ISA."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ptx.emulation import Policy
from tests.ptx.programs import run

pytestmark = pytest.mark.ptx
THREAD = np.arange(64, dtype=np.uint32)
WORDS = THREAD * np.uint32(2654435761), (THREAD + 5) * np.uint32(2246822519)
"""%r6 and %r7 below, bits of all kinds."""


def halves(function):
    """A function of float64 as one of two bfloat16 in a word, which is rounded once; a NaN is 0x7fff."""

    @np.errstate(invalid="ignore")
    def of_words(*words):
        found = np.asarray(function(*(word.view(jnp.bfloat16).astype(np.float64) for word in words)))
        return np.where(np.isnan(found), 0x7FFF, found.astype(jnp.bfloat16).view("u2")).astype("u2").view("u4")

    return of_words


def floats(function):
    """A function of int32 in float32 as one of words."""
    return lambda *words: function(*(word.view(np.int32).astype(np.float32) for word in words)).view(np.uint32)


def permuted(a, b):
    """By 0xb052: the bytes 2, 5, 0 and the sign of byte 3."""
    a, b = (word.view(np.uint8).reshape(-1, 4) for word in (a, b))
    chosen = a[:, 2], b[:, 1], a[:, 0], np.where(a[:, 3] >= 128, 255, 0).astype(np.uint8)
    return np.stack(chosen, -1).copy().view(np.uint32)[:, 0]


@np.errstate(invalid="ignore")
def truncated(a, b):
    """The words as float32, to int32."""
    numbers = np.nan_to_num(np.trunc(a.view(np.float32).astype(np.float64)), nan=0)
    return np.clip(numbers, -(2.0**31), 2.0**31 - 1).astype(np.int32).view(np.uint32)


INSTRUCTIONS = {  # what stands before the result in %r8: its value
    "prmt.b32 %r8, %r6, %r7, 0xb052U;": permuted,
    "lop3.b32 %r8, %r6, %r7, %r0, 0xca;": lambda a, b: (a & b) | (~a & THREAD),
    "bfi.b32 %r8, %r6, %r7, 5, 11;": lambda a, b: (b & ~np.uint32(0x7FF << 5)) | (a & 0x7FF) << 5,
    "bfi.b32 %r8, %r6, %r7, 24, 32;": lambda a, b: (b & 0xFFFFFF) | a << 24,
    "sub.bf16x2 %r8, %r6, %r7;": halves(np.subtract),
    "max.NaN.bf16x2 %r8, %r6, %r7;": halves(np.maximum),
    "min.NaN.bf16x2 %r8, %r6, %r7;": halves(np.minimum),
    "neg.bf16x2 %r8, %r6;": lambda a, b: a ^ 0x80008000,
    "abs.bf16x2 %r8, %r6;": lambda a, b: a & 0x7FFF7FFF,
    "cvt.rn.f32.s32 %r6, %r6; cvt.rn.f32.s32 %r7, %r7; min.NaN.f32 %r8, %r6, %r7;": floats(np.minimum),
    "cvt.rn.f32.u32 %r6, %r6; sqrt.rn.f32 %r8, %r6;": lambda a, b: np.sqrt(a.astype(np.float32)).view(np.uint32),
    "cvt.rn.f32.u32 %r7, %r7; rsqrt.approx.f32 %r8, %r7;": lambda a, b: (
        (b.astype(np.float32).astype(np.float64) ** -0.5).astype(np.float32).view(np.uint32)
    ),
    "cvt.rzi.s32.f32 %r8, %r6;": truncated,
    "mov.b32 %r8, 0x7fc00000; cvt.rzi.s32.f32 %r8, %r8;": lambda a, b: np.zeros_like(a),  # of a NaN
}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_an_instruction_gives_its_value(instructions):
    faults, output = run(f"""
        mul.lo.s32 %r6, %r0, {2654435761};
        add.s32 %r7, %r0, 5;
        mul.lo.s32 %r7, %r7, {2246822519};
        {instructions}
        st.global.b32 [%rd5], %r8;""")
    assert not faults
    assert (output.view(np.uint32) == INSTRUCTIONS[instructions](*WORDS)).all()


def holds(comparison, a, b):
    """What `setp` says: of numbers as its name without u, of a NaN with u only."""
    if np.isnan(a) or np.isnan(b):
        return comparison == "nan" or comparison.endswith("u")
    if comparison in ("num", "nan"):
        return comparison == "num"
    name = comparison.removesuffix("u")
    return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name]


@pytest.mark.parametrize("comparison", ["eq", "ne", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_a_comparison_of_floats_with_a_nan(comparison):
    """Comparisons of 0 to 3 with 1, where 3 stands for a NaN."""
    faults, output = run(f"""
        and.b32 %r6, %r0, 3;
        cvt.rn.f32.s32 %r7, %r6;
        setp.eq.s32 %p2, %r6, 3;
        selp.b32 %r7, 0x7fffffff, %r7, %p2;
        setp.{comparison}.f32 %p2, %r7, 0f3F800000;
        selp.b32 %r8, 1, 0, %p2;
        st.global.b32 [%rd5], %r8;""")
    assert not faults
    assert output[:4].tolist() == [holds(comparison, a, 1.0) for a in (0.0, 1.0, 2.0, np.nan)]


def choose(index):
    """10, 11, 12 or 13 by the branches of `brx.idx`, after which the block meets."""
    branches = "".join(f"CASE{n}: mov.b32 %r7, {10 + n}; bra OVER;" for n in range(4))
    return run(f"""
        {index}
        TARGETS: .branchtargets CASE0, CASE1, CASE2, CASE3;
        brx.idx %r6, TARGETS;
        {branches}
        OVER:
        bar.sync 0;
        st.global.b32 [%rd5], %r7;""")


def test_lanes_branch_by_an_index_together_or_each_by_its_own():
    thread = np.arange(64)
    for index, expected in (("and.b32 %r6, %r0, 3;", thread % 4), ("add.s32 %r6, %r2, 2;", thread // 32 + 2)):
        faults, output = choose(index)
        assert not faults and (output == 10 + expected).all()


@pytest.mark.parametrize("index", ["and.b32 %r6, %r0, 7;", "sub.s32 %r6, %r2, 1;"])
def test_an_index_without_a_branch_is_reported(index):
    assert choose(index)[0] == {"brx.idx: no such target"}


LOADED = {
    "x1": "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r7]; "
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r7+128];",
    "x2": "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r8, %r9}, [%r7];",
    "x4": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r8, %r9}, [%r7];",
}
"""Two matrices into %r8 and %r9; lanes from 16 on have the addresses of the first 16."""


def matrices(load, barrier="bar.sync 0;", offset="0", lanes="", **options):
    """Numbers from 0 to 127 as two matrices of 8 x 8; the first warp stores one as it is loaded, the second the other.

    `offset` is that of rows, `lanes` a guard of the load."""
    load = "; ".join(lanes + one for one in load.split("; "))
    return run(
        f"""
        mad.lo.s32 %r6, %r0, 0x20002, 0x10000;
        st.shared.b32 [%r5], %r6;
        {barrier}
        and.b32 %r7, %r0, 15;
        shl.b32 %r7, %r7, 4;
        add.s32 %r7, %r7, %r1;
        add.s32 %r7, %r7, {offset};
        {load}
        selp.b32 %r6, %r8, %r9, %p0;
        st.global.b32 [%rd5], %r6;""",
        **options,
    )


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", LOADED)
def test_a_lane_gets_two_elements_of_a_row_or_of_a_column(count, transposed):
    faults, output = matrices(LOADED[count].replace(".shared", transposed + ".shared"))
    assert not faults
    stored = np.arange(128).reshape(2, 8, 8)
    assert (output.view(np.int16).reshape(2, 8, 8) == (stored.mT if transposed else stored)).all()


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("race: read after write", dict(barrier="bar.warp.sync -1;")),
        ("race within a warp: read after write", dict(barrier="", offset="16")),
        ("shared memory: read of what nobody wrote", dict(offset="256")),
        ("shared memory: misaligned", dict(offset="8")),
        ("shared memory: out of bounds", dict(offset="1024")),
        ("part of a warp", dict(lanes="@%p1 ")),
    ],
)
def test_a_fault_of_a_load_of_matrices_is_reported(kind, fault, transposed):
    load = LOADED["x4"].replace(".shared", transposed + ".shared")
    policies = Policy.LATE_COPIES, Policy.EARLY_COPIES
    assert kind in set().union(*(matrices(load, policy=policy, **fault)[0] for policy in policies))


def product(lanes="", b="%r6"):
    """Products of ones: 16 everywhere."""
    return run(f"""
        mov.b32 %r6, 0x3f803f80;
        mov.b32 %r7, 0;
        {lanes} mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {{%r8, %r9, %r10, %r11}}, {{%r6, %r6, %r6, %r6}}, {{%r6, {b}}}, {{%r7, %r7, %r7, %r7}};
        st.global.b32 [%rd5], %r11;""")


def test_a_product_needs_all_lanes_and_spreads_what_nobody_wrote():
    faults, output = product()
    assert not faults and (output.view(np.float32) == 16).all()
    assert product("@!%p1")[0] == {"part of a warp"}
    assert np.isnan(product(b="%r9")[1].view(np.float32)).all()
