"""Attacks on what a run has made (A): nothing is lost, and nothing is wrong in silence."""

from tests.attacks.attack import Attack, draw, rows, train


def flip_a_byte(checkpoints):
    """In a file of the first average, in every checkpoint."""
    for path in checkpoints.glob("*/ema_0.9/_METADATA"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))


ATTACKS = [
    Attack(
        "A4",
        "one byte of both checkpoints is changed, then sampled",
        draw(run="{here}/run", before=lambda given, here: given.copy_of_run(here, flip_a_byte)),
        ("must hold a whole checkpoint", "ema_0.9/_METADATA"),
    ),
    Attack(
        "A4",
        "one byte of both checkpoints is changed, then trained on",
        train(config="{here}/run.py", before=lambda given, here: given.copy_of_run(here, flip_a_byte)),
        "must hold a whole checkpoint",
    ),
]


@rows(ATTACKS)
def test_nothing_is_lost(attack, withstand):
    withstand(attack)
