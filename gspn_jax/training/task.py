"""Task that a run trains: the one thing about it that the loop, its hooks and its checkpoints do not know.

`training.diffusion` is the task of this project; another one (classification, distillation) is a subclass of `Task`
and a config of its own (`config.RunConfig`), which `training.train.train_task` runs.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from PIL import Image

from gspn_jax.config import RunConfig, require
from gspn_jax.data.loader import Loader
from gspn_jax.data.source import Source
from gspn_jax.runs.evaluations import Best
from gspn_jax.training.given import Given
from gspn_jax.training.optimizer import learning_rate, make_optimizer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Place = dict[str, int]
"""Where a process reads: "seed", "start_step", "num_hosts" and "host", as `data.make_loader` has them."""


class Evaluation(Protocol):
    """Evaluation, ready to be called: its files are read and found to fit."""

    every: int
    """Steps between evaluations."""
    best: Best
    """The score that decides which checkpoint is kept for good."""
    stopped_by: str | None
    """The signal that stopped the last one."""

    def __call__(
        self, step: int, state: Any, asked: Callable[[], str | None] = lambda: None
    ) -> dict[str, float] | None:
        """The scores of the `TrainState` of `step` by name, and the "seconds" they took, the same on all hosts.

        None when `asked` named a signal, which is then `stopped_by`.
        """
        ...


class Task(abc.ABC):
    """Task of a run: what is trained, on what, and what is looked at on the way.

    Building one checks what its config alone decides, and allocates nothing. Parameters are nested dicts of arrays.
    """

    def __init__(self, config: RunConfig):
        self.config = config

    # --- parameters
    apart: tuple[str, ...] = ()
    """Names at the top of `shapes` of parameters that only training needs: trained with the others and saved apart from
    them; in no average, sample or export."""

    @property
    @abc.abstractmethod
    def shapes(self) -> Any:
        """The parameters in their own shapes: what `models.abstract_of` gives for a network of ours."""

    @abc.abstractmethod
    def init(self, key: Key[Array, ""]) -> Any:
        """Parameters to begin with; traced, so that they are born where they live."""

    def given(self) -> Given | None:
        """Parameters that a new run begins with in place of those of `init`: what `config.init_from` names, found and
        not yet read. Raises ConfigError, CheckpointError or WeightsError for what cannot be used."""
        require(
            self.config.init_from is None, "init_from", f"None for the task {self.config.TASK!r}", self.config.init_from
        )
        return None

    def frozen(self, mesh: Mesh) -> tuple[Any, ...]:
        """Arrays that the loss reads and nothing trains, such as a teacher's, on the devices of `mesh`; not saved."""
        return ()

    # --- a step
    @abc.abstractmethod
    def loss(self, params: Any, batch: Batch, key: Key[Array, ""], *frozen: Any) -> tuple[Float[Array, ""], Metrics]:
        """(mean loss of a batch, means to log); everything random comes from `key`.

        Called where blocks run as the mesh wants (`fsdp.sharded_blocks`), with those parameters whole that are in no
        block.
        """

    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.config.train.steps, self.decayed(), self.shapes)

    def learning_rate(self) -> optax.Schedule:
        """Learning rate that a step logs."""
        return learning_rate(self.config.optimizer, self.config.train.steps)

    def decayed(self) -> Any:
        """Parameters that weight decay is of: a tree of True and False like `shapes`, None for all."""
        return None

    @abc.abstractmethod
    def forward_flops(self) -> float:
        """Operations of one forward pass of one image, 2 a multiply-add; a step counts as three."""

    def image_bytes(self) -> int:
        """Bytes that an image of a batch takes on a device at least, from the forward to the backward pass."""
        return 0

    # --- data
    @abc.abstractmethod
    def source(self) -> Source:
        """Source that is trained on. Raises ConfigError for what is missing or does not fit."""

    @abc.abstractmethod
    def loader(self, source: Source, **place: int) -> Loader:
        """The endless batches of `source` at a place: `seed`, `start_step`, `num_hosts`, `host` (`data.make_loader`).

        A batch depends on the seed and the step alone. Its arrays are the rows of this host.
        """

    # --- beside the steps
    @abc.abstractmethod
    def describe(self, source: Source) -> str:
        """First line of a run: what is trained, on what."""

    def evaluation(self, mesh: Mesh) -> Evaluation | None:
        """Evaluation that is called every so many steps, None for nothing. Raises ConfigError, WeightsError or OSError
        for files that it needs."""
        return None

    def picture(self, mesh: Mesh, class_names: Sequence[str]) -> Callable[[Any], Image.Image] | None:
        """A function of the `TrainState` that draws what `train.sample_every` logs, None for nothing."""
        return None
