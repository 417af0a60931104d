"""The tokenizer gives the ids of CLIP's definition, from every kind of file, and says what it cut."""

import gzip
import json

import numpy as np
import pytest

from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError
from gspn_jax.text import Tokenizer, load_tokenizer
from tests.text import plain_bpe
from tests.text.plain_bpe import END, START, small_vocabulary
from tests.text.texts import texts


def merges_text() -> str:
    return "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in small_vocabulary()[1])


def write_folder(folder, config=None, special=None):
    (folder / "vocab.json").write_text(json.dumps(small_vocabulary()[0]))
    (folder / "merges.txt").write_text(merges_text(), encoding="utf-8")
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def word(content: str, normalized: bool) -> dict:
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


STABLE_DIFFUSION_1 = {
    "bos_token": word(START, True),
    "eos_token": word(END, True),
    "unk_token": word(END, True),
    "pad_token": END,
}
"""special_tokens_map.json of the published folders; the last entry of a word holds."""
STABLE_DIFFUSION_2 = STABLE_DIFFUSION_1 | {"pad_token": "!"}


@pytest.mark.parametrize(
    ("special", "expected", "pad"),
    [
        (None, {START: False, END: False}, END),
        (STABLE_DIFFUSION_1, {START: True, END: False}, END),
        (STABLE_DIFFUSION_2, {START: True, END: True, "!": False}, "!"),
    ],
    ids=["vocabulary alone", "Stable Diffusion 1", "Stable Diffusion 2"],
)
def test_ids_are_those_of_the_definition(tmp_path, special, expected, pad):
    vocabulary, merges = small_vocabulary()
    prompts = texts()
    assert len(prompts) > 250
    config = {"model_max_length": 10**30}  # as transformers writes where no length is known
    ids, cut = load_tokenizer(write_folder(tmp_path, config, special))(prompts)
    assert ids.shape == (len(prompts), 77) and ids.dtype == np.int32
    for prompt, row, lost in zip(prompts, ids, cut, strict=True):
        truth = plain_bpe.encode(prompt, vocabulary, merges, expected)
        kept = [vocabulary[START], *truth[:75], vocabulary[END]]
        assert row.tolist() == kept + [vocabulary[pad]] * (77 - len(kept)), prompt
        assert (lost != "") == (len(truth) > 75) and prompt.endswith(lost), prompt


def test_every_kind_of_file_gives_the_same_ids(tmp_path):
    vocabulary, merges = small_vocabulary()
    truth = Tokenizer(vocabulary, merges)(texts()).ids
    plain, packed = tmp_path / "merges.txt", tmp_path / "vocabulary.txt.gz"
    plain.write_text(merges_text(), encoding="utf-8")
    packed.write_bytes(gzip.compress(merges_text().encode()))
    folders = [tmp_path / name for name in ("new", "old", "both")]
    for folder in folders:
        folder.mkdir()
    for folder, pairs in ((folders[0], [list(pair) for pair in merges]), (folders[1], [" ".join(p) for p in merges])):
        model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    decoder = {str(vocabulary[START]): word(START, False), str(vocabulary[END]): word(END, False)}
    write_folder(
        folders[2],
        {"added_tokens_decoder": decoder, "bos_token": START, "eos_token": END, "pad_token": END},
        {"pad_token": "!"},
    )  # which is not read beside a decoder
    for path in (plain, packed, *folders):
        np.testing.assert_array_equal(load_tokenizer(path)(texts()).ids, truth, err_msg=str(path))


def test_what_does_not_fit_is_given_back():
    tokenizer = Tokenizer(*small_vocabulary(), length=5)
    ids, cut = tokenizer(["A B C", "A B C D", "A B C ÉTÉ x", "a b 🦩 y", ""])
    assert cut == ("", "D", "ÉTÉ x", "🦩 y", "")
    assert (ids[:4, -1] == tokenizer.vocabulary - 1).all() and ids.shape == (5, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda folder: (folder / "merges.txt").unlink(),
            FileNotFoundError,
            r"file of merges, found nothing at .*merges",
        ),
        (lambda folder: (folder / "vocab.json").unlink(), FileNotFoundError, r"vocab\.json and merges\.txt, one with"),
        (lambda folder: (folder / "vocab.json").write_text("{"), WeightsError, r"vocab\.json must be a JSON file"),
        (
            lambda folder: (folder / "vocab.json").write_text('{"a": 0}'),
            ConfigError,
            r"vocabulary must have '<\|startof",
        ),
        (lambda folder: (folder / "merges.txt").write_text("#\na b c\n"), ConfigError, r"a pair of words on each line"),
        (lambda folder: (folder / "merges.txt").write_text("#\nzz zz\n"), ConfigError, r"join words of its vocabulary"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}'),
            ConfigError,
            r"vocabulary must have '<pad>', found \d+ other words",
        ),
    ],
)
def test_other_files_get_a_sentence(tmp_path, change, error, message):
    change(write_folder(tmp_path))
    with pytest.raises(error, match=message):
        load_tokenizer(tmp_path)


def test_the_word_that_pads_is_one_token_wherever_it_stands():
    vocabulary, merges = small_vocabulary()
    ids, _ = Tokenizer(vocabulary, merges, pad="!", length=6)(["A!!"])
    assert ids.tolist() == [[vocabulary[word] for word in (START, "a</w>", "!", "!", END, "!")]]


def test_half_a_surrogate_pair_gets_a_sentence():
    with pytest.raises(ConfigError, match="a prompt must be valid Unicode"):
        Tokenizer(*small_vocabulary())(["a \ud83d dog"])
