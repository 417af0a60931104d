"""CLIP's tokenizer: byte-pair encoding of lower-cased text, on the `tokenizers` library, from the files people have."""

import gzip
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from gspn_jax import extras
from gspn_jax.config import ConfigError
from gspn_jax.tensor_files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
"""Tokens of a prompt, with start and end."""
MERGES = 48_894
"""Number of merges of CLIP's vocabulary; OpenAI's file holds more lines, which are not part of it."""

_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Words, single digits and runs of other characters (Radford et al. 2021, openai/CLIP)."""


class Tokens(NamedTuple):
    """Token ids of prompts, and what did not fit."""

    ids: Int32[np.ndarray, "B N"]
    cut: tuple[str, ...]
    """End of each prompt, in the user's words, that the model does not see; "" where all of it fits."""


class Tokenizer:
    """Prompts to ids, equal to transformers' `CLIPTokenizer` with padding and truncation to `length`.

    `special` holds words that are one token wherever they stand, each with whether it is looked for after lower-casing;
    `pad` is the word that fills up to `length`. Raises ConfigError for a vocabulary without one of these words.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        special: Mapping[str, bool] | None = None,
        pad: str = END,
        length: int = LENGTH,
    ):
        extras.require("text", "tokenizers", by="CLIP's tokenizer")
        import tokenizers
        from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

        special = {START: False, END: False} | dict(special or {}) | {pad: (special or {}).get(pad, False)}
        for word in special:
            if word not in vocabulary:
                raise ConfigError(f"the tokenizer's vocabulary must have {word!r}, found {len(vocabulary)} other words")
        for word, number in vocabulary.items():
            if type(number) is not int or not 0 <= number < len(vocabulary):
                raise ConfigError(
                    f"the tokenizer's vocabulary must number its {len(vocabulary)} words from 0, found {number!r} for "
                    f"{word!r}"
                )
        if length < 2:
            raise ConfigError(f"the tokenizer's length must be 2 or more, found {length}")
        self.length, self.vocabulary = length, len(vocabulary)
        self._start, self._end, self._pad = vocabulary[START], vocabulary[END], vocabulary[pad]
        try:
            model = tokenizers.models.BPE(
                dict(vocabulary), list(merges), unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""
            )
        except Exception as error:  # the library has no type of its own
            raise ConfigError(f"the tokenizer's merges must join words of its vocabulary: {error}") from error
        self._split = tokenizers.Tokenizer(model)
        self._split.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._split.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._split.add_special_tokens(
            [AddedToken(word, normalized=normalized, special=True) for word, normalized in special.items()]
        )

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids with start and end, padded to `length`; a longer prompt loses its end, which is returned beside them.

        Raises ConfigError for a prompt with half of a surrogate pair, which is no text.
        """
        ids = np.full((len(prompts), self.length), self._pad, np.int32)
        cut = []
        for row, prompt in zip(ids, prompts, strict=True):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"a prompt must be valid Unicode, found {prompt!r}: {error.reason}") from error
            found = self._split.encode(prompt)
            kept = found.ids[: self.length - 2]
            row[: len(kept) + 2] = [self._start, *kept, self._end]
            cut.append(prompt[found.offsets[len(kept)][0] :] if len(kept) < len(found.ids) else "")
        return Tokens(ids, tuple(cut))


def load_tokenizer(path: str | pathlib.Path, *, length: int = LENGTH) -> Tokenizer:
    """Reads a tokenizer's folder (`vocab.json` and `merges.txt`, or `tokenizer.json`; with `tokenizer_config.json` and
    `special_tokens_map.json` if they are there) or a file of merges such as OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

    Raises FileNotFoundError without these files, and ConfigError or WeightsError for other contents.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return Tokenizer(*_from_merges(_read_merges(path)[:MERGES]), length=length)
    if (path / "vocab.json").is_file():
        vocabulary, merges = read_json(path / "vocab.json"), _read_merges(path / "merges.txt")
    elif (path / "tokenizer.json").is_file():
        vocabulary, merges = _from_tokenizer_json(path / "tokenizer.json")
    else:
        raise FileNotFoundError(
            f"the tokenizer must be a folder with vocab.json and merges.txt, one with "
            f"tokenizer.json, or a file of merges, found none of them at {path}"
        )
    special, pad = _special_words(path)
    return Tokenizer(vocabulary, merges, special=special, pad=pad, length=length)


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """Pairs of a file of merges, one a line after the first; the first is a header."""
    if not path.is_file():
        raise FileNotFoundError(f"the tokenizer must have a file of merges, found nothing at {path}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().split("\n")[1:]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} must be a text file of merges, it cannot be read: {error}") from error
    words = [line.split() for line in lines if line.strip()]
    if not words or any(len(pair) != 2 for pair in words):
        raise ConfigError(f"{path} must hold a pair of words on each line after the first, found others")
    return [(first, second) for first, second in words]


def _from_merges(merges: list[tuple[str, str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary of CLIP that belongs to merges: bytes, bytes that end a word, merged pairs, start, end."""
    characters = _byte_characters()
    words = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges), START, END]
    return {word: i for i, word in enumerate(words)}, merges


def _byte_characters() -> list[str]:
    """A visible character for each byte, in the order of CLIP's ids: visible bytes as they are, others from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]


def _from_tokenizer_json(path: pathlib.Path) -> tuple[dict[str, int], list[Any]]:
    model = read_json(path).get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ConfigError(f"{path} must hold a byte-pair encoding (model.type 'BPE'), found another model")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise ConfigError(f"{path} must hold a model.vocab and a list of model.merges, found others")
    # older files write a pair as one string
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(word, str) for word in pair):
            raise ConfigError(f"{path} must hold pairs of words as model.merges, found {str(pair)[:80]}")
    return vocabulary, [(first, second) for first, second in pairs]


def _special_words(folder: pathlib.Path) -> tuple[dict[str, bool], str]:
    """Special words of a folder, each with whether it is looked for after lower-casing, and the one that pads.

    As transformers reads them: `special_tokens_map.json` goes before `tokenizer_config.json`, unless that has
    `added_tokens_decoder`; how a word is looked for is said last by that, or by `tokenizer.json` without it.
    """
    config: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file() and "added_tokens_decoder" not in config:
            config |= read_json(folder / name)
    words = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        pad, lowered = _special_word(config.get(role) or (START if role == "bos_token" else END), folder)
        words[pad] = lowered
    whole = folder / "tokenizer.json"
    if "added_tokens_decoder" in config:
        by_number = config["added_tokens_decoder"]
        added = list(by_number.values()) if isinstance(by_number, dict) else by_number
    else:
        added = read_json(whole).get("added_tokens", []) if whole.is_file() else []
    return words | dict(_special_word(word, folder) for word in (added if isinstance(added, list) else [added])), pad


def _special_word(word: Any, folder: pathlib.Path) -> tuple[str, bool]:
    """(the word, whether it is looked for after lower-casing) of an entry, which is a text or an object."""
    content = word.get("content") if isinstance(word, dict) else word
    if not isinstance(content, str):
        raise ConfigError(f"the tokenizer's special words must be texts, found {str(word)[:80]} in {folder}")
    return content, isinstance(word, dict) and bool(word.get("normalized", False))
