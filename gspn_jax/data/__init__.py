"""Images in, batches out: sources, the loader (by Grain or from memory), prefetch to devices, and pixel helpers.

The names below are imported when first used, so that what needs no Grain does without it.
"""

import importlib
from typing import TYPE_CHECKING

from gspn_jax import extras

if TYPE_CHECKING:
    from gspn_jax.data.decoding import DataError
    from gspn_jax.data.loader import Loader, make_loader
    from gspn_jax.data.prefetch import DevicePrefetcher, prefetch_to_device
    from gspn_jax.data.source import Source
    from gspn_jax.data.sources import make_source

__all__ = ["DataError", "DevicePrefetcher", "Loader", "Source", "make_loader", "make_source", "prefetch_to_device"]

extras.require("train", "PIL", "tqdm", by=__name__)

_MODULES = {
    "DataError": "decoding",
    "Loader": "loader",
    "Source": "source",
    "make_loader": "loader",
    "make_source": "sources",
    "DevicePrefetcher": "prefetch",
    "prefetch_to_device": "prefetch",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
