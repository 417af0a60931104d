"""A leading ~ is the user's home, in flags and in configs; a run directory is a folder of this machine."""

import pytest

from gspn_jax.cli import words
from gspn_jax.config import Config, ConfigError, DataConfig, EvalConfig


def test_homes_stand_in_flags_and_configs(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["--run-dir", "~/x", "--data.path=~/y", "~", "~other", "a~/b", "--name=~"]
    assert words(given) == ["--run-dir", "/home/ada/x", "--data.path=/home/ada/y", "/home/ada", "~other", "a~/b",
                            "--name=/home/ada"]  # fmt: skip
    assert Config("~/x").run_dir == "/home/ada/x" and Config("./~/x").run_dir == "./~/x"
    assert DataConfig(source="folder", path="~/y").path == "/home/ada/y"
    assert EvalConfig(reference="~/r.npz", vae="~/v").reference == "/home/ada/r.npz"


@pytest.mark.parametrize("run_dir", ["s3://bucket/run", "gs://bucket/run", "file:///tmp/run", "hdfs://x"])
def test_a_run_directory_elsewhere_is_refused(run_dir):
    with pytest.raises(ConfigError, match="run_dir must be a folder of this machine, found"):
        Config(run_dir)
