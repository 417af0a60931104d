"""Whatever ends one host of a job has one sentence and one exit code on all of them."""

import os
import threading

import pytest

from gspn_jax.cli import exits, last_words
from gspn_jax.config import ConfigError
from tests.training.processes import command, end, finish, start_hosts


class Service:
    """JAX's coordination service, in this process."""

    def __init__(self):
        self.kept = {}

    def key_value_set(self, key, value):
        if key in self.kept:
            raise RuntimeError("ALREADY_EXISTS")
        self.kept[key] = value

    def key_value_try_get(self, key):
        return self.kept[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]


class Ended(BaseException):
    pass


@pytest.fixture
def service(monkeypatch):
    """Two hosts, of which this process is host 1 until `service.index` says another."""
    made = Service()
    made.index = 1

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(last_words, "_client", lambda: made)
    monkeypatch.setattr(last_words, "_index", lambda: made.index)
    monkeypatch.setattr(last_words, "_ending", threading.Event())
    monkeypatch.setattr(last_words, "LOOK", 0.01)
    monkeypatch.setattr(last_words, "PATIENCE", 0.05)
    monkeypatch.setattr(exits, "_is_one_of_several", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    return made


def failing(error):
    with pytest.raises(Ended) as ended, exits.user_errors():
        raise error
    return ended.value.args[0]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("train.steps must be more"), 2, "train.steps must be more"),
        (OSError(28, "No space left on device", "runs/a"), 2, "No space left on device: runs/a"),
        (MemoryError(), 2, "there is not enough memory"),
        (SystemExit(2), 2, "it has ended with code 2, see its own stderr"),
        (SystemExit("error: the loss is nan"), 1, "the loss is nan"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (KeyError("x"), 1, "it ended by KeyError: 'x'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_one_host_is_told_to_the_others_with_its_code(service, capsys, error, code, said):
    assert failing(error) == code
    words = last_words.heard()
    assert words[:2] == (1, code) and said in words.text
    assert f"{last_words.LEFT}/1" in service.kept
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)
    service.index = 0
    last_words._ending.clear()
    with pytest.raises(Ended) as ended:
        last_words._listen()
    assert ended.value.args == (code,)
    assert f"error: host 1 says: {words.text}" in capsys.readouterr().err


def test_the_first_words_count_and_a_host_that_ends_by_itself_says_its_own(service, capsys):
    service.index = 0
    assert last_words.tell(1, "numbers went bad") == (0, 1, "numbers went bad")
    service.index = 1
    assert failing(ConfigError("another thing")) == 1
    assert capsys.readouterr().err == "error: another thing\n"
    last_words._listen()  # it is ending already: the words of others are not said over its own
    assert capsys.readouterr().err == ""


def test_an_error_of_the_network_is_that_of_the_host_that_is_gone(service, monkeypatch, capsys):
    """A host that cannot reach another one says why that one ended, if it has said so, and else that it is lost."""
    import jax

    monkeypatch.setattr(exits, "_lost_host", lambda error: True)
    monkeypatch.setattr(exits, "WORDS_SECONDS", 0)
    assert failing(jax.errors.JaxRuntimeError("connection reset")) == 75
    assert "another host, or the connection to it, was lost (connection reset)" in capsys.readouterr().err
    service.kept[last_words.KEY] = '[0, 2, "the disk is full"]'
    assert failing(jax.errors.JaxRuntimeError("connection reset")) == 2
    assert capsys.readouterr().err == "error: host 0 says: the disk is full\n"


def test_a_process_that_is_alone_tells_nobody(monkeypatch):
    monkeypatch.setattr(last_words, "_ending", threading.Event())
    assert last_words.tell(2, "x") == (0, 2, "x") and last_words.heard(1) is None
    last_words.leave(1)


ONE_FAILS = """
import os, sys
failing, where = sys.argv.pop(1), sys.argv.pop(1)
own = os.environ["JAX_PROCESS_ID"] in failing
from gspn_jax import cli
cli.setup()
import resource, signal
import numpy as np
from gspn_jax.runs import saving
from gspn_jax.state_dict import WeightsError
from gspn_jax.training import diffusion, hooks, train as page

def fails(*_, **__):
    raise WeightsError("vae.safetensors is not a usable file")

def full(*_, **__):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return save(*_, **__)

def bug(*_, **__):
    return {}["missing"]

save = saving.Checkpoints.save
if own and where == "set-up":
    diffusion.DiffusionTask.evaluation = fails
if own and where == "frozen":
    diffusion.DiffusionTask.frozen = fails
if own and where == "save":
    saving.Checkpoints.save = full
if own and where == "hook":
    hooks.Log.__call__ = fails
if own and where == "bug":
    page.make_step = bug
import train_dit
train_dit.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("set-up", 2, "vae.safetensors is not a usable file"),
        ("frozen", 2, "vae.safetensors is not a usable file"),
        ("hook", 2, "vae.safetensors is not a usable file"),
        ("save", 2, "could not be written (File too large)"),
        ("bug", 1, "KeyError: 'missing'"),
    ],
)
@pytest.mark.parametrize("failing", ["0", "1"])
def test_what_fails_on_one_host_ends_all_with_its_code_and_sentence(tmp_path, where, code, said, failing):
    run_dir = tmp_path / "run"
    _, *arguments = command(run_dir, "--train.sample-every", "0")
    ended = end(*start_hosts(["-c", ONE_FAILS, failing, where, *arguments], 2), timeout=120)
    for host, (found, errors) in enumerate(ended):
        assert found == code and said in errors, (host, errors)
        assert str(host) in failing or f"error: host {failing} says: " in errors, errors
        assert "was lost" not in errors, errors
    finish(run_dir, "--train.steps", "8", hosts=2)
