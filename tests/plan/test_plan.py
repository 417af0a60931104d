"""Plans of runs: memory against the compiler's counts, the choice against a search, hours and disk by hand."""

import dataclasses
import json
import pathlib

import pytest

from benchmarks import memory_gpu
from gspn_jax import plan
from gspn_jax.cli import load_config
from gspn_jax.config import ConfigError, ModelConfig
from gspn_jax.models.presets import PRESETS
from gspn_jax.parallel.memory import bytes_a_device
from gspn_jax.plan import memory
from gspn_jax.plan.gpus import MEMORY, gpu_named

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
COMPILED = [
    result
    for result in json.loads((RESULTS / "gpu_compile.json").read_text()).values()
    if result["what"] == "step" and result["preset"] in PRESETS and result["gpu"] == "h200"
]
"""Training steps of denoisers; those of image classifiers are in that file too."""
COUNTED = json.loads(memory_gpu.RESULTS.read_text()).values()


def config_of(preset: str, remat: str, batch: int = 256):
    base = load_config("dit_xl_2" if preset.startswith("DiT") else "gspn_xl_2")
    model = dataclasses.replace(base.model, preset=preset, remat=remat)
    return dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, batch_size=batch))


@pytest.mark.parametrize("result", COMPILED, ids=lambda r: f"{r['preset']} {r['mesh']} {r['batch']} {r['remat']}")
def test_memory_is_near_what_the_compiler_counted_on_an_h200(result):
    """In all to 10 %; the state to a part in a thousand, with which the batch is counted there."""
    data, fsdp = map(int, result["mesh"].split("x"))
    config = config_of(result["preset"], result["remat"], result["batch"])
    state = memory.state_on(config, data, fsdp)
    need = memory.needed(config, state, result["remat"], result["batch"] // (data * fsdp), 1)
    assert need.state / 1e9 == pytest.approx(result["arguments_gb"], rel=1e-3)
    assert need.total / 1e9 == pytest.approx(result["arguments_gb"] + result["temporary_gb"], rel=0.1)


@pytest.mark.parametrize("row", COUNTED, ids=memory_gpu.name_of)
def test_memory_is_near_what_the_compiler_counted_for_one_gpu(row):
    """An RTX 4090 or an H200; with micro-batches too."""
    config = config_of(row["preset"], row["remat"], row["images"] * row["accumulate"])
    need = memory.needed(config, memory.state_on(config, 1, 1), row["remat"], row["images"], row["accumulate"])
    assert need.state == pytest.approx(row["arguments"], rel=1e-3)
    assert need.total == pytest.approx(row["arguments"] + row["temporary"], rel=0.1)


@pytest.mark.parametrize("preset", ["GSPN-XL/2", "GSPN-B/2"])
def test_a_setting_fits_an_rtx_4090_by_the_compilers_count(preset):
    counts = [
        row["arguments"] + row["temporary"] for row in COUNTED if (row["preset"], row["gpu"]) == (preset, "rtx4090")
    ]
    assert counts and min(counts) < plan.USABLE * MEMORY["RTX 4090"]


def test_the_formula_is_the_fit_to_what_is_recorded():
    found = memory_gpu.fits(memory_gpu.recorded())
    assert found.keys() == memory.FITTED.keys()
    for name, fit in memory.FITTED.items():
        assert tuple(fit) == pytest.approx(found[name], rel=1e-2, abs=1e-6)


def test_the_choice_is_that_of_a_search():
    config = config_of("GSPN-B/2", "names")
    name, size, _ = gpu_named("rtx 4090")
    taken, widest = plan.choose(config, name, 2)
    assert name == "RTX 4090" and taken.memory <= 0.9 * size
    assert taken.data * taken.fsdp == 2 and taken.images * taken.accumulate * 2 == config.train.batch_size
    for option in plan.options(config, 2):
        fits = option.memory <= 0.9 * size
        better = (option.remat == taken.remat or option.remat == "names") and option.fsdp <= taken.fsdp
        assert not (fits and better and option.images > taken.images)
    for one in widest:
        alike = [o for o in plan.options(config, 2) if (o.remat, o.fsdp) == (one.remat, one.fsdp)]
        assert all(o.images <= one.images for o in alike if o.memory <= 0.9 * size)


def test_a_state_that_is_too_large_is_split_over_the_gpus():
    config = config_of("GSPN-XL/2", "names")
    taken, _ = plan.choose(config, "RTX 4080", 4)
    assert taken.fsdp > 1
    state = memory.state_on(config, taken.data, taken.fsdp)
    assert bytes_a_device(state) == taken.state < 11.1e9 / taken.fsdp * 1.03
    with pytest.raises(
        ConfigError, match=r"GSPN-XL/2 must fit into 30% of the 17.2 GB of one RTX 4080, found that a ste"
    ):
        plan.choose(config, "RTX 4080", 1, usable=0.3)


def test_hours_and_disk_are_arithmetic(capsys):
    plan.main(["--config", "gspn_xl_2", "--gpu", "H100", "--gpus", "8", "--share", "0.4", "--model.remat", "names"])
    said = capsys.readouterr().out
    operations = 269e12  # a step of 256 images, as README.md has it
    assert f"{operations / (0.4 * 8 * 989e12):.3g} s a step" in said and "9.4 hours for 400,000 steps, at 40%" in said
    assert "a checkpoint 11.1 GB" in said and "checkpoints 121.7 GB: 11" in said
    assert "latents 42.0 GB: 1,281,167 records of 32,772 bytes" in said
    assert "mesh 8 x 1, 32 images at a time on each GPU" in said
    plan.main(["--config", "digits", "--gpu", "L4", "--train.snapshot-every", "100", "--train.steps", "800"])
    assert "snapshots 0.0 GB: 8 of 2 averages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "RTX 2080"], f"--gpu must be one of {', '.join(MEMORY)}, found 'RTX 2080'"),
        ([], 'needs --gpu NAME, such as "RTX 4090"'),
        (["--gpu", "L4", "--gpus", "0"], "--gpus must be a whole number from 1 on, found '0'"),
        (["--gpu", "L4", "--gpus", "3"], "train.batch_size must be a multiple of the 3 GPUs, found 64"),
        (["--gpu", "L4", "--share", "1.5"], "--share must be greater than 0 and at most 1, found '1.5'"),
        (["--gpu", "L4", "--usable", "most"], "--usable must be greater than 0 and at most 1, found 'most'"),
        (["--gpu", "L4", "--images", "many"], "--images must be a whole number from 1 on, found 'many'"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_code_2(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", "digits", *flags])
    assert stopped.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_the_command_prints(capsys):
    plan.main(["--table"])
    assert capsys.readouterr().out.strip() in (RESULTS.parents[1] / "README.md").read_text()


def test_a_mixer_that_nobody_counted_is_named(monkeypatch):
    monkeypatch.setattr(memory, "FITTED", {("attention", "full"): memory.Fit(0.5, 1, 1, 0, 1)})
    with pytest.raises(
        ConfigError, match=r"model.mixer must be one whose memory was counted \(attention\), found 'gspn'"
    ):
        memory.remats(dataclasses.replace(load_config("digits"), model=ModelConfig()))
