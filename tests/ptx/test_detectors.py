"""Each detector of the emulator reports the fault it is for, and nothing where the fault is mended.

The programs have two warps, 1 KiB of shared memory at %r1, an input and an output of 64 words at %rd0 and %rd1.
"""

import ctypes

import numpy as np
import pytest

from tests.ptx import emulation, toolchain
from tests.ptx.emulation import Policy

pytestmark = pytest.mark.ptx
PROGRAM = """
.visible .entry program(
	.param .align 64 .b8 map[128],
	.param .u64 .ptr .align 256 input,
	.param .u64 .ptr .align 256 output
)
.maxntid 64, 1, 1
{{
	.reg .pred %p<4>;
	.reg .b32 %r<12>;
	.reg .b64 %rd<8>;
	ld.param.b64 %rd0, [input];
	ld.param.b64 %rd1, [output];
	mov.b64 %rd2, map;
	mov.b32 %r1, __dynamic_shmem__0;
	mov.u32 %r0, %tid.x;
	shr.u32 %r2, %r0, 5;          // warp
	setp.eq.s32 %p0, %r2, 0;
	and.b32 %r3, %r0, 31;         // lane
	setp.eq.s32 %p1, %r0, 0;
	shl.b32 %r4, %r0, 2;
	add.s32 %r5, %r1, %r4;        // a word of shared memory for each thread
	cvt.u64.u32 %rd3, %r4;
	add.s64 %rd4, %rd0, %rd3;     // of the input
	add.s64 %rd5, %rd1, %rd3;     // of the output
	{body}
	ret;
}}
"""
SEND = """
	@%p1 mbarrier.init.shared::cta.b64 [%r1+512], 1;
	@%p1 st.shared.b32 [%r1], %r0;
	{fence}
	bar.sync 0;
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+512], 128;
	add.s32 %r6, %r1, 512;
	add.s32 %r8, %r1, {offset};
	mov.b32 %r7, 0;
	@%p1 cp.async.bulk.tensor.1d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r8], [%rd2, {{%r7}}], [%r6];
	{wait}
"""
"""The first thread sends for 32 words of the input."""
WAIT = """
AGAIN:
	mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1+512], 0;
	@!%p2 bra AGAIN;
"""


INT32 = 3  # of CUtensorMapDataType


def run(body, **options):
    """(kinds of faults, the output) of a program."""
    parameters = emulation.Parameters()
    data, output = emulation.guarded((64,), np.int32), emulation.guarded((64,), np.int32)
    data[:] = np.arange(64)
    encode_map(parameters.address, data, box=32)
    for n, array in enumerate((data, output)):
        ctypes.memmove(parameters.address + 128 + 8 * n, ctypes.byref(ctypes.c_uint64(array.ctypes.data)), 8)
    program = emulation.parse(PROGRAM.format(body=body), parameters)
    found = emulation.emulate(program, parameters, [data, output], 1, threads=64, shared_bytes=1024, **options)
    return {fault.kind for fault in found.faults}, output


def encode_map(address, array, box):
    one = (ctypes.c_uint32 * 1)(1)
    refused = toolchain.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        INT32,
        1,
        ctypes.c_void_p(array.ctypes.data),
        (ctypes.c_uint64 * 1)(array.size),
        None,
        (ctypes.c_uint32 * 1)(box),
        one,
        0,
        0,
        0,
        0,
    )
    assert not refused, toolchain.driver().stand_in_said()


def test_a_right_program_has_no_faults_and_gives_its_values():
    faults, output = run("""
        ld.global.b32 %r6, [%rd4];
        st.shared.b32 [%r5], %r6;
        bar.sync 0;
        xor.b32 %r7, %r4, 128;    // of the other warp
        add.s32 %r7, %r7, %r1;
        ld.shared.b32 %r8, [%r7];
        st.global.b32 [%rd5], %r8;""")
    assert not faults
    assert (output == np.roll(np.arange(64), 32)).all()


FAULTS = {  # what is reported: (a program, what stands HERE if it has the fault, and if it has not)
    "race: read after write": (
        "st.shared.b32 [%r5], %r0; HERE xor.b32 %r7, %r5, 128; ld.shared.b32 %r8, [%r7];", "", "bar.sync 0;"),
    "race: write after write": (
        "st.shared.b32 [%r5], %r0; HERE xor.b32 %r7, %r5, 128; st.shared.b32 [%r7], %r0;", "", "bar.sync 0;"),
    "race: write after read": (
        "@%p0 st.shared.b32 [%r5], %r0; bar.sync 0; @%p0 ld.shared.b32 %r8, [%r5]; HERE xor.b32 %r7, %r5, 128;"
        "@!%p0 st.shared.b32 [%r7], %r0;", "", "bar.sync 0;"),
    "race within a warp: read after write": (
        "st.shared.b32 [%r5], %r0; HERE xor.b32 %r7, %r5, 4; ld.shared.b32 %r8, [%r7];", "", "bar.warp.sync -1;"),
    "race within a warp: write after write": (
        "st.shared.b32 [%r5], %r0; HERE xor.b32 %r7, %r5, 4; st.shared.b32 [%r7], %r0;", "", "bar.warp.sync -1;"),
    "race within a warp: write after read": (
        "st.shared.b32 [%r5], %r0; bar.warp.sync -1; xor.b32 %r7, %r5, 4; ld.shared.b32 %r8, [%r7]; HERE"
        "st.shared.b32 [%r5], %r0;", "", "bar.warp.sync -1;"),
    "shared memory: read of what nobody wrote": (
        "HERE ld.shared.b32 %r8, [%r5];", "", "st.shared.b32 [%r5], %r0;"),
    "shared memory: out of bounds": ("st.shared.b32 [%r5+HERE], %r0;", "1000", "768"),
    "shared memory: misaligned": ("st.shared.b32 [%r5+HERE], %r0;", "2", "4"),
    "shared memory: word of an mbarrier": (
        "@%p1 mbarrier.init.shared::cta.b64 [%r1+512], 1; bar.sync 0; @%p1 st.shared.b32 [%r1+HERE], %r0;",
        "516", "520"),
    "mbarrier: initialised twice": (
        "HERE mbarrier.init.shared::cta.b64 [%r1+512], 1;", "@%p0", "@%p1"),
    "mbarrier: none here": (
        "@%p1 mbarrier.init.shared::cta.b64 [%r1+512], 1; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r1+HERE];",
        "520", "512"),
    "mbarrier: too many arrivals": (
        "@%p1 mbarrier.init.shared::cta.b64 [%r1+512], 2; bar.sync 0; @%p1 mbarrier.arrive.shared::cta.b64 _, "
        "[%r1+512], HERE;", "3", "2"),
    "out of bounds: load": ("ld.global.b32 %r6, [%rd4+HERE];", "4", "0"),
    "out of bounds: store": ("st.global.b32 [%rd5+HERE], %r0;", "-4", "0"),
    "misaligned access to device memory": ("@%p1 ld.global.b32 %r6, [%rd0+HERE];", "2", "4"),
    "store to an input": ("st.global.b32 [HERE], %r0;", "%rd4", "%rd5"),
    "stored twice with different values": (
        "shl.b32 %r7, %r3, 2; cvt.u64.u32 %rd6, %r7; add.s64 %rd6, %rd1, %rd6; @%p0 st.global.b32 [%rd6], %r2; HERE"
        "@!%p0 st.global.b32 [%rd6], %r2;", "", "bar.sync 0;"),
    "deadlock": (
        "@%p1 mbarrier.init.shared::cta.b64 [%r1+512], 1; bar.sync 0; HERE" + WAIT, "",
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1+512];"),
    "part of a warp": ("@HERE bra OVER; bar.sync 0; OVER:", "%p1", "!%p3"),
    "bar.sync: threads": ("bar.sync 1, HERE;", "48", "64"),
    "bar.sync: number": ("bar.sync HERE;", "%r3", "15"),
    "missing proxy fence": (
        SEND.format(fence="HERE", offset=0, wait=WAIT), "", "fence.proxy.async.shared::cta;"),
    "TMA: misaligned destination": (SEND.format(fence="", offset="HERE", wait=WAIT), "144", "256"),
    "block ended before its copies": (SEND.format(fence="", offset=256, wait="HERE"), "", WAIT),
    "trap": ("@HERE trap;", "%p1", "!%p3"),
}  # fmt: skip


def faults_of(kind, mended, policies=(Policy.LATE_COPIES, Policy.EARLY_COPIES), seed=0):
    """Under any of the policies: which of two warps is first decides what a race looks like."""
    body, *fillings = FAULTS[kind]
    body = "setp.eq.s32 %p3, %r0, %r0; " + body.replace("HERE", fillings[mended])
    return set().union(*(run(body, policy=policy, seed=seed)[0] for policy in policies))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_reported(kind):
    assert kind in faults_of(kind, mended=False)
    assert not faults_of(kind, mended=True)


@pytest.mark.parametrize("policy", Policy)
def test_a_race_is_found_however_warps_are_interleaved(policy):
    for seed in range(5):
        assert faults_of("race: read after write", False, [policy], seed)
        assert not faults_of("race: read after write", True, [policy], seed)


def test_a_copy_brings_its_words_before_the_wait_is_over():
    faults, output = run(
        SEND.format(fence="", offset=256, wait=WAIT)
        + """
        and.b32 %r7, %r4, 124;
        add.s32 %r7, %r7, %r8;
        ld.shared.b32 %r9, [%r7];
        st.global.b32 [%rd5], %r9;"""
    )
    assert not faults
    assert (output == np.arange(64) % 32).all()


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


def test_a_copy_that_nobody_waits_for_races():
    faults, _ = run(
        SEND.format(fence="", offset=256, wait="@%p0 bra OVER;" + WAIT + "OVER:")
        + """
        @%p0 ld.shared.b32 %r9, [%r8];""",
        policy=Policy.EARLY_COPIES,
    )
    assert "race: read after write" in faults


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("box", 3, b"inner box is no multiple of 16 bytes"),
        ("base", 4, b"array not aligned to 16 bytes"),
        ("box", 260, b"box"),
    ],
)
def test_the_driver_refuses_descriptors_that_cuda_refuses(field, value, said):
    parameters, data = emulation.Parameters(), emulation.guarded((512,), np.int32)
    with pytest.raises(AssertionError):
        encode_map(parameters.address, data[1:] if field == "base" else data, box=value if field == "box" else 32)
    assert said in toolchain.driver().stand_in_said()


def test_an_instruction_that_is_not_known_is_refused_with_its_line():
    with pytest.raises(NotImplementedError, match=r"PTX line 26: atom\.add\.u32 %r6, \[%rd1\], 1"):
        run("atom.add.u32 %r6, [%rd1], 1;")
