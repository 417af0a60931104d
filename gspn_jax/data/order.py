"""The order of the stream of images and its flips, to the bits of Grain's, without Grain.

`MapDataset.source(images).seed(seed).shuffle().repeat().random_map(flip)` permutes every epoch by a small block cipher
(Simon, https://eprint.iacr.org/2013/404, four rounds) of the index, encrypted again while it is out of range (cycle
walking), and gives each place a block of Philox's stream of its own. Here a whole epoch is permuted at once.
"""

import functools

import numpy as np
from jaxtyping import Bool, Int, Integer

ROUNDS = 4
_MIN_WORD = 8
"""Bits of half a block of the cipher, at the least."""
_SHUFFLE_DEPTH, _FLIP_DEPTH = 1, 3
"""Steps of the pipeline from `seed` to the one that derives its own seed."""
_WORD = 2**32 - 1


def places_to_images(places: range, length: int, seed: int) -> Int[np.ndarray, " n"]:
    """The image, 0 .. length - 1, at each place of the endless stream of `seed`."""
    places = np.asarray(places)
    images = np.empty(len(places), np.int64)
    for epoch in range(places[0] // length, places[-1] // length + 1):
        inside = places // length == epoch
        images[inside] = _epoch(length, epoch_seed(epoch, seed))[places[inside] % length]
    return images


@functools.lru_cache(maxsize=2)
def epoch_seed(epoch: int, seed: int) -> int:
    """The seed of the cipher that permutes an epoch of the stream of `seed`."""
    return (_derived(seed, _SHUFFLE_DEPTH) + epoch) % 2**32


def flips(places: range, seed: int) -> Bool[np.ndarray, " n"]:
    """Mirrored or not, for the image at each place of the stream: a bit of the place's own block of Philox."""
    philox = np.random.Philox(_derived(seed, _FLIP_DEPTH))
    philox.advance(places[0] << 192)  # the place is the highest of the counter's four words
    bits = np.empty(len(places), bool)
    for i in range(len(bits)):
        bits[i] = int(philox.random_raw()) >> 31 & 1
        philox.advance((1 << 192) - 1)  # drawing has moved the counter by one
    return bits


def _derived(seed: int, depth: int) -> int:
    return int(np.random.SeedSequence([seed, depth]).generate_state(1)[0])


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs
def _epoch(length: int, seed: int) -> Integer[np.ndarray, " length"]:
    """A permutation of 0 .. length - 1."""
    if length == 1:
        return np.zeros(1, np.uint32)
    word = max(-(-_bits(length - 1) // 2), _MIN_WORD)
    encrypted = _encrypt(np.arange(max(length, 4**word), dtype=np.uint32), word, _round_keys(seed))
    # where walking ends for each index: at itself if that is in range; twice as many steps at each turn
    end = np.where(np.arange(len(encrypted)) < length, np.arange(len(encrypted), dtype=np.uint32), encrypted)
    order = encrypted[:length]
    while (order >= length).any():
        order, end = end[order], end[end]
    return order


def _bits(value: int) -> int:
    """log2 rounded up, as Grain sizes its block. A power of two gets no bit of its own: of 2**16 + 1 images (2**18 + 1,
    ...) the last is never drawn, and another twice an epoch."""
    return (value - 1).bit_length()


def _encrypt(index: np.ndarray, word: int, keys: list[int]) -> np.ndarray:
    """Simon's rounds, two at a time, on the two words of `word` bits of each index."""
    mask = np.uint32(2**word - 1)

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << by | x >> (word - by)) & mask

    def mix(x: np.ndarray) -> np.ndarray:
        return rotated(x, 1) & rotated(x, 8 % word) ^ rotated(x, 2)

    left, right = index >> word & mask, index & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mix(right) ^ (np.uint32(first) & mask)
        right = right ^ mix(left) ^ (np.uint32(second) & mask)
    return left << word | right


def _round_keys(seed: int) -> list[int]:
    """What std::seed_seq{seed} generates for four words (C++ standard, [rand.util.seedseq], n = 4, s = 1)."""

    def scramble(value: int) -> int:
        return value ^ value >> 27

    keys = [0x8B8B8B8B] * ROUNDS
    for k in range(ROUNDS):
        added = 1664525 * scramble(keys[k] ^ keys[(k + 1) % 4] ^ keys[(k - 1) % 4]) & _WORD
        keys[(k + 1) % 4] = keys[(k + 1) % 4] + added & _WORD
        added = added + (1 if k == 0 else k % 4 + (seed if k == 1 else 0)) & _WORD
        keys[(k + 2) % 4] = keys[(k + 2) % 4] + added & _WORD
        keys[k] = added
    for k in range(ROUNDS, 2 * ROUNDS):
        added = 1566083941 * scramble(keys[k % 4] + keys[(k + 1) % 4] + keys[(k - 1) % 4] & _WORD) & _WORD
        keys[(k + 1) % 4] ^= added
        added = added - k % 4 & _WORD
        keys[(k + 2) % 4] ^= added
        keys[k % 4] = added
    return keys
