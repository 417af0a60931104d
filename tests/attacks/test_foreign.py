"""Attacks by data and weights of other people (B): read, or refused in a sentence."""

from tests.attacks.attack import Attack, rows, train

ATTACKS = [
    Attack(
        "B9",
        "train on a folder of class folders without images",
        train(
            *("--data.source", "folder", "--data.path", "{here}/images", "--data.channels", "3"),
            before=lambda given, here: (here / "images" / "a").mkdir(parents=True),
        ),
        "{here}/images",
    )
]


@rows(ATTACKS)
def test_it_is_read_or_refused(attack, withstand):
    withstand(attack)
