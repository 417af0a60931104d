"""The kernels' machine code, emulated: values and gradients against float64, and nothing that a detector reports."""

import pytest

from tests.ptx import cases

pytestmark = [pytest.mark.ptx, pytest.mark.timeout(1200)]
ROUNDINGS = 1.5
"""By how much the kernel's error may exceed that of the scan backend in the same type: both round differently."""
ROUNDINGS_OF_STATES = 2.0
"""The same of gradients that read the states which the forward pass saves in bfloat16; the scan has them in float32."""
FROM_STATES = ("gates", "out_gate", "merge")


def assert_right(outcome):
    """Errors are norms relative to float64; a gradient that the scan sums in float32 counts as rounded once, like y."""
    assert not outcome.faults
    for name, error in outcome.kernel.items():
        from_states = name in FROM_STATES and outcome.case.dtype == "bfloat16"
        roundings = ROUNDINGS_OF_STATES if from_states else ROUNDINGS
        assert error < roundings * max(outcome.scan[name], outcome.scan["y"]), name  # which a NaN is not


@pytest.mark.parametrize("case", [
    pytest.param(case, id=str(case), marks=() if case.quick else pytest.mark.slow) for case in cases.CASES])
def test_values_and_gradients_are_those_of_float64(case):
    outcome = cases.run(case)
    outcome.save()
    assert_right(outcome)
    assert len(outcome.runs) == (5 if case.rank else 2)
