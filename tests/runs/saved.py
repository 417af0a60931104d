"""Checkpoints of the tiny run, whose parts can be told apart."""

import dataclasses

import jax

from gspn_jax.config import MeshConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state

NAMES = [str(i) for i in range(10)]


def mesh_of(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def save(config, *steps, fingerprint="f", mesh=None):
    """Saves a state whose every number is told apart from every other part's."""
    state = create_state(DiffusionTask(config), mesh or mesh_of())
    shifted = {name: jax.tree.map(lambda p, name=name: p + float(name), average) for name, average in state.ema.items()}
    state = dataclasses.replace(state, ema=shifted, opt_state=jax.tree.map(lambda a: a + 7, state.opt_state))
    with Checkpoints(config, fingerprint, NAMES) as saver:
        for step in steps:
            saver.save(step, state)
    return state
