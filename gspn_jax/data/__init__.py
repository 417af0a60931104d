"""Images in, batches out: sources, the Grain loader, prefetch to devices, and pixel helpers."""

from gspn_jax.data.loader import Loader, make_loader
from gspn_jax.data.prefetch import prefetch_to_device
from gspn_jax.data.sources import DataError, Source, make_source

__all__ = ["DataError", "Loader", "Source", "make_loader", "make_source", "prefetch_to_device"]
