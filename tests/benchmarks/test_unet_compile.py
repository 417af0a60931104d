"""Operations of the kernels of a compiled U-Net, against counts by hand."""

import pytest

from benchmarks import hlo, unet_compile

HLO = """HloModule jit_call, is_scheduled=true

%fused_scan (p0: bf16[2,16,8,128], p1: f32[4,128], p2: bf16[2,16,8,96], p3: bf16[4,2,5,64,96]) -> bf16[2,16,8,4,128] {
  %p0 = bf16[2,16,8,128]{3,2,1,0} parameter(0)
  %p1 = f32[4,128]{1,0} parameter(1)
  %p2 = bf16[2,16,8,96]{3,2,1,0} parameter(2)
  %p3 = bf16[4,2,5,64,96]{4,3,2,1,0} parameter(3)
  ROOT %scan = bf16[2,16,8,4,128]{4,3,2,1,0} custom-call(%p0, %p1, %p2, %p3), custom_call_target="mosaic_gpu_v2"
}

ENTRY %main (x: bf16[2,16,8,128], merge: f32[4,128], proxy: bf16[2,16,8,96], up: bf16[4,2,5,64,96]) -> bf16[] {
  %x = bf16[2,16,8,128]{3,2,1,0} parameter(0)
  %merge = f32[4,128]{1,0} parameter(1)
  %proxy = bf16[2,16,8,96]{3,2,1,0} parameter(2)
  %up = bf16[4,2,5,64,96]{4,3,2,1,0} parameter(3)
  %terms = bf16[2,16,8,4,3,128]{5,4,3,2,1,0} constant({...})
  %expanded = bf16[2,16,8,4,128]{4,3,2,1,0} fusion(%x, %merge, %proxy, %up), kind=kCustom, calls=%fused_scan
  %lam = bf16[2,16,8,4,128]{4,3,2,1,0} constant({...})
  %plain = bf16[2,16,8,4,128]{4,3,2,1,0} custom-call(%x, %terms, %lam, %merge), custom_call_target="mosaic_gpu_v2"
  %queries = bf16[2,128,8,64]{3,2,1,0} constant({...})
  %keys = bf16[2,77,8,64]{3,2,1,0} constant({...})
  %attention = (bf16[2,128,8,64]{3,2,1,0}, u8[0]{0}) custom-call(%queries, %keys, %keys), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %nothing = bf16[] constant(0)
}
"""


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("expanded", 2 * (2 * 16 * 8) * (4 * 128 * 5 * 96)),  # for each pixel, direction, channel and kind, 96 wide
        ("plain", 0),
        ("attention", 2 * 2 * (2 * 8) * 128 * 77 * 64),  # two products for each image and head
    ],
)
def test_operations(name, operations):
    program = hlo.Program(HLO)
    (entry,) = (computation for _, computation, _ in program.runs())
    assert unet_compile.operations(program, entry, program.computations[entry][name]) == operations
