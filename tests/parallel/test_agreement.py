"""Hosts agree on the first one's numbers, bit for bit."""

import contextlib
import json
import math
import socket
import subprocess
import sys

import numpy as np
import pytest

from gspn_jax.parallel.agreement import agree, gathered
from tests.training.processes import ROOT

OWN = "[{i} + 0.1, 3 * {i} - 1, {{'a': float('nan'), 'b': 2.0**-1060 * (1 + {i})}}]"
HOST = """
import json, sys
import jax
address, i = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, i)
from gspn_jax.parallel.agreement import agree
print(json.dumps(agree({own})))
"""


def test_one_host_agrees_with_itself():
    own = {"b": 1, "a": [math.pi, -2]}
    assert agree(own) is own
    assert gathered(np.array([1.5, 2.5])).tolist() == [1.5, 2.5]


@pytest.mark.slow
def test_two_hosts_have_the_numbers_of_the_first():
    """Of every kind: whole, with all bits of float64, not a number, and subnormal."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        hosts = []
        for i in range(2):
            command = [sys.executable, "-c", HOST.format(own=OWN.format(i=i)), address, str(i)]
            host = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
            hosts.append(stack.enter_context(host))
            stack.callback(host.kill)
        shown = [host.communicate(timeout=120)[0] for host in hosts]
    for lines in shown:
        (line,) = [line for line in lines.splitlines() if not line.startswith("[Gloo]")]  # jaxlib writes there, too
        numbers = json.loads(line)
        assert numbers[:2] == [0.1, -1] and isinstance(numbers[1], int)
        assert math.isnan(numbers[2]["a"]) and numbers[2]["b"] == 2.0**-1060
