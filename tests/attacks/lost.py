"""What the rows of attacks on what a run has made (A) have in common: stand-ins, and samples that are begun."""

import contextlib

import numpy as np
import pytest

from gspn_jax import cli
from gspn_jax.files import claim
from tests.attacks.attack import Call
from tests.attacks.attack import prepare as prepared
from tests.training import tiny


def function(action, before=None):
    """A row's `make`: `action(given, here)` under the commands' handler of errors."""

    def make(given, here):
        if before:
            before(given, here)

        def main(_):
            from gspn_jax.runs.checkpoints import CheckpointError

            with cli.user_errors(CheckpointError), pytest.MonkeyPatch.context() as patch:
                action(given, here, patch)

        return Call(main)

    return make


def both(*actions):
    """A `before` of several."""

    def before(given, here):
        for action in actions:
            action(given, here)

    return before


class Small:
    """A state of a few numbers, as `runs.saving` takes it."""

    def items(self):
        import jax.numpy as jnp

        return {"params": {"w": jnp.arange(8.0), "b": jnp.ones(2)}}

    def of_items(self, step, items):
        return self


def save_small(here, *steps, **settings):
    from gspn_jax.runs.saving import Checkpoints

    with Checkpoints(tiny.config(here / "run", **settings), "f", ["0"]) as saver:
        for step in steps:
            saver.save(step, Small())


def claimed(name, make):
    """The row `make` while another process (here: another descriptor) makes {here}/`name`."""

    def made(given, here):
        call = make(given, here)

        def main(argv):
            (here / name).parent.mkdir(exist_ok=True)
            with claim(here / name):
                call.main(argv)

        return Call(main, call.arguments)

    return made


SHAPE, COUNT = (2, 2, 3), 10


def drawn(labels, numbers):
    """Images that tell their label and number."""
    return np.broadcast_to((10 * labels + numbers)[:, None, None, None], (len(labels), *SHAPE)).astype(np.uint8)


def samples(here, draw=drawn, **settings):
    """Ten images into {here}/q.npz by `write_npz`, as sample.py does it."""
    from gspn_jax.files import claim_new
    from gspn_jax.sampling.files import write_npz

    labels, numbers = np.arange(COUNT) % 3, np.arange(COUNT)
    with claim_new(here / "q.npz") as path:
        write_npz(path, draw, labels, numbers, shape=SHAPE, batch_size=4, settings={"seed": 0} | settings)
    with np.load(here / "q.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], drawn(labels, numbers))


def begun(here, damage=lambda partial: None, batches=2):
    """Two of three batches, as a kill leaves them; then `damage`."""
    calls = []

    def dies(labels, numbers):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(1)
        return drawn(labels, numbers)

    with contextlib.suppress(KeyboardInterrupt):
        samples(here, dies)
    partial = here / "q.npz.gspn-partial"
    assert partial.is_dir()
    damage(partial)


def sampled(given, here, patch):
    samples(here)


def latents(before=None):
    names = ("--vae", "{vae}", "--output", "{here}/out", "--images", "{images}", "--image-size", "8")
    return prepared("latents", *names, before=before)
