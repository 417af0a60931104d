"""The results file of a script that a GPU runs: written again after each row, so that what was found is never lost."""

import datetime
import json
import pathlib
from typing import Any

from gspn_jax.files import replacing


class Record(dict):
    """A dict with device, versions and date, for JSON; `write` puts it into its file, if it has one."""

    def __init__(self, path: pathlib.Path | None, **values: Any):
        import jax

        super().__init__(
            date=datetime.datetime.now().isoformat(" ", "minutes"),
            jax=jax.__version__,
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            **values,
        )
        self._path = path
        self.write()

    def write(self) -> None:
        if self._path:
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(self, indent=1) + "\n")
