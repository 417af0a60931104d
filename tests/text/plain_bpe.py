"""Byte-pair encoding of CLIP again, in plain Python after its definition; and a small vocabulary learnt here."""

import collections
import functools
import itertools
import re
import unicodedata

from tests.text.texts import texts

START, END = "<|startoftext|>", "<|endoftext|>"
_SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@functools.cache
def byte_characters() -> dict[int, str]:
    """A visible character for each byte, in the order of the ids."""
    visible = [b for b in range(256) if unicodedata.category(chr(b)) not in ("Cc", "Zs", "Cf")]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def normal(text: str) -> str:
    text = re.sub(f"[{_SPACES}]+", " ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)  # one by one: a sigma does not know that it ends a word


@functools.cache
def kind(character: str) -> str:
    """L of a letter, N of a number, a space of white space, and others."""
    return " " if re.fullmatch(f"[{_SPACES}]", character) else unicodedata.category(character)[0]


def pieces(text: str) -> list[str]:
    """Special words, endings such as 'll, runs of letters, single digits, runs of anything else; no spaces."""
    found, at = [], 0
    while at < len(text):
        fixed = next((word for word in (START, END, *_SUFFIXES) if text.startswith(word, at)), None)
        end = at + (len(fixed) if fixed else 1)
        if fixed is None and kind(text[at]) == "L":
            while end < len(text) and kind(text[end]) == "L":
                end += 1
        elif fixed is None and kind(text[at]) not in " N":
            while end < len(text) and kind(text[end]) not in " LN":
                end += 1
        if fixed in (START, END):  # the reference splits what it finds once more, by kind alone
            found += ["<|", fixed[2:-2], "|>"]
        elif kind(text[at]) != " ":
            found.append(text[at:end])
        at = end
    return found


def symbols(piece: str) -> list[str]:
    characters = [byte_characters()[b] for b in piece.encode()]
    return [*characters[:-1], characters[-1] + "</w>"]


def join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair and not joined[-1].startswith("\0"):
            joined[-1] = "\0" + joined[-1] + part
        else:
            joined.append(part)
    return [part.removeprefix("\0") for part in joined]


def encode(text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], special: dict[str, bool]) -> list[int]:
    """Ids without start, end and padding. Special words are found before lower-casing, or after where it says True."""
    rank = {pair: i for i, pair in enumerate(merges)}
    ids = []

    def split(text: str, words: list[str]) -> list[str]:
        return re.split("(" + "|".join(map(re.escape, words)) + ")", text) if words else [text]

    for part in split(text, [word for word, late in special.items() if not late]):
        if special.get(part) is False:
            ids.append(vocabulary[part])
            continue
        for inner in split(normal(part), [word for word, late in special.items() if late]):
            if inner in special:
                ids.append(vocabulary[inner])
                continue
            for piece in pieces(inner):
                parts = symbols(piece)
                while pairs := set(itertools.pairwise(parts)) & rank.keys():
                    parts = join(parts, min(pairs, key=rank.__getitem__))
                ids += [vocabulary[part] for part in parts]
    return ids


@functools.cache
def small_vocabulary(size: int = 200) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary as CLIP's with `size` merges: each joins the pair that is most frequent in `texts`."""
    words = [symbols(piece) for text in texts()[:75] for piece in pieces(normal(text))]
    merges = []
    for _ in range(size):
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [join(word, merges[-1]) for word in words]
    characters = list(byte_characters().values())
    names = [*characters, *(f"{c}</w>" for c in characters), *map("".join, merges), START, END]
    return {name: i for i, name in enumerate(names)}, merges
