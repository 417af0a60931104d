"""States of the tiny run that tell their step, and what a run that goes on gets of them."""

import jax
import numpy as np

from gspn_jax.config import MeshConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state, create_state
from tests.training import tiny

NAMES = [str(i) for i in range(10)]


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def state_of(config, step):
    """A state that is told apart from that of any other step."""
    return jax.tree.map(lambda a: a + a.dtype.type(step), create_state(DiffusionTask(config), one_device()))


def restore(run_dir):
    """(step, parameters) as a run that goes on gets them."""
    config = tiny.config(run_dir)
    with Checkpoints(config, "f", NAMES) as restorer:
        found = restorer.restore(abstract_state(DiffusionTask(config), one_device()))
    return found and (found[0], jax.device_get(found[1].params))


def assert_is_state_of(found, step):
    config = tiny.config()
    assert found[0] == step
    jax.tree.map(np.testing.assert_array_equal, found[1], jax.device_get(state_of(config, step).params))
