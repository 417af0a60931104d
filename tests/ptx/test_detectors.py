"""Each detector of the emulator reports the fault it is for, and nothing where the fault is mended.

`tests/ptx/programs.py` has what the programs have in common.
"""

import numpy as np
import pytest

from tests.ptx import emulation, toolchain
from tests.ptx.emulation import Policy
from tests.ptx.programs import encode_map, run

pytestmark = pytest.mark.ptx
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


COMMIT, DONE = "cp.async.commit_group;", "cp.async.wait_group 0;"


def thread_copies(first, then="", **options):
    """Each thread copies a word; `first` and `then` stand before and after the barrier. They read the other warp's."""
    return run(
        f"""
        cp.async.ca.shared.global [%r5], [%rd4], 4;
        {first}
        bar.sync 0;
        {then}
        xor.b32 %r7, %r5, 128;
        ld.shared.b32 %r8, [%r7];
        st.global.b32 [%rd5], %r8;""",
        **options,
    )


def test_copies_of_threads_are_there_when_all_have_waited():
    faults, output = thread_copies(COMMIT + DONE)
    assert not faults
    assert (output == np.roll(np.arange(64), 32)).all()


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        ("race: read after write", COMMIT, DONE),
        ("race: write after read", COMMIT, DONE),
        ("warp ended before its copies", COMMIT + "cp.async.wait_group 1;", ""),
        ("warp ended before its copies", DONE, ""),
        ("race within a warp: read after write", "xor.b32 %r7, %r5, 4; ld.shared.b32 %r8, [%r7];" + COMMIT + DONE, ""),
        ("not covered: cp.async.commit_group of a part of a warp", "@%p1 " + COMMIT + DONE, ""),
    ],
)
def test_a_fault_of_the_copies_of_threads_is_reported(kind, first, then):
    policies = Policy.LATE_COPIES, Policy.EARLY_COPIES
    assert kind in set().union(*(thread_copies(first, then, policy=policy)[0] for policy in policies))


def test_a_copy_of_a_thread_is_not_there_before():
    _, output = thread_copies("ld.shared.b32 %r9, [%r5]; st.global.b32 [%rd5], %r9;" + COMMIT + DONE, "ret;")
    assert (output == 0x7FC07FC0).all()


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
