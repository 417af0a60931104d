"""A task of one's own, written here: it trains, goes on, is scored and read, on one device and on a mesh."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from gspn_jax import cli, data
from gspn_jax.config import ConfigError, DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from gspn_jax.parallel import sharding
from gspn_jax.pixels import from_uint8
from gspn_jax.runs import averages, checkpoints
from gspn_jax.runs.evaluations import Best, Record
from gspn_jax.training.task import Task
from gspn_jax.training.train import train_task


@dataclasses.dataclass(frozen=True)
class ToyModel:
    width: int = 48


@dataclasses.dataclass(frozen=True)
class ToyConfig(RunConfig):
    """Labels of digits from their pixels, by two linears."""

    model: ToyModel = ToyModel()
    data: DataConfig = DataConfig()

    TASK = "toy"


class Accuracy:
    """Of the first 64 digits, by the first average."""

    every, best, stopped_by = 4, Best("accuracy", higher=True, said="the highest accuracy"), None

    def __init__(self, task):
        self._task = task
        records = [task.source()[i] for i in range(64)]
        self._batch = {name: np.stack([record[name] for record in records]) for name in ("image", "label")}

    def __call__(self, step, state, asked=lambda: None):
        average = state.ema[averages.name(self._task.config.train.ema_decays[0])]
        own = jax.tree.map(lambda a, s: a[tuple(map(slice, s.shape))], average, self._task.shapes)
        hits = self._task.logits(own, self._batch["image"]).argmax(1) == self._batch["label"]
        return {"accuracy": float(hits.mean()), "seconds": 0.0}


class ToyTask(Task):
    """With a frozen teacher: an offset for the logits of class 0, so large that the student learns to undo it."""

    @property
    def shapes(self):
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key):
        one, two = jax.random.split(key)
        width = self.config.model.width
        return {
            "first": {"kernel": jax.random.normal(one, (64, width)) / 8},
            "second": {"kernel": jax.random.normal(two, (width, 10)) / 8, "bias": jnp.zeros(10)},
        }

    def logits(self, params, image):
        hidden = jax.nn.relu(from_uint8(jnp.asarray(image)).reshape(len(image), -1) @ params["first"]["kernel"])
        return hidden @ params["second"]["kernel"] + params["second"]["bias"]

    def frozen(self, mesh):
        return (jax.device_put(jnp.zeros(10).at[0].set(5.0), NamedSharding(mesh, PartitionSpec())),)

    def loss(self, params, batch, key, offset):
        logits = self.logits(params, batch["image"]) + offset
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    def decayed(self):
        return jax.tree.map(lambda s: s.ndim > 1, self.shapes)

    def forward_flops(self):
        return 2.0 * self.config.model.width * (64 + 10)

    def source(self):
        return data.make_source(self.config.data)

    def loader(self, source, **place):
        return data.make_loader(self.config.data, source, batch_size=self.config.train.batch_size, **place)

    def describe(self, source):
        return f"a toy of {self.config.model.width} on {len(source)} digits"

    def evaluation(self, mesh):
        return Accuracy(self)

    def picture(self, mesh, class_names):
        return lambda state: Image.new("L", (8, 8))


ONE = MeshConfig(1, 1, 1)


def toy(run_dir, *, mesh=ONE, **train):
    settings = {"steps": 8, "batch_size": 64, "log_every": 2, "save_every": 4, "sample_every": 8, "ema_decays": (0.5,)}
    return ToyConfig(
        run_dir=str(run_dir),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        mesh=mesh,
        train=TrainConfig(**settings | train),
        data=DataConfig(in_memory=True),
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def devices(monkeypatch):
    """The mesh is built of so many devices."""
    make = sharding.make_mesh

    def use(count):
        monkeypatch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:count]))

    return use


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on one device, to its end, and its parameters."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:1]))
        train_task(ToyTask(toy(folder)))
    return folder


def test_a_task_trains_is_scored_and_keeps_its_best_checkpoint(run):
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert losses[0] > 3 and losses[-1] < losses[0] - 0.5  # without the teacher's offset it begins at 2.3
    scores = {line["step"]: line["eval/accuracy"] for line in lines(run) if "eval/accuracy" in line}
    record = Record.read(run)
    assert set(scores) == {4, 8} and record.best == max(scores.values()) and scores[record.best_step] == record.best
    assert (run / "samples" / "step_0000008.png").exists()


def test_a_task_goes_on_to_the_bit_and_is_known_by_name(run, tmp_path, devices):
    devices(1)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(checkpoints.folder(tmp_path / "run") / "8")
    going_on = ToyTask(toy(tmp_path / "run"))
    train_task(going_on)
    found, wanted = (
        checkpoints.restore_average(
            folder, 8, (0.5,), going_on.shapes, sharding.make_mesh(going_on.config.mesh), ema_decay=0.0
        )
        for folder in (tmp_path / "run", run)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert checkpoints.read_config(run, cls=ToyConfig)[1] == toy(run)
    with pytest.raises(ConfigError, match=r"the task of the run must be 'diffusion', found 'toy'"):
        checkpoints.read_config(run)
    with pytest.raises(checkpoints.CheckpointError, match=r"started with model.width 48, found 32"):
        train_task(ToyTask(dataclasses.replace(toy(tmp_path / "run"), model=ToyModel(32))))


@pytest.mark.parametrize("mesh", [MeshConfig(1, 4, 1), MeshConfig(1, 1, 2)], ids=["fsdp 4", "tensor 2"])
def test_a_task_is_the_same_on_a_mesh(run, tmp_path, devices, mesh):
    devices(mesh.fsdp * mesh.tensor)
    train_task(ToyTask(toy(tmp_path / "run", mesh=mesh)))
    one, other = ([line["loss"] for line in lines(folder) if "loss" in line] for folder in (run, tmp_path / "run"))
    np.testing.assert_allclose(other, one, rtol=1e-5)


def test_the_config_of_a_task_has_its_flags(tmp_path, capsys):
    file = tmp_path / "toy.py"
    file.write_text("from tests.seams.test_task import ToyConfig\nconfig = ToyConfig(run_dir='r')\n")
    flags = {"program": "toy", "description": "A toy.", "cls": ToyConfig}
    assert cli.parse_config(["--config", str(file), "--model.width", "16"], **flags).model.width == 16
    with pytest.raises(SystemExit):
        cli.parse_config(["--config", str(file), "--help"], **flags)
    assert "--model.width" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"must define `config = Config\(...\)`, found ToyConfig"):
        cli.parse_config(["--config", str(file)], program="train_dit.py", description="")
