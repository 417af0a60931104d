"""Attacks on our own small files, numbers, environments and config files (C): one sentence in place of a traceback."""

from tests.attacks.attack import GOES_ON, Attack, draw, process, rows, train
from tests.attacks.given import write

ATTACKS = [
    Attack("C17", "1.5 steps of training", train("--train.steps", "1.5"), "invalid literal for int()"),
    Attack("C17", "a class that is none", draw("--classes", "cat"), "found 'cat'"),
    Attack(
        "C19",
        "a config file that divides by zero",
        train(config="{here}/one.py", before=write("one.py", "config = 1 / 0")),
        ("one.py must define", "ZeroDivisionError"),
    ),
    Attack(
        "C19",
        "a config that is as it should be",
        train("--train.steps", "3", "--optimizer.warmup-steps", "1"),
        "",
        code=GOES_ON,
        writes=("run*",),
    ),
    Attack(
        "C18",
        "stdout is closed before a sentence",
        process("train_dit.py", shell='"$@" >&-'),
        "needs --config NAME_OR_FILE",
        slow=True,
    ),
]


@rows(ATTACKS)
def test_a_sentence_is_said(attack, withstand):
    withstand(attack)
