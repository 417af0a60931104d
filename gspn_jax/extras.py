"""Packages that only an extra of the installation brings."""

import importlib.util


class MissingExtra(ModuleNotFoundError):
    """A package that an extra brings is not installed; the message is one sentence that names the extra."""


def require(extra: str, *modules: str, by: str) -> None:
    """Raises MissingExtra for the first of `modules` that is not installed; `by` says what needs it."""
    for module in modules:
        if not _installed(module):
            raise MissingExtra(
                f"{by} needs {module.partition('.')[0]}, which is not installed: pip install 'gspn-jax[{extra}]'",
                name=module,
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not there
        return False
    except ValueError:  # it is imported already and has no spec
        return True
