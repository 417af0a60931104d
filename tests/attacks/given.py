"""What the rows of attacks start from: a run, images, latents, weights. Each is made when a row first asks for it."""

import functools
import json
import pathlib
import pickle
import shutil
from collections.abc import Callable

import numpy as np

from tests.foreign import Foreign

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RUN_CONFIG = "from tests.training import tiny\nconfig = tiny.config({!r})\n"


class Given:
    """Files that rows read and nothing changes; `root` holds them."""

    def __init__(self, root: pathlib.Path):
        self.root = root

    def listing(self) -> dict[str, tuple[int, int]]:
        """{file: (bytes, time of its last change)}."""
        files = ((file, file.stat()) for file in self.root.rglob("*") if file.is_file())
        return {str(file): (about.st_size, about.st_mtime_ns) for file, about in files}

    @property
    def digits(self) -> pathlib.Path:
        """The config file of the embedded digits."""
        return CONFIGS / "digits.py"

    @property
    def home(self) -> pathlib.Path:
        """The user's home."""
        return pathlib.Path.home()

    # --- runs
    @functools.cached_property
    def run(self) -> pathlib.Path:
        """A run (`tests.training.tiny`) with whole checkpoints of steps 3 and 6, 10 classes, decays 0.9 and 0.99."""
        import jax

        from gspn_jax.data import make_source
        from gspn_jax.parallel import sharding
        from gspn_jax.runs.saving import Checkpoints
        from gspn_jax.training.diffusion import DiffusionTask
        from gspn_jax.training.state import create_state
        from tests.training import tiny

        config = tiny.config(self.root / "run")
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        state = create_state(DiffusionTask(config), mesh)
        with Checkpoints(config, make_source(config.data).fingerprint, [str(i) for i in range(10)]) as saver:
            for step in (3, 6):
                saver.save(step, state)
        return self.root / "run"

    @functools.cached_property
    def run_config(self) -> pathlib.Path:
        """The config file that `run` goes on with."""
        path = self.root / "run.py"
        path.write_text(RUN_CONFIG.format(str(self.run)))
        return path

    def copy_of_run(self, here: pathlib.Path, damage: Callable[[pathlib.Path], object] | None = None) -> pathlib.Path:
        """A copy of `run` in {here}/run, with the config file {here}/run.py; `damage` changes its checkpoints."""
        copy = shutil.copytree(self.run, here / "run")
        (here / "run.py").write_text(RUN_CONFIG.format(str(copy)))
        if damage:
            damage(copy / "checkpoints")
        return copy

    # --- tasks of other kinds
    @functools.cached_property
    def colours(self) -> pathlib.Path:
        """Images of three classes that differ by their colour (`tests.classify.tiny`)."""
        from tests.classify import tiny

        return pathlib.Path(tiny.make_images(self.root / "colours", 2, 0))

    @functools.cached_property
    def classifier(self) -> pathlib.Path:
        """A run of a classifier of the colours, with the checkpoint of step 2."""
        import jax
        import pytest

        from gspn_jax.classify.task import ClassificationTask
        from gspn_jax.parallel import sharding
        from gspn_jax.runs.saving import Checkpoints
        from gspn_jax.training.state import create_state
        from tests.classify import tiny

        config = tiny.config(self.root / "classifier", str(self.colours), str(self.colours))
        with pytest.MonkeyPatch.context() as patch:
            tiny.use(patch)
            task = ClassificationTask(config)
            state = create_state(task, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        source = task.source()
        with Checkpoints(config, source.fingerprint, source.class_names) as saver:
            saver.save(2, state)
        return self.root / "classifier"

    @functools.cached_property
    def classifier_export(self) -> pathlib.Path:
        """Folder that `classify export` writes of `classifier`."""
        import pytest

        from gspn_jax.classify import weights
        from tests.classify import tiny

        with pytest.MonkeyPatch.context() as patch:
            tiny.use(patch)
            weights.export(weights.Export(run=str(self.classifier), output=str(self.root / "export")))
        return self.root / "export"

    @functools.cached_property
    def stable_diffusion(self) -> pathlib.Path:
        """A folder of Stable Diffusion 1, of tiny networks with random weights."""
        from tests.text_to_image.tiny_folder import ONE, write_folder, write_json

        folder = write_folder(self.root / "stable_diffusion", *ONE)
        write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"})
        return folder

    # --- images and latents
    @functools.cached_property
    def images(self) -> pathlib.Path:
        """Two classes, a and b, of three black 8x8 PNG each."""
        folder = self.root / "images"
        for name in "ab":
            write_images(folder / name, 3)
        return folder

    @functools.cached_property
    def latents(self) -> pathlib.Path:
        """Eight latents of 8x8x4 and 10 classes, in two shards."""
        from gspn_jax.data.latents import write_synthetic

        write_synthetic(self.root / "latents", records=8, shards=2, latent_shape=(8, 8, 4), num_classes=10)
        return self.root / "latents"

    def copy_of_latents(self, here: pathlib.Path, **metadata) -> pathlib.Path:
        """A copy of `latents` in {here}/latents, with other values in its metadata."""
        copy = shutil.copytree(self.latents, here / "latents")
        path = copy / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | metadata))
        return copy

    # --- weights
    @functools.cached_property
    def vae(self) -> pathlib.Path:
        """Weights of a small autoencoder, all zero."""
        from safetensors.numpy import save_file

        from gspn_jax import autoencoder
        from gspn_jax.autoencoder.weights import expected_shapes

        shapes = expected_shapes(autoencoder.AutoencoderConfig(channels=(32,), layers=1))
        path = self.root / "vae.safetensors"
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
        return path

    @functools.cached_property
    def other_weights(self) -> pathlib.Path:
        """A file of safetensors with one tensor that belongs to nothing."""
        from safetensors.numpy import save_file

        save_file({"a": np.zeros(3, np.float32)}, self.root / "other.safetensors")
        return self.root / "other.safetensors"

    @functools.cached_property
    def foreign_weights(self) -> pathlib.Path:
        """A pickle that makes the file `unpickled` when someone loads it."""
        path = self.root / "foreign.bin"
        path.write_bytes(pickle.dumps({"a": Foreign(self.root / "unpickled")}, protocol=2))
        return path


def write_images(folder: pathlib.Path, count: int, size: tuple[int, int] = (8, 8)) -> pathlib.Path:
    """`count` black PNG, 0.png and so on, in a new folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size).save(folder / f"{i}.png")
    return folder


def write(name: str, content: str | bytes) -> Callable[[Given, pathlib.Path], None]:
    """A row's `before`: one file, {here}/`name`, of this content."""

    def before(_given: Given, here: pathlib.Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return before
