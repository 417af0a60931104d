"""Checkpoints: what is saved comes back, on any mesh, and what does not belong to the run is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from gspn_jax.config import ModelConfig
from gspn_jax.runs import checkpoints
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from tests.runs.saved import NAMES, mesh_of, save
from tests.training import tiny


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((2, 2, 1), (1, 1, 1)),
        ((2, 2, 2), (1, 1, 3)),
        *(
            pytest.param(*meshes, marks=pytest.mark.slow)
            for meshes in [
                ((1, 1, 8), (2, 4, 1)),
                ((2, 2, 1), (8, 1, 1)),
                ((2, 2, 1), (1, 8, 1)),
                ((2, 2, 1), (2, 2, 2)),
                ((1, 1, 1), (2, 2, 2)),
                ((8, 1, 1), (1, 1, 4)),
                ((1, 8, 1), (1, 2, 1)),
            ]
        ),
    ],
    ids=str,
)
def test_a_state_comes_back_on_any_mesh(tmp_path, one, other):
    """Every shard is read by the device that holds it: what is restored is sharded as the target asks.

    Of a width of 36, so that weights are padded with mesh.fsdp 8 and not with less.
    """
    config = tiny.config(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=36))
    state = save(config, 12, mesh=mesh_of(*one))
    target = abstract_state(DiffusionTask(config), mesh_of(*other))
    with Checkpoints(config, "f", NAMES) as restorer:
        step, restored = restorer.restore(target)
    assert step == 12 and restored.step == 12 and not restored.halted
    own = abstract_state(DiffusionTask(config), mesh_of())
    for part in ("params", "opt_state", "ema"):
        assert_equal(
            *(
                jax.tree.map(
                    lambda a, s: a[tuple(map(slice, s.shape))], jax.device_get(getattr(found, part)), getattr(own, part)
                )
                for found in (restored, state)
            )
        )
    assert jax.tree.map(lambda a: (a.shape, a.sharding), restored) == jax.tree.map(
        lambda s: (s.shape, s.sharding), target
    )


def test_a_new_run_has_nothing_to_restore(tmp_path):
    config = tiny.config(tmp_path)
    with Checkpoints(config, "f", NAMES) as restorer:
        assert restorer.restore(abstract_state(DiffusionTask(config), mesh_of())) is None


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = tiny.config(tmp_path)
    with Checkpoints(config, "f", NAMES), pytest.raises(CheckpointError, match=f"another process .* in {tmp_path}"):
        Checkpoints(config, "f", NAMES)
    with Checkpoints(config, "f", NAMES):
        pass


def test_the_latest_two_and_the_periodic_ones_are_kept(tmp_path):
    config = tiny.config(tmp_path, keep_every=20)
    save(config, 10, 20, 25, 30, 40, 45, 50)
    assert checkpoints.steps(tmp_path) == [20, 40, 45, 50]


def test_what_a_killed_save_left_is_swept(tmp_path):
    config = tiny.config(tmp_path)
    save(config, 3)
    left = checkpoints.folder(tmp_path) / "4.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    with Checkpoints(config, "f", NAMES) as restorer:
        assert not left.exists()
        assert restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))[0] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: dataclasses.replace(c, model=ModelConfig(preset="DiT-B/2")), "model.depth 2, found None"),
        (lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, seed=1)), "train.seed 0, found 1"),
        (
            lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, batch_size=32)),
            "train.batch_size 16, found 32; .* --train.allow-change train.batch_size",
        ),
    ],
)
def test_a_run_does_not_go_on_as_another(tmp_path, change, said):
    config = tiny.config(tmp_path)
    save(config, 3)
    changed = change(config)
    with Checkpoints(changed, "f", NAMES) as restorer, pytest.raises(CheckpointError, match=said):
        restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))


def test_another_data_set_is_noticed(tmp_path):
    config = tiny.config(tmp_path)
    save(config, 3)
    with (
        Checkpoints(config, "g", NAMES) as restorer,
        pytest.raises(CheckpointError, match=r"fingerprint f, found g.*--train.allow-change data"),
    ):
        restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))


def test_what_is_asked_for_by_name_may_change(tmp_path, caplog):
    config = tiny.config(tmp_path)
    save(config, 3)
    changed = tiny.config(tmp_path, batch_size=32, allow_change=("train.batch_size",))
    with Checkpoints(changed, "f", NAMES) as restorer:
        assert restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))[0] == 3
    with Checkpoints(changed, "g", NAMES) as restorer, pytest.raises(CheckpointError, match="data set has changed"):
        restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))
    changed = dataclasses.replace(
        tiny.config(tmp_path, allow_change=("data",)), data=dataclasses.replace(config.data, flip=True)
    )
    with Checkpoints(changed, "g", NAMES) as restorer:
        assert restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))[0] == 3
    assert "as --train.allow-change asks" in caplog.text
    changed = dataclasses.replace(changed, data=dataclasses.replace(config.data, num_classes=11))
    with (
        Checkpoints(changed, "g", NAMES) as restorer,
        pytest.raises(CheckpointError, match=r"data.num_classes 10, found 11; choose another run_dir .* run$"),
    ):
        restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))


def test_what_does_not_make_it_another_run_may_change_and_is_logged(tmp_path, caplog):
    config = tiny.config(tmp_path)
    save(config, 3)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=99),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-4),
        model=dataclasses.replace(config.model, remat="full"),
        data=dataclasses.replace(config.data, workers=2),
    )
    with caplog.at_level("INFO"), Checkpoints(config, "f", NAMES) as restorer:
        assert restorer.restore(abstract_state(DiffusionTask(config), mesh_of()))[0] == 3
    assert "was data.workers 0, found 2; was model.remat 'none', found 'full'; " in caplog.text
    assert "was optimizer.learning_rate 0.001, found 0.0005; was train.steps 20, found 99" in caplog.text


def test_the_config_and_class_names_are_saved_with_it(tmp_path):
    config = tiny.config(tmp_path)
    save(config, 3)
    assert checkpoints.read_config(tmp_path) == (3, config)
    assert checkpoints.read_meta(tmp_path)[1]["class_names"] == NAMES


@pytest.mark.parametrize("decay", [None, 0.9, 0.99, 0.0])
def test_sampling_gets_the_average_it_asks_for(tmp_path, decay):
    config = tiny.config(tmp_path)
    state = save(config, 3)
    wanted = state.params if decay == 0.0 else state.ema["0.99" if decay == 0.99 else "0.9"]
    assert_equal(checkpoints.restore_params(tmp_path, 3, config, mesh_of(1, 2, 1), ema_decay=decay), wanted)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        checkpoints.read_config(tmp_path)
    config = tiny.config(tmp_path)
    save(config, 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .* found steps \[3\]"):
        checkpoints.read_config(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"one that the run kept \(0.9, 0.99\)"):
        checkpoints.restore_params(tmp_path, 3, config, mesh_of(), ema_decay=0.5)
