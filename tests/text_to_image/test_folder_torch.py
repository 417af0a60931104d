"""Agreement with the pipelines of diffusers: their folders, what they tell the U-Net of a prompt, and one step."""

import jax
import numpy as np
import pytest

from gspn_jax import unet as unets
from gspn_jax.text_to_image.conditions import encode_prompts
from gspn_jax.text_to_image.folder import load_folder
from tests.text_to_image.diffusers_pipeline import pipeline
from tests.text_to_image.tiny_folder import ONE, XL, write_folder

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float32
PROMPTS = ["A photo of a DOG, isn't it?", "", "hello!! wörld 😀 " * 30]


def relative_error(found, truth) -> float:
    truth = truth.numpy()
    assert found.shape == truth.shape
    return np.abs(np.asarray(found) - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("saved", [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=str)
@pytest.mark.parametrize(("unet", "texts"), [ONE, XL], ids=["1", "XL"])
def test_folders_that_diffusers_writes_are_read_whole(unet, texts, saved, tmp_path):
    theirs = pipeline(write_folder(tmp_path / "ours", unet, texts))
    import torch

    if "variant" in saved:
        theirs.to(torch.float16)
    theirs.save_pretrained(tmp_path / "theirs", **saved)
    if "max_shard_size" in saved:
        assert len(list((tmp_path / "theirs/unet").glob("*.safetensors"))) > 1
    model = load_folder(tmp_path / "theirs")
    assert model.unet_config == unet and tuple(part.config for part in model.texts) == texts
    assert model.latent_scale == 0.13025 and model.prediction == "v_prediction"
    truth = {name: value.numpy() for name, value in theirs.unet.state_dict().items()}
    for name, value in unets.from_state_dict(truth, unet).items():
        assert model.unet[name].dtype == value.dtype == ("float16" if "variant" in saved else "float32")
        np.testing.assert_array_equal(model.unet[name], value, err_msg=name)


@pytest.mark.parametrize(("unet", "texts"), [ONE, XL], ids=["1", "XL"])
def test_prompts_and_a_step_are_those_of_the_pipeline(unet, texts, tmp_path):
    theirs = pipeline(write_folder(tmp_path / "ours", unet, texts))
    theirs.save_pretrained(tmp_path / "theirs")
    import torch

    model = load_folder(tmp_path / "theirs")
    ours = encode_prompts(model.texts, PROMPTS)
    with torch.no_grad():
        context, _, *pooled = theirs.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    assert relative_error(ours.context, context) < TOLERANCE
    assert ours.cut[:2] == ("", "") and PROMPTS[2].endswith(ours.cut[2]) and ours.cut[2]

    latents = np.random.default_rng(0).standard_normal((3, 4, 6, 4), np.float32)
    added, more = None, {}
    if len(texts) == 2:
        assert relative_error(ours.pooled, pooled[0]) < TOLERANCE
        sizes = theirs._get_add_time_ids((64, 96), (0, 8), (32, 48), torch.float32, unet.pooled_width).repeat(3, 1)
        added = unets.Added(ours.pooled, np.tile(np.array([64, 96, 0, 8, 32, 48], np.float32), (3, 1)))
        more = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": sizes}}
    found = jax.jit(unets.apply, static_argnums=1)(model.unet, unet, latents, np.array([801]), ours.context, added)
    with torch.no_grad():
        truth = theirs.unet(torch.tensor(latents.transpose(0, 3, 1, 2)), torch.tensor(801), context, **more).sample
    assert relative_error(found, truth.permute(0, 2, 3, 1)) < TOLERANCE
