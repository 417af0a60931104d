"""Small programs in PTX, for tests of the emulator.

They have two warps, 1 KiB of shared memory at %r1, an input and an output of 64 words at %rd0 and %rd1. The input
counts from 0.
"""

import ctypes

import numpy as np

from tests.ptx import emulation, toolchain

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
