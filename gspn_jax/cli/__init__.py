"""Parts that the commands share: flags and config files, hosts, log lines, exit codes and errors as one sentence."""

from gspn_jax.cli import command, interrupts

if command.is_command():
    interrupts.end_at_once()  # before all that follows is imported

from gspn_jax.cli.codes import INTERRUPTED, USAGE_ERROR
from gspn_jax.cli.config_files import load_config, parse, parse_config
from gspn_jax.cli.exits import user_errors
from gspn_jax.cli.hosts import join_other_hosts
from gspn_jax.cli.process import setup
from gspn_jax.cli.words import words

__all__ = [
    "INTERRUPTED",
    "USAGE_ERROR",
    "join_other_hosts",
    "load_config",
    "parse",
    "parse_config",
    "setup",
    "user_errors",
    "words",
]
