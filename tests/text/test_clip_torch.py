"""Agreement with transformers' CLIPModel, and its image processor, on shared random weights."""

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax.text.clip import PROMPT, load_clip
from tests.text import tiny_clip

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float32


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings_are_those_of_transformers_and_its_folder_loads(activation, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    about = tiny_clip.transformers_config()
    for part in ("text_config", "vision_config"):
        about[part]["hidden_act"] = activation
    about["text_config"]["eos_token_id"] = tiny_clip.TEXT.vocabulary - 1
    del about["model_type"]
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**about)).eval()
    state = {name: torch.tensor(value) for name, value in tiny_clip.random_state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    theirs.save_pretrained(tmp_path)
    tiny_clip.write_tokenizer(tmp_path)
    ours = load_clip(tmp_path)
    assert ours.vision_config.activation == ours.text_config.activation == activation

    image = np.random.default_rng(0).integers(0, 256, (2, 45, 60, 3), np.uint8)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor([Image.fromarray(one) for one in image], return_tensors="pt").pixel_values
    seen = np.asarray(jax.jit(ours.resize)(image))
    assert np.abs(seen - pixels.permute(0, 2, 3, 1).numpy()).max() < 0.02  # a level is 1 / 255 / 0.26 = 0.015
    captions = ["a dog", "two cats and a very long sea " * 9]
    ids = ours.tokenizer([PROMPT + caption for caption in captions]).ids
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(ids, dtype=torch.long),
            pixel_values=torch.tensor(seen.transpose(0, 3, 1, 2).copy()),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
        )
    embedded = np.asarray(jax.jit(ours.network)(ours.vision, seen)), ours.embed_captions(captions)
    for mine, truth in zip(embedded, (found.image_embeds.numpy(), found.text_embeds.numpy()), strict=True):
        assert mine.shape == truth.shape == (2, 20)
        assert np.abs(mine - truth).max() < TOLERANCE * np.abs(truth).max()
