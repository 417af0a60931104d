import dataclasses

import jax
import pytest

from gspn_jax import models
from gspn_jax.config import ConfigError, ModelConfig
from gspn_jax.models import PRESETS, resolve
from tests.models.model_cases import make_config


def imagenet(preset: str, **overrides):
    model = ModelConfig(preset=preset, **overrides)
    return make_config(model, channels=4, num_classes=1000, image_size=32)


def test_all_published_sizes_are_there():
    gspn = {f"GSPN-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4)}
    dit = {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    modern = {f"LightningDiT-{size}/{patch}" for size in ("B", "L", "XL") for patch in (1, 2)}
    modern |= {f"JiT-{size}/{patch}" for size in "BLH" for patch in (16, 32)}
    assert set(PRESETS) == gspn | dit | modern
    for name in PRESETS:
        resolve(ModelConfig(preset=name))


# GSPN: arXiv 2501.12381, table of class-conditional generation; DiT: arXiv 2212.09748, table 4.
PUBLISHED = {"GSPN-XL/2": 690, "GSPN-L/2": 443, "GSPN-B/2": 137, "DiT-XL/2": 675, "DiT-L/2": 458, "DiT-B/2": 130}


@pytest.mark.parametrize(("preset", "millions"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones_within_1_percent(preset, millions):
    assert models.count_parameters(imagenet(preset)) == pytest.approx(millions * 1e6, rel=0.01)


# Counts of the authors' code, without its per-pixel skip term and with it, in millions to the digits known.
AUTHORS = {
    "GSPN-XL/2": (691.7, 723.5),
    "GSPN-L/2": (444.7, 465.2),
    "GSPN-B/2": (137.8, 144.0),
    "GSPN-S/2": (19.3, 20.15),
}


@pytest.mark.parametrize(("preset", "millions"), AUTHORS.items())
def test_parameter_counts_are_those_of_the_authors_code(preset, millions):
    for skip, expected in zip((False, True), millions, strict=True):
        count = models.count_parameters(imagenet(preset, skip=skip)) / 1e6
        assert count == pytest.approx(expected, abs=0.05)


# LightningDiT: arXiv 2501.01423, table of class-conditional generation, on latents of 16x16x32; JiT: arXiv 2511.13720.
MODERN = {
    "LightningDiT-XL/1": (675, 16, 32),
    "JiT-B/16": (131, 256, 3),
    "JiT-L/16": (459, 256, 3),
    "JiT-H/16": (953, 256, 3),
}


@pytest.mark.parametrize(("preset", "published"), MODERN.items())
def test_modern_counts_are_the_published_ones_to_the_million(preset, published):
    millions, size, channels = published
    config = make_config(
        ModelConfig(preset=preset), channels=channels, num_classes=1000, image_size=size, objective="flow"
    )
    assert models.count_parameters(config) == pytest.approx(millions * 1e6, abs=1e6)


def test_counting_allocates_nothing():
    before = len(jax.live_arrays())
    models.count_parameters(imagenet("GSPN-XL/2"))
    assert len(jax.live_arrays()) == before


def test_overrides_replace_the_preset_and_nothing_else():
    arch = resolve(ModelConfig(preset="GSPN-B/2", hidden=64, patch=1, groups=4, proxy_ratio=8))
    assert (arch.hidden, arch.patch, arch.options.groups, arch.options.proxy) == (64, 1, 4, 8)
    assert (arch.layout, arch.mixer, arch.depth, arch.blocks) == ("paper", "gspn", 30, 31)


def test_weights_are_per_channel_unless_grouped():
    assert resolve(ModelConfig(preset="GSPN-B/2")).options.groups == 900
    shared = models.count_parameters(imagenet("GSPN-B/2", groups=1))
    per_channel = models.count_parameters(imagenet("GSPN-B/2"))
    assert per_channel - shared == 31 * 56 * 12 * 899  # blocks, proxy, 4 directions x 3 neighbours, channels


@pytest.mark.parametrize(
    ("model", "chunks"),
    [
        (ModelConfig(preset="GSPN-S/2", depth=4), (2, 2, 2, None, None)),
        (ModelConfig(preset="GSPN-S/2", depth=4, chunk=None), (None,) * 5),
        (ModelConfig(preset="GSPN-S/2", depth=4, chunk=8), (8,) * 5),
        (ModelConfig(preset="GSPN-S/2", depth=4, chunk=(1, 2, 3, None, 5)), (1, 2, 3, None, 5)),
        (ModelConfig(preset="DiT-S/2", depth=3, mixer="gspn"), (None,) * 3),
    ],
)
def test_chunk_pattern(model, chunks):
    assert resolve(model).chunks == chunks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"preset": "GSPN-M/2"}, r"model.preset must be one of GSPN-S/2, .*, found 'GSPN-M/2'"),
        ({"depth": 5}, r"model.depth must be even with model.layout='paper', found 5"),
        (
            {"mixer": "attention"},
            r"model.mixer must be 'gspn' or .* or 'convolution' with model.layout='paper', found 'attention'",
        ),
        ({"groups": 7}, r"model.groups must be a divisor of model.hidden \(900\), found 7"),
        ({"proxy_ratio": 1000}, r"model.proxy_ratio must be at most model.hidden \(900\), found 1000"),
        ({"chunk": (2, 2)}, r"model.chunk must be 'preset', None, an int, or 31 entries, one a block, found \(2, 2\)"),
        ({"chunk": -1}, r"model.chunk must be None \(global\) or 1 or more lines in every block, found -1"),
        ({"chunk": 0}, r"model.chunk must be None \(global\) or 1 or more lines in every block, found 0"),
        ({"layout": "dit", "mixer": "attention"}, r"model.heads must be a divisor of model.hidden \(900\), found None"),
        ({"preset": "DiT-B/2", "heads": 7}, r"model.heads must be a divisor of model.hidden \(768\), found 7"),
        ({"preset": "DiT-B/2", "hidden": 6, "heads": 1}, r"model.hidden must be a multiple of 4 .*, found 6"),
        ({"preset": "DiT-B/2", "chunk": 2}, r"model.chunk must be 'preset' with model.mixer='attention', found 2"),
        ({"preset": "DiT-B/2", "groups": 2}, r"model.groups must be None with model.mixer='attention', found 2"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(overrides, message):
    model = dataclasses.replace(ModelConfig(preset="GSPN-B/2"), **overrides)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resolve(model)


def test_a_patch_that_does_not_divide_the_image_is_a_config_error():
    config = make_config(ModelConfig(preset="GSPN-S/4"), image_size=6)
    with pytest.raises(ConfigError, match=r"^model.patch must be a divisor of data.image_size \(6\), found 4$"):
        models.abstract(config)


def test_parameters_in_bfloat16_are_refused():
    with pytest.raises(ConfigError, match=r"train.precision must be one of 'params=float32,compute=bfloat16', "):
        make_config(ModelConfig(preset="GSPN-S/2"), precision="params=bfloat16,compute=bfloat16")
