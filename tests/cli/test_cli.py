"""train_dit.py's command line: overrides with types, and every mistake as one sentence with exit code 2."""

import os
import pathlib

import pytest

import train_dit
from gspn_jax import cli
from gspn_jax.cli import process
from gspn_jax.config import Config

DIGITS = str(pathlib.Path(__file__).parents[2] / "configs" / "digits.py")


def parse(*flags):
    return cli.parse_config(["--config", DIGITS, *flags], program="train_dit.py", description="")


def test_any_field_is_overridden_by_its_name_and_type():
    config = parse(
        "--train.steps",
        "77",
        "--train.ema-decays",
        "0.9",
        "0.99",
        "--model.chunk",
        "3",
        "--data.flip",
        "--run-dir",
        "elsewhere",
        "--sampler.name",
        "euler",
        "--sampler.guidance-interval",
        "0.1",
        "0.8",
    )
    assert config.train.steps == 77 and config.train.ema_decays == (0.9, 0.99) and config.model.chunk == 3
    assert config.data.flip and config.run_dir == "elsewhere" and config.sampler.name == "euler"
    assert config.sampler.guidance_interval == (0.1, 0.8)
    assert [parse("--model.chunk", *words).model.chunk for words in (("None",), ("preset",), ("2", "None"))] == [
        None,
        "preset",
        (2, None),
    ]
    assert parse() == cli.load_config(DIGITS) and isinstance(parse(), Config)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.stepz", "3"], "Unrecognized options: --train.stepz"),
        (["--train.steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--train.steps", "-3"], "train.steps must be greater than 0, found -3"),
        (["--train.precision", "float8"], "params=float32,compute=bfloat16"),
        (["--diffusion.objective", "gan"], "gan"),
        (["--diffusion.objective", "ddpm", "--sampler.name", "heun"], "sampler.name must be one of"),
        (["--sampler.guidance-interval", "0.8", "0.1"], "must be (low, high) with 0 <= low < high <= 1"),
        (["--optimizer.warmup-steps", "99999"], "optimizer.warmup_steps must be at most train.steps"),
        (["--train.accumulate", "3"], "train.batch_size must be a multiple of train.accumulate (3)"),
        (["--data.source", "folder"], "data.path must be the image folder"),
        (["--model.preset", "GSPN-XXL/2"], "GSPN-XXL/2"),
        (["--model.chunk", "2", "2"], "chunk"),
        (["--data.image-size", "9"], "found"),
        (["--mesh.fsdp", "3"], "must be the 8 devices there are"),
        (["--train.batch-size", "12"], "train.batch_size must be a multiple of 8"),
        (["--data.source", "folder", "--data.path", "/no/such/folder"], "/no/such/folder"),
        (["--data.num-classes", "7"], "7"),
        (["--model.layout", "paper", "--model.mixer", "attention"], "mixer"),
        (["--model.backend", "mosaic_gpu"], "mosaic_gpu"),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_2(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_dit.main(["--config", DIGITS, "--run-dir", str(tmp_path / "run"), *flags])
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "which is no file"),
        ("config = 3", "must define `config = Config(...)`, found int"),
        ("x = (", "must define `config = Config(...)`, found SyntaxError"),
        ("from gspn_jax.config import Config\nconfig = Config(run_dir='r', colour=1)", "found TypeError"),
        (
            "from gspn_jax.config import *\nconfig = Config(run_dir='r', train=TrainConfig(steps=0))",
            "train.steps must be",
        ),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(text, said, tmp_path, capsys):
    path = tmp_path / "c.py"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        train_dit.main(["--config", str(path)])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_no_config_at_all_says_what_is_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_dit.main([])
    assert stopped.value.code == 2 and "needs --config NAME_OR_FILE" in capsys.readouterr().err


def test_compiled_programs_are_kept_on_the_disk_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.setup()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "gspn_jax" / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    cli.setup()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize(
    ("version", "plugin", "before", "after"),
    [
        ("0.11.2", True, "", "--xla_gpu_enable_dynamic_slice_fusion=false"),
        ("0.11.2", True, "--a=b", "--a=b --xla_gpu_enable_dynamic_slice_fusion=false"),
        ("0.11.2", True, "--xla_gpu_enable_dynamic_slice_fusion=true", "--xla_gpu_enable_dynamic_slice_fusion=true"),
        ("0.11.2", False, "--a=b", "--a=b"),
        ("0.12.0.1", True, "--a=b", "--a=b"),
    ],
)
def test_products_that_one_version_of_jax_computes_twice_on_a_gpu_are_computed_once(
    version, plugin, before, after, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: plugin or None)
    process.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == after
