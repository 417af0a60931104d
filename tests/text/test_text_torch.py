"""Agreement with transformers: towers on shared random weights, and the tokenizer on shared vocabularies."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from gspn_jax.text import encode, from_state_dict, load_tokenizer, load_tower
from tests.text.numpy_clip import PROJECTED, QUICK, random_ids, random_state_dict
from tests.text.plain_bpe import END, START, small_vocabulary
from tests.text.texts import texts

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float32


def transformers_tower(config, weights):
    transformers = pytest.importorskip("transformers")
    import torch

    kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
    theirs = kind(
        transformers.CLIPTextConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            hidden_act=config.activation,
            vocab_size=config.vocabulary,
            projection_dim=config.projection or 512,
            max_position_embeddings=config.length,
            eos_token_id=config.vocabulary - 1,
            bos_token_id=0,
            pad_token_id=0,
        )
    )
    prefixed = any(name.startswith("text_model.") for name in theirs.state_dict())
    theirs.load_state_dict(
        {name if prefixed else name.removeprefix("text_model."): torch.tensor(value) for name, value in weights.items()}
    )
    return theirs.eval()


@pytest.mark.parametrize("config", [QUICK, PROJECTED], ids=["quick GELU", "GELU and projection"])
def test_states_are_those_of_transformers_and_their_folders_load(config, tmp_path):
    weights = random_state_dict(config)
    theirs = transformers_tower(config, weights)
    import torch

    ids = random_ids(config, (0, 3, 7, 10))
    with torch.no_grad():
        truth = theirs(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    ours = jax.jit(encode, static_argnums=1)(from_state_dict(weights, config), config, ids)
    pooled = truth.text_embeds if config.projection else truth.pooler_output
    for found, expected in zip(ours, (truth.last_hidden_state, truth.hidden_states[-2], pooled), strict=True):
        expected = expected.numpy()
        assert found.shape == expected.shape
        assert np.abs(np.asarray(found) - expected).max() < TOLERANCE * np.abs(expected).max()

    theirs.save_pretrained(tmp_path)
    params, found = load_tower(tmp_path)
    assert found == config
    for name, value in from_state_dict(weights, config).items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)


def openai_merges() -> str | None:
    """CLIP's own merges, if a package that ships them is installed."""
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = pathlib.Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
            if path.is_file():
                return str(path)
    return None


def published_vocabulary():
    from gspn_jax.text import tokenizer

    path = openai_merges()
    if path is None:
        pytest.skip("CLIP's vocabulary is not here: pip install open_clip_torch, or clip-anytorch with --no-deps")
    return tokenizer._from_merges(tokenizer._read_merges(pathlib.Path(path))[: tokenizer.MERGES])


def as_word(content, normalized):
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


PUBLISHED = {"bos_token": as_word(START, True), "eos_token": as_word(END, True), "unk_token": as_word(END, True)}
FOLDERS = {
    "vocabulary alone": (None, None),
    "Stable Diffusion 1": ({"pad_token": END}, PUBLISHED | {"pad_token": END}),
    "Stable Diffusion 2": ({"pad_token": END}, PUBLISHED | {"pad_token": "!"}),
    "decoder": ({"pad_token": "!", "added_tokens_decoder": None}, {"pad_token": END}),
}


@pytest.mark.parametrize("vocabulary", [small_vocabulary, published_vocabulary], ids=["small", "published"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_are_those_of_transformers(kind, vocabulary, tmp_path):
    transformers = pytest.importorskip("transformers")
    words, merges = vocabulary()
    config, special = FOLDERS[kind]
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    if config is not None:
        if "added_tokens_decoder" in config:
            decoder = {"!": False, START: True, END: True}
            config = config | {
                "added_tokens_decoder": {
                    str(words[word]): as_word(word, late) | {"special": True} for word, late in decoder.items()
                }
            }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "CLIPTokenizer"}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    prompts = [*texts(), "unassigned \U000106ff \uffff \u0378"]
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    saved = tmp_path / "saved"
    theirs.save_pretrained(saved)
    for path in (tmp_path, saved):
        ids, cut = load_tokenizer(path)(prompts)
        theirs = transformers.CLIPTokenizer.from_pretrained(path)
        for prompt, row, lost in zip(prompts, ids, cut, strict=True):
            truth = theirs(prompt, padding="max_length", truncation=True, max_length=77).input_ids
            assert row.tolist() == truth, (path, prompt)
            assert (lost != "") == (len(theirs(prompt).input_ids) > 77)
