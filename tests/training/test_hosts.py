"""Several processes as one job: the same run as one process alone, through preemption, loss and rollback.

Two hosts give the bits of one process that has their devices, because a sum of two has one order; with more, and
beside another number of devices, float32 sums over the devices are made in another order.
"""

import json
import os
import re
import signal
import socket

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import MeshConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints, saving
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from tests.training import tiny
from tests.training.processes import (
    HEARTBEAT_SECONDS,
    ROOT,
    STEPS,
    assert_same_run,
    assert_same_run_but_for_rounding,
    command,
    end,
    everything,
    finish,
    preempt,
    start,
    start_hosts,
    wait_for_step,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(devices, *flags): the run of one process."""
    made = {}

    def run(devices, *flags):
        if (devices, *flags) not in made:
            made[devices, *flags] = tmp_path_factory.mktemp("alone") / "run"
            finish(made[devices, *flags], *flags, devices=devices)
        return made[devices, *flags]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_one_run(tmp_path, alone, count):
    run_dir = tmp_path / "run"
    finish(run_dir, "--train.sample-every", "20", hosts=count)  # the other runs draw nothing, and are the same run
    (assert_same_run if count == 2 else assert_same_run_but_for_rounding)(run_dir, alone(count))
    assert_same_run_but_for_rounding(run_dir, alone(1))
    assert len(list((run_dir / "tensorboard").iterdir())) == 1  # written by one of them
    assert sorted(p.name for p in (run_dir / "samples").iterdir()) == ["step_0000020.png", "step_0000040.png"]


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "times"), [([0], 1), ([1], 1), ([0, 1], 1), ([1, 0], 5)], ids=str)
def test_a_preempted_job_goes_on_with_the_same_bits(tmp_path, alone, hosts, times):
    run_dir = tmp_path / "run"
    for step in (5, 15):
        preempt(run_dir, 2, step, hosts=hosts, times=times)
    finish(run_dir, hosts=2)
    assert_same_run(run_dir, alone(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "lost", "by"),
    [
        (2, 1, signal.SIGKILL),
        (2, 0, signal.SIGKILL),
        (4, 2, signal.SIGKILL),
        (2, 1, signal.SIGSTOP),
        (2, 0, signal.SIGSTOP),
    ],
    ids=str,
)
def test_the_loss_of_a_host_stops_the_others_who_say_so(tmp_path, alone, count, lost, by):
    """Killed, its connections break; stopped, it only falls silent. Then the job goes on."""
    run_dir = tmp_path / "run"
    processes = start_hosts(command(run_dir), count)
    wait_for_step(processes[0], run_dir, 9)  # the save at 8 has waited for that at 4
    os.killpg(processes[lost].pid, by)
    others = [process for i, process in enumerate(processes) if i != lost]
    try:
        ended = end(*others, timeout=10 * HEARTBEAT_SECONDS)  # long enough for a machine that is busy
    finally:
        os.killpg(processes[lost].pid, signal.SIGKILL)
        processes[lost].communicate()
    for code, errors in ended:
        assert code == 75, errors
        said = [line for line in errors.splitlines() if "another host, or the connection to it, was lost" in line]
        assert said and said[-1].endswith("the same command on all hosts goes on from the newest checkpoint"), errors
    assert checkpoints.steps(run_dir)[-1] >= 4
    finish(run_dir, hosts=count)
    (assert_same_run if count == 2 else assert_same_run_but_for_rounding)(run_dir, alone(count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "values", "said"),
    [
        (
            "--optimizer.learning-rate",
            ("0.001", "0.002"),
            "optimizer.learning_rate is 0.001 on host 0 and 0.002 on host 1",
        ),
        ("--train.steps", ("40", "44"), "train.steps is 40 on host 0 and 44 on host 1"),
    ],
)
def test_hosts_that_differ_train_nothing_and_say_so(tmp_path, flag, values, said):
    """Both exit 0 with a result of neither before, or the one with more steps waited for ever."""
    run_dir = tmp_path / "run"
    arguments = command(run_dir)
    ended = end(*start_hosts([[*arguments, flag, value] for value in values], 2))
    for code, errors in ended:
        assert code == 2 and f"error: all hosts must do the same, but {said}" in errors, errors
        assert "Traceback" not in errors
    assert not checkpoints.steps(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            (("--seed", "0"), ("--seed", "1")),
            ("all hosts must do the same, but seed is 0 on host 0 and 1 on host 1",) * 2,
        ),
        (
            (("--per-class", "1"), ("--per-klass", "1")),
            ("error: host 1 says: it has ended, see its own stderr", "klass"),
        ),
    ],
)
def test_hosts_with_other_flags_draw_nothing(tmp_path, alone, flags, said):
    command = [str(ROOT / "sample.py"), "--run", str(alone(1)), "--output", str(tmp_path / "a.png")]
    for (code, errors), words in zip(end(*start_hosts([[*command, *own] for own in flags], 2)), said, strict=True):
        assert code == 2 and words in errors and "Traceback" not in errors, errors
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_port_where_something_else_listens_is_no_coordinator(tmp_path):
    """JAX ends a process that cannot join by abort(), with a stack of C++."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        place = ("--coordinator", address, "--num-processes", "2", "--process-id", "1")
        ((code, errors),) = end(start([*command(tmp_path / "run"), *place], GSPN_JOIN_SECONDS="5"), timeout=120)
    assert code == 2 and f"error: the other processes could not be joined at {address}" in errors, errors
    assert "***" not in errors and len(errors.strip().splitlines()) < 5, errors


SPIKE = """
import os, sys
import jax
import numpy as np
import train_dit
from gspn_jax import data
from gspn_jax.training import train as page

seeing, make_step, make_loader = sys.argv.pop(1), page.make_step, data.make_loader

def make(*arguments):
    step, calls = make_step(*arguments), iter(range(1, 1000))
    def spoiled(state, batch):
        state, metrics = step(state, batch)
        if next(calls) == 27 and os.environ["JAX_PROCESS_ID"] in seeing:
            metrics |= {"loss": jax.device_put(np.float32(50))}
        return state, metrics
    return spoiled

def loader(*arguments, **settings):
    print("data", settings["seed"], settings["start_step"], file=sys.stderr)
    return make_loader(*arguments, **settings)

page.make_step, data.make_loader = make, loader
train_dit.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("seeing", ["01", "0", "1"])
def test_hosts_agree_on_a_spike(tmp_path, seeing):
    """Both go back when the first one sees it, whatever the other sees; neither when only the other does."""
    run_dir = tmp_path / "run"
    guard = ["--guard.spike-factor", "6", "--guard.spike-steps", "1", "--guard.spike-window", "20"]
    _, *flags = command(run_dir, *guard)
    ended = end(*start_hosts(["-c", SPIKE, seeing, *flags], 2))
    back = "0" in seeing
    wanted = [("0", "0")] + [("1000003", "24")] * back  # the seed and the first step of the data
    for code, errors in ended:
        assert code == 0, errors
        assert re.findall(r"data (\d+) (\d+)", errors) == wanted
        assert ("before step 27: back to step 24, and on with another order" in errors) == back
    step, meta = checkpoints.read_meta(run_dir)
    assert step == STEPS and meta["notes"]["rollbacks"] == [[27, 24]] * back
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert max(line["loss"] for line in lines) < 10


UNREAD = """
import os, sys
import train_dit
from gspn_jax import data

failing, at, make_loader = sys.argv.pop(1), int(sys.argv.pop(1)), data.make_loader

class Loader:
    def __init__(self, loader, start_step):
        self.loader, self.number = loader, start_step
    def __iter__(self):
        return self
    def __next__(self):
        self.number += 1
        if self.number >= at and os.environ["JAX_PROCESS_ID"] in failing:
            raise data.DataError(f"images/{at}.png is not a usable image")
        return next(self.loader)
    def close(self):
        self.loader.close()

data.make_loader = lambda *arguments, **place: Loader(make_loader(*arguments, **place), place["start_step"])
train_dit.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "at", "flags"),
    [
        ("1", 7, ()),
        ("0", 7, ("--train.log-every", "40", "--train.save-every", "40")),  # hosts run ahead of one another
        ("01", 7, ("--guard.nonfinite", "skip")),
        ("1", 1, ()),
        ("0", 1, ()),
        ("1", 40, ("--train.log-every", "40", "--train.save-every", "40")),  # after the last log
        ("1", 41, ()),  # nobody asks for it
    ],
)
def test_a_batch_that_one_host_cannot_read_stops_all_after_the_same_save(tmp_path, alone, failing, at, flags):
    """All name the image and end with code 2; the state is that of the step before, to the bit, and the job goes on."""
    run_dir = tmp_path / "run"
    _, *arguments = command(run_dir, *flags)
    ended = end(*start_hosts(["-c", UNREAD, failing, str(at), *arguments], 2))
    if at <= STEPS:
        for host, (code, errors) in enumerate(ended):
            assert code == 2 and "Traceback" not in errors, errors
            says = "error: " if str(host) in failing else f"error: host {failing[0]} says: "
            assert f"{says}images/{at}.png is not a usable image" in errors, errors
        assert checkpoints.steps(run_dir)[-1:] == [at - 1][at == 1 :]
    finish(run_dir, *flags, hosts=2)
    if not flags:
        assert_same_run(run_dir, alone(2))
    else:
        jax.tree.map(np.testing.assert_array_equal, everything(run_dir), everything(alone(2, *flags)))


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path, alone):
    made = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        calls = {"npz": ["--num-samples", "20", "--batch-size", "8"], "png": ["--per-class", "1"]}
        for kind, flags in calls.items():
            arguments = [str(ROOT / "sample.py"), "--run", str(alone(1)), "--output", str(folder / f"s.{kind}"), *flags]
            for code, errors in end(*(start_hosts(arguments, 2) if count == 2 else [start(arguments)])):
                assert code == 0, errors
        assert sorted(path.name for path in folder.iterdir()) == ["s.npz", "s.png"]  # nothing beside them
        made[count] = folder
    with np.load(made[1] / "s.npz") as one, np.load(made[2] / "s.npz") as two:
        np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
        assert json.loads(str(one["settings"])) == json.loads(str(two["settings"]))
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1  # truncation may turn rounding into a level
    grids = [np.asarray(Image.open(made[count] / "s.png"), int) for count in (1, 2)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


MOVE = """
import dataclasses, json, pathlib, sys
from gspn_jax import cli
cli.join_other_hosts([])
import jax, jax.numpy as jnp, numpy as np, optax
from gspn_jax import models
from gspn_jax.config import MeshConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state, create_state
from tests.training import tiny

def number(leaf, shape):  # every element another number; what a mesh fills up an axis with stays 0
    numbers = 1 + jnp.arange(np.prod(shape, dtype=int), dtype=leaf.dtype).reshape(shape)
    return jnp.pad(numbers, [(0, stored - size) for stored, size in zip(leaf.shape, shape, strict=True)])

def told_apart(state):
    params = jax.tree.map(lambda leaf, s: number(leaf, s.shape), state.params, models.abstract(config)[1])
    scaled = {name: jax.tree.map(lambda p: factor * p, params) for name, factor in (("mu", 2), ("nu", 3))}
    averages = {name: jax.tree.map(lambda p: float(name) * p, params) for name in state.ema}
    return dataclasses.replace(state, params=params, ema=averages,
                               opt_state=optax.tree.set(state.opt_state, **scaled))

def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")

for kind, run_dir, shape, dump in json.loads(sys.argv[1]):
    config = tiny.config(run_dir, gspn=True)
    mesh = sharding.make_mesh(MeshConfig(*shape))
    target = abstract_state(DiffusionTask(config), mesh)
    with Checkpoints(config, "f", [str(i) for i in range(10)]) as checkpoints:
        if kind == "save":
            shardings = jax.tree.map(lambda s: s.sharding, target)
            state = jax.jit(told_apart, out_shardings=shardings)(create_state(DiffusionTask(config), mesh))
            checkpoints.save(5, state)
            checkpoints.wait()
        else:
            step, state = checkpoints.restore(target)
            assert step == 5
    assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda s: s.sharding, target)
    live, shards = jax.live_arrays(), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            assert shard.data.shape == leaf.sharding.shard_shape(leaf.shape)
            starts = [part.start or 0 for part in shard.index]
            shards[f"{name_of(path)}|{shard.device.id}|{json.dumps(starts)}"] = np.asarray(shard.data)
    if kind == "restore":  # nothing is left of the state on any device but its own part
        own = sum(value.nbytes for value in shards.values())
        found = sum(shard.data.nbytes for array in live for shard in array.addressable_shards)
        assert found <= 1.01 * own + 2**12, (found, own)
    np.savez(pathlib.Path(dump) / f"{jax.process_index()}.npz", **shards)
    del state, shards, live
"""


@pytest.mark.slow
def test_a_state_moves_between_meshes_and_numbers_of_processes(tmp_path):
    """Saved by 1, 2 or 4 processes and restored by others: each device gets its own part, whose values are those of
    the whole on one device, and nothing else."""
    jobs = [  # processes, devices of each, what they do with which checkpoint on which mesh
        (2, 2, [("save", "A", (2, 2, 1)), ("save", "B", (1, 2, 2))]),
        (4, 1, [("save", "C", (1, 4, 1)), ("restore", "A", (1, 4, 1)), ("restore", "B", (2, 1, 2))]),
        (
            1,
            3,
            [
                ("save", "D", (1, 3, 1)),
                ("restore", "A", (3, 1, 1)),
                ("restore", "B", (1, 3, 1)),
                ("restore", "C", (1, 3, 1)),
            ],
        ),
        (2, 2, [("restore", "C", (2, 2, 1)), ("restore", "D", (1, 1, 4))]),
        (4, 1, [("restore", "D", (1, 2, 2))]),
    ]
    dumps = []
    for count, devices, actions in jobs:
        calls = []
        for kind, name, shape in actions:
            dump = tmp_path / f"{kind}_{name}_{count}_{'x'.join(map(str, shape))}"
            dump.mkdir()
            dumps.append((name, dump, count))
            calls.append((kind, str(tmp_path / name), shape, str(dump)))
        arguments = ["-c", MOVE, json.dumps(calls)]
        hosts = start_hosts(arguments, count, devices=devices) if count > 1 else [start(arguments, devices=devices)]
        for code, errors in end(*hosts):
            assert code == 0, errors
    wholes = {name: whole_state(tmp_path / name) for name in "ABCD"}
    for name, dump, count in dumps:
        files = sorted(dump.iterdir())
        assert len(files) == count
        for file in files:
            with np.load(file) as shards:
                assert {key.split("|")[0] for key in shards} == set(wholes[name]) | {"step", "halted"}
                for key in shards:
                    leaf, _, starts = key.split("|")
                    if leaf in wholes[name]:
                        assert_is_part(shards[key], wholes[name][leaf], json.loads(starts))


def whole_state(run_dir):
    """{path: array} of parameters, moments and averages on one device."""
    config = tiny.config(run_dir, gspn=True)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with saving.Checkpoints(config, "f", [str(i) for i in range(10)]) as restorer:
        _, state = restorer.restore(abstract_state(DiffusionTask(config), mesh))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert all(leaf.flat[0] != 0 for path, leaf in found.items() if "kernel" in path)
    return {path: leaf for path, leaf in found.items() if path not in ("step", "halted")}


def assert_is_part(part, whole, starts):
    """A mesh may fill an axis that it does not divide with zeros."""
    inside = whole[tuple(slice(begin, begin + size) for begin, size in zip(starts, part.shape, strict=True))]
    filled = np.zeros_like(part)
    filled[tuple(slice(size) for size in inside.shape)] = inside
    np.testing.assert_array_equal(part, filled)
