"""A task of one's own with its config, as one would write it outside of the project."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from gspn_jax import data
from gspn_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from gspn_jax.pixels import from_uint8
from gspn_jax.runs import averages
from gspn_jax.runs.evaluations import Best
from gspn_jax.training.task import Task


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
