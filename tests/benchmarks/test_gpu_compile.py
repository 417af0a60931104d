"""Bytes, operations and times read from compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_compile_report, hlo, roofline

HLO = """HloModule jit_step, is_scheduled=true

FileNames
1 "/elsewhere/gspn_jax/models/norms.py"

FunctionNames
1 "layer_norm"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%fused_slice (p0: f32[10,100], p1: s32[]) -> bf16[100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%part)
  ROOT %cast = bf16[100]{0} convert(%flat)
}

%fused_update (p0: bf16[10,100], p1: bf16[100], p2: s32[]) -> bf16[10,100] {
  %p0 = bf16[10,100]{1,0} parameter(0)
  %p1 = bf16[100]{0} parameter(1)
  %row = bf16[1,100]{1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[10,100]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%body (state: (s32[], f32[10,100], bf16[10,100], bf16[64,32])) -> (s32[], f32[10,100], bf16[10,100], bf16[64,32]) {
  %state = (s32[], f32[10,100]{1,0}, bf16[10,100]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = f32[10,100]{1,0} get-tuple-element(%state), index=1
  %stack = bf16[10,100]{1,0} get-tuple-element(%state), index=2
  %x = bf16[64,32]{1,0} get-tuple-element(%state), index=3
  %slice = bf16[100]{0} fusion(%weights, %i), kind=kLoop, calls=%fused_slice, metadata={stack_frame_id=1}
  %start = (bf16[100]{0}, bf16[100]{0}) all-reduce-start(%slice), replica_groups={{0,1}}, to_apply=%add
  %product = (bf16[64,64]{1,0}, s8[4096]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %done = bf16[100]{0} all-reduce-done(%start)
  %write = bf16[10,100]{1,0} fusion(%stack, %done, %i), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[10,100]{1,0}, bf16[10,100]{1,0}, bf16[64,32]{1,0}) tuple(%i, %weights, %write, %x)
}

ENTRY %main (a: f32[10,100], x: bf16[64,32]) -> bf16[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %nothing = bf16[] constant(0)
  %stack = bf16[10,100]{1,0} broadcast(%nothing), dimensions={}
  %state = (s32[], f32[10,100]{1,0}, bf16[10,100]{1,0}, bf16[64,32]{1,0}) tuple(%zero, %a, %stack, %x)
  %loop = (s32[], f32[10,100]{1,0}, bf16[10,100]{1,0}, bf16[64,32]{1,0}) while(%state), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
  %rows = bf16[10,100]{1,0} get-tuple-element(%loop), index=2
  %inside = bf16[10,100]{1,0} negate(%rows), metadata={op_name="jit(step)/jvp(jit(block))/neg"}
  ROOT %after = bf16[10,100]{1,0} negate(%inside), metadata={op_name="jit(step)/neg"}
}
"""


def test_bytes_operations_and_turns_are_those_counted_by_hand():
    found = {kernel.instruction.name: kernel for kernel in roofline.kernels(hlo.Program(HLO))}
    assert {name: kernel.times for name, kernel in found.items()} == {
        "stack": 1,
        "slice": 10,
        "start": 10,
        "product": 10,
        "done": 10,
        "write": 10,
        "inside": 1,
        "after": 1,
    }
    assert (found["slice"].read, found["slice"].written) == (400 + 4, 200)  # one row of ten, and its number
    assert (found["write"].read, found["write"].written) == (200 + 4, 200)  # in place
    assert found["product"].operations == 2 * 64 * 64 * 32
    assert (found["product"].read, found["product"].written) == (2 * 2 * 64 * 32, 2 * 64 * 64)  # without workspace
    assert found["stack"].kind == "zero-filling" and found["write"].kind == "stacking"
    assert found["slice"].kind == "norms" and found["product"].kind == "products"
    assert found["inside"].kind == "elementwise" and found["after"].kind == "outside of blocks"
    assert found["slice"].seconds("h200") == pytest.approx(604 / (4.8e12 * 0.85))


def test_what_runs_beside_an_exchange_is_what_is_scheduled_between_its_ends():
    (exchange,) = roofline.exchanges(hlo.Program(HLO), "h100")
    assert (exchange.kind, exchange.times, exchange.asynchronous, exchange.types) == ("all-reduce", 10, True, ("bf16",))
    moved = 2 * 2 * 64 * 32 + 2 * 64 * 64
    assert exchange.overlapped_us == pytest.approx(1e6 * moved / (3.35e12 * 0.85)) and exchange.megabytes == 2e-4


def test_products_of_a_compiled_loop_are_counted_once_a_turn():
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = jax.jit(run).lower(jnp.zeros((16, 32)), jnp.zeros((7, 32, 32))).compile().as_text()
    found = roofline.kernels(hlo.Program(text))
    assert sum(kernel.times * kernel.operations for kernel in found) == 7 * 2 * 16 * 32 * 32


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="must be the HLO of a compiled program, found no ENTRY computation"):
        hlo.Program("HloModule nothing")


def test_the_page_is_that_of_the_results():
    import json

    from benchmarks.gpu_compile import RESULTS, ROOT

    page = (ROOT / "docs" / "performance.md").read_text()
    assert gpu_compile_report.render(list(json.loads(RESULTS.read_text()).values())) == page
