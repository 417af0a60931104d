"""Agreement with transformers' Dinov2Model, with PyTorch's resizing and with Pillow's, on shared random weights."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax import bicubic
from gspn_jax.text.dinov2 import DEVIATION, MEAN, Dinov2Config, encode, expected_shapes, load_dinov2
from tests.text import tiny_dinov2
from tests.text.tiny_dinov2 import CONFIG

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float32
SIZES = {
    "S": Dinov2Config(width=384, layers=12, heads=6, hidden=1536),
    "B": Dinov2Config(width=768, layers=12, heads=12, hidden=3072),
    "L": Dinov2Config(),
    "g": Dinov2Config(width=1536, layers=40, heads=24, hidden=4096, swiglu=True),
    "B with registers": Dinov2Config(width=768, layers=12, heads=12, hidden=3072, registers=4),
}
PUBLISHED = {"S": 22_056_576, "B": 86_580_480, "L": 304_368_640, "g": 1_136_480_768}
"""Values of facebook/dinov2-{small,base,large,giant}, the mask token among them."""


def theirs_of(config: Dinov2Config, **others):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if config.registers else "Dinov2"
    about = getattr(transformers, f"{kind}Config")(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        mlp_ratio=4,
        use_swiglu_ffn=config.swiglu,
        image_size=config.grid * config.patch,
        patch_size=config.patch,
        **({"num_register_tokens": config.registers} if config.registers else {}),
        **others,
    )
    return getattr(transformers, f"{kind}Model")(about).eval()


@pytest.mark.parametrize("size", [70, 98, 42])
@pytest.mark.parametrize("kind", ["B", "g", "registers"])
def test_tokens_are_those_of_transformers_and_its_folder_loads(kind, size, tmp_path):
    import torch

    config = {
        "B": CONFIG,
        "g": dataclasses.replace(CONFIG, swiglu=True, hidden=64),
        "registers": dataclasses.replace(CONFIG, registers=4),
    }[kind]
    theirs = theirs_of(config)
    from safetensors.torch import save_file

    state = {k: torch.tensor(v) for k, v in tiny_dinov2.published(tiny_dinov2.random_state_dict(config)).items()}
    (tmp_path / "published").mkdir()
    save_file(state, tmp_path / "published/model.safetensors", metadata={"format": "pt"})
    theirs.config.save_pretrained(tmp_path / "published")
    theirs = type(theirs).from_pretrained(tmp_path / "published").eval()  # by the names of the published files
    theirs.save_pretrained(tmp_path / "saved")  # by whatever names this version writes
    ours = load_dinov2(tmp_path / "published")
    assert ours.config == config
    again = load_dinov2(tmp_path / "saved")
    assert ours.digest(ours.params) == again.digest(again.params)

    images = np.random.default_rng(size).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        truth = theirs(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    token, patches = jax.jit(lambda p, x: encode(p, config, x))(ours.params, images)
    side = size // config.patch
    assert np.abs(token - truth[:, 0]).max() < TOLERANCE * np.abs(truth).max()
    found = np.asarray(patches).reshape(2, side * side, config.width)
    assert np.abs(found - truth[:, 1 + config.registers :]).max() < TOLERANCE * np.abs(truth).max()


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes_have_the_tensors_of_transformers(name):
    import torch

    config = SIZES[name]
    with torch.device("meta"):
        theirs = theirs_of(dataclasses.replace(config))
    values = sum(parameter.numel() for parameter in theirs.parameters())
    ours = sum(map(math.prod, expected_shapes(config).values())) + config.width  # the mask token
    assert ours == values == PUBLISHED.get(name, values)
    token, patches = jax.eval_shape(
        lambda p, x: encode(p, config, x), _laid_out(config), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    )
    assert token.shape == (1, config.width) and patches.shape == (1, 16, 16, config.width)


def _laid_out(config: Dinov2Config) -> dict[str, jax.ShapeDtypeStruct]:
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    return {
        name: jax.ShapeDtypeStruct(
            shape if "embeddings." in name and len(shape) == 2 else tuple(shape[i] for i in order[len(shape)]),
            np.float32,
        )
        for name, shape in expected_shapes(config).items()
    }


@pytest.mark.parametrize(("size", "scaled"), [(37, 16), (16, 37), (5, 3), (5, 8)])
def test_filters_are_those_of_pytorch(size, scaled):
    import torch

    x = np.random.default_rng(size).standard_normal((1, 2, size, size))
    for weights, arguments in (
        (bicubic.torch(size, scaled), {"size": (scaled, scaled)}),
        (bicubic.torch(size, scaled, 0.1), {"scale_factor": ((scaled + 0.1) / size,) * 2}),  # the original's positions
        (bicubic.pillow(size, scaled), {"size": (scaled, scaled), "antialias": True}),
    ):
        truth = torch.nn.functional.interpolate(torch.tensor(x), mode="bicubic", align_corners=False, **arguments)
        np.testing.assert_allclose(np.einsum("ih,jw,bchw->bcij", weights, weights, x), truth.numpy(), atol=1e-9)


@pytest.mark.parametrize("height", [256, 200, 64])
def test_images_are_scaled_as_fd_dinov2_is_defined(height, tmp_path):
    """Pillow's bicubic filter to 224 x 224, whatever the aspect, then ImageNet's mean and deviation (dgm-eval).

    Pillow 13 begins with the axis that shrinks, Pillow before it always with rows: the same here.
    """
    network = load_dinov2(tiny_dinov2.write_folder(tmp_path / "dinov2"))
    image = np.random.default_rng(0).integers(0, 256, (height, 256 if height > 64 else 64, 3), np.uint8)
    truth = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    found = np.rint(255 * (np.asarray(network.resize(image[None]))[0] * DEVIATION + MEAN)).astype(int)
    assert np.abs(found - truth).max() <= 1 and (found == truth).mean() > 0.999
