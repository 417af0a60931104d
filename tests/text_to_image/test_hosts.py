"""Images over two processes that are one job: the same as those of one."""

import numpy as np
import pytest
from PIL import Image

from tests.text_to_image.tiny_folder import ONE, write_folder
from tests.training import processes


@pytest.mark.slow
def test_the_same_images_for_the_same_seed_in_two_processes(tmp_path):
    folder = write_folder(tmp_path / "1", *ONE)

    def arguments(name):
        flags = f"--model {folder} --prompt dog cat --size 16 24 --steps 2 --sampler ddim --seed 3 --batch-size 2"
        return ["-m", "gspn_jax.text_to_image", *flags.split(), "--output", str(tmp_path / f"{name}.png")]

    for name, started in (
        ("one", [processes.start(arguments("one"), devices=2)]),
        ("two", processes.start_hosts(arguments("two"), 2)),
    ):
        ended = processes.end(*started)
        assert [code for code, _ in ended] == [0] * len(started), (name, ended)
    for number in range(2):
        images = [np.asarray(Image.open(tmp_path / f"{name}_{number}.png"), int) for name in ("one", "two")]
        assert images[0].shape == (16, 24, 3) and np.abs(images[0] - images[1]).max() <= 1
