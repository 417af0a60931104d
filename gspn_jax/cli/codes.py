"""Exit codes of the commands, and the sentence of a host that is lost."""

USAGE_ERROR = 2
"""Exit code for input that cannot be used."""
INTERRUPTED = 75
"""Exit code of a run that the same command goes on with: EX_TEMPFAIL of sysexits.h."""
LOST = (
    "another host, or the connection to it, was lost ({}); the same command on all hosts goes on from the newest "
    "checkpoint"
)
