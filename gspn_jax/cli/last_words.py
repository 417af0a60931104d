"""Last words of a host that ends by an error: the other hosts of the job hear them, and end with the same code.

A host that ends alone leaves the others waiting for it within a program, where no agreement of theirs can reach them
(`parallel.agreement` is for what all do at the same place). JAX's coordination service carries the words beside the
programs. What happens on one host only, in whatever part of a command, so has one sentence and one code on all of them.
"""

import json
import os
import threading
import time
from typing import Any, NamedTuple

from gspn_jax.cli import child, streams

KEY = "gspn_jax/last_words"
"""Where they are kept: those of the first host to speak count."""
LEFT = "gspn_jax/left"
"""Folder of an entry for each host that has spoken or heard, and ends."""
PATIENCE = 4.0
"""Seconds in which a host that hears them may end by itself, as it does where all have agreed on a failure."""
LOOK = 0.5
"""Seconds between two looks."""


class Words(NamedTuple):
    """A host, its exit code, and its sentence."""

    host: int
    code: int
    text: str

    @property
    def said(self) -> str:
        """The sentence as another host says it."""
        return f"error: host {self.host} says: {self.text}"


def listen() -> None:
    """From now on, when another host has spoken and this one has not ended `PATIENCE` later, it ends as that one."""
    threading.Thread(target=_listen, name="last_words", daemon=True).start()


def tell(code: int, text: str) -> Words:
    """Tells the other hosts why this one ends; returns the words that count, which are those of the first to speak."""
    _ending.set()
    own, client = Words(_index(), code, text), _client()
    if client is None:
        return own
    try:
        client.key_value_set(KEY, json.dumps(own))  # fails where there are words already, or nobody who would keep them
        return own
    except Exception:  # whatever it is must not hide why this host ends
        return heard() or own


def heard(seconds: float = 0) -> Words | None:
    """Words that a host has spoken, within so many seconds; None if none has."""
    client, end = _client(), time.monotonic() + seconds
    while client is not None:
        try:
            return Words(*json.loads(client.key_value_try_get(KEY)))
        except Exception:  # nothing is there, or the service is gone
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)
    return None


def leave(seconds: float) -> None:
    """Notes that this host ends. The first one, which keeps the words, waits until the others have noted it too, for so
    many seconds at most: one of them may be gone."""
    client = _client()
    if client is None:
        return
    try:
        if _index():
            client.key_value_set(f"{LEFT}/{_index()}", "")
            return
        import jax

        end = time.monotonic() + seconds
        while time.monotonic() < end and len(client.key_value_dir_get(LEFT)) < jax.process_count() - 1:
            time.sleep(0.1)
        time.sleep(0.2)  # for the answer to the last of them
    except Exception:  # the service is gone, and with it whom to wait for
        return


_ending = threading.Event()
"""Event of a process that is about to end by itself."""


def _listen() -> None:
    words = None
    while words is None:
        time.sleep(LOOK)
        words = heard()
        if _client() is None:  # the job is over
            return
    child.say_if_aborted(words.code, words.said.removeprefix("error: "))
    if words.host == _index() or _ending.wait(PATIENCE):
        return
    streams.say(words.said)
    streams.hand_over()
    leave(PATIENCE)
    os._exit(words.code)


def _client() -> Any:
    """Client of JAX's coordination service, None for a process that has joined no others."""
    from orbax.checkpoint import multihost  # the only public way to it

    return multihost.get_jax_distributed_client() if multihost.is_jax_distributed_client_initialized() else None


def _index() -> int:
    import jax

    return jax.process_index()
