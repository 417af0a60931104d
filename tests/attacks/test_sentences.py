"""Attacks by the environment, config files and Ctrl-C (C18 to C20): one sentence in place of a traceback."""

import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import sys

import jax
import pytest

from gspn_jax import cli
from gspn_jax import train as command
from gspn_jax.cli import config_files, limits, streams
from tests.attacks.attack import GOES_ON, Attack, flags, process, rows, train
from tests.attacks.given import write


def script(done, text, says):
    """A config file that is a program of its own."""
    return Attack(
        "C19", f"a config file that {done}", train(config="{here}/one.py", before=write("one.py", text)), says
    )


def with_streams_of_its_own(argv):
    """train_dit.py whose stdout and stderr are a pipe, so that what a config does to them is seen at its other end."""
    before = sys.stdout, sys.stderr
    copies, (read, written) = [os.dup(number) for number in (1, 2)], os.pipe()
    try:
        for number in (1, 2):
            os.dup2(written, number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        command.main(argv)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in zip((1, 2), copies, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(written)
        sys.stdout, sys.stderr = before
        with open(read) as said:
            print(said.read(), file=sys.stderr)


def closing(done, text, says="found ZeroDivisionError: division by zero", code=2, more="1 / 0"):
    """A config file that does something to stdout and stderr."""
    make = flags(
        with_streams_of_its_own,
        *("--config", "{here}/one.py"),
        before=write("one.py", f"import os, sys\n{text}\n{more}"),
    )
    return Attack("C19", f"a config file that {done}", make, says, code, writes=("run*",))


def without_home(argv):
    """train_dit.py of a user who has neither HOME nor a name."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
            patch.delenv(name, raising=False)
        patch.setattr(os, "getuid", lambda: 54321)
        command.main(argv)
        assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def to_ascii(argv):
    """A command whose stdout is ASCII."""
    written = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(written, "ascii")):
        streams.prepare()
        print("größer")
        sys.stdout.flush()
        assert written.getvalue() == b"gr\\xf6\\xdfer\n"


def interrupted(argv):
    """A command that Ctrl-C meets while it reads its config."""

    def load(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_files, "load_config", load)
        command.main(argv)


def out_of_memory(error):
    """A command in which an allocation fails."""

    def main(argv):
        with cli.user_errors():
            raise error

    return flags(main)


def in_a_container(**files):
    """What is said of a control group with these files of version 2, in which the process is."""

    def main(argv):
        root = pathlib.Path(argv[0])
        group = root / "sys/fs/cgroup/job"
        group.mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        (root / "proc/self/cgroup").write_text("0::/job\n")
        for name, text in files.items():
            (group / f"memory.{name}").write_text(text)
        with cli.user_errors():
            limits.check(root)

    return flags(main, "{here}")


def with_memory(size, action):
    """`action` where so many bytes are left to the process."""

    def main(argv):
        from gspn_jax.parallel import memory

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "free_memory", lambda: size)
            with cli.user_errors():
                action(argv)

    return main


def small_step(argv):
    """A step that takes 9 MB beside its arguments, on every device."""
    import jax.numpy as jnp

    from gspn_jax.parallel.memory import check_program

    step = jax.jit(lambda x: (jnp.sin(x[:, None] + x) @ jnp.cos(x[:, None] - x)).sum())
    check_program(step, jnp.ones(1500), what="a step of 8 images", advice="a smaller train.batch_size takes less")


MEMORY = [
    Attack("C18", what, flags(with_memory(size, action), *argv), says, code, writes=("run*",))
    for what, size, action, argv, says, code in (
        (
            "a container of 1.45 GB left, and a model of 0.5 GB more",
            int(1.45e9),
            command.main,
            ("--config", "digits", "--run-dir", "{here}/run", "--model.hidden", "768", "--model.depth", "6"),
            ("must fit into the memory of a device", "beside 1.0 GB of the compiler"),
            2,
        ),
        (
            "a container that leaves what a small model needs, and not what it may take",
            int(1.3e9),
            command.main,
            ("--config", "digits", "--run-dir", "{here}/run"),
            "1.30 GB of memory are left for this process, and compiling for a CPU may take 1.6 GB",
            GOES_ON,
        ),
        (
            "a step that was compiled needs more than is left",
            int(1e7),
            small_step,
            (),
            ("a step of 8 images must fit into the memory that is left", "0.01 GB are left to this process"),
            2,
        ),
        ("a step that was compiled needs less than is left", int(1e10), small_step, (), "", GOES_ON),
    )
]

CONTAINERS = [
    Attack("C18", what, in_a_container(**files), says, code, writes=("proc*", "sys*"))
    for what, files, says, code in (
        ("a container of 0.5 GB", {"max": "500000000", "current": "0"}, "found 0.50 GB left of the 0.50 GB of", 2),
        (
            "a container of 8 GB, of which others have 7.8",
            {"max": "8000000000", "current": "7800000000"},
            "found 0.20 GB left of the 8.00 GB of",
            2,
        ),
        (
            "a container that is slowed down from 0.5 GB on",
            {"max": "max", "high": "500000000", "current": "0"},
            "job/memory.high",
            2,
        ),
        (
            "a container of 8 GB, of which 7.8 are files that can be forgotten",
            {"max": "8000000000", "current": "7800000000", "stat": "inactive_file 7700000000"},
            "",
            GOES_ON,
        ),
        ("a container without a limit", {"max": "max", "current": "7800000000"}, "", GOES_ON),
        ("a container whose files are of another kind", {"max": "many", "current": "?", "stat": "\0"}, "", GOES_ON),
    )
]

START = ("--train.steps", "3", "--optimizer.warmup-steps", "1")
AROUND = [
    script("divides by zero", "config = 1 / 0", "found ZeroDivisionError: division by zero"),
    script("calls sys.exit(0)", "import sys; sys.exit(0)", "found SystemExit: 0"),
    script("calls exit()", "exit()", "found SystemExit: None"),
    script("raises an error of its own", "class E(BaseException): pass\nraise E('mine')", "found E: mine"),
    script("recurses for ever", "def f(): f()\nf()", "found RecursionError"),
    script("raises StopIteration", "next(iter(()))", "found StopIteration"),
    script("raises an assertion", "assert False, 'no\\nlines'", "found AssertionError: no"),
    script("has no memory", "bytearray(2**62)", "found MemoryError"),
    script("is binary", "\0\1\2", "must define `config = Config(...)`, found"),
    script("is not UTF-8", b"config = '\xff'", "found SyntaxError"),
    script(
        "raises when it is asked for its config", "def __getattr__(name): raise OSError('lazy')", "found OSError: lazy"
    ),
    script(
        "raises an error that cannot say what it is",
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "found E: no message",
    ),
    script("is empty", "", "found NoneType"),
    script(
        "raises an error that ends the process when it is asked what it is",
        "import sys\nclass E(Exception):\n    def __str__(self): sys.exit(0)\nraise E",
        "found E: no message",
    ),
    script("raises an error of 10**6 letters", "raise ValueError('x' * 10**6)", "found ValueError: xxx"),
    script("raises an error of half a character", "raise ValueError('\\udcff')", "found ValueError: \\udcff"),
    script(
        "defines what cannot be asked for its class",
        "class C:\n    __class__ = property(lambda self: 1 / 0)\nconfig = C()",
        "found ZeroDivisionError",
    ),
    closing("closes the descriptors of stdout and stderr, and fails", "os.close(1); os.close(2)"),
    closing("closes stdout, and fails", "sys.stdout.close()"),
    closing("closes stdout and stderr, and fails", "sys.stdout.close(); sys.stderr.close()"),
    closing(
        "sends stdout and stderr to /dev/null, and fails", "n = os.open('/dev/null', 1); os.dup2(n, 1); os.dup2(n, 2)"
    ),
    closing("has no stdout and no stderr, and fails", "sys.stdout = sys.stderr = None"),
    closing("deletes stdout and stderr, and fails", "del sys.stdout, sys.stderr"),
    closing("puts other objects in place of stdout and stderr, and fails", "sys.stdout = sys.stderr = object()"),
    closing("closes stdout and stderr, and is empty", "os.close(1); sys.stderr.close()", "found NoneType", more=""),
    closing(
        "closes stdout and stderr, and exits",
        "os.close(1); sys.stderr.close()",
        "found SystemExit: 0",
        more="sys.exit(0)",
    ),
    closing(
        "closes stdout and stderr, and trains for no steps",
        "os.close(2); sys.stdout.close()",
        "train.steps must be greater than 0",
        more="from gspn_jax.config import *\nconfig = Config('r', train=TrainConfig(steps=0))",
    ),
    script("ends the process", "import os; os._exit(0)", "found ProcessExit: os._exit() was called"),
    script(
        "ends the process by a name of its own",
        "from os import _exit as leave\nleave(0)",
        "found ProcessExit: os._exit() was called",
    ),
    script(
        "ends the process, and catches what comes of it",
        "import os\ntry: os._exit(0)\nexcept BaseException: pass",
        "found NoneType",
    ),
    script(
        "becomes another program", "import os; os.execlp('true', 'true')", "found ProcessExit: os.execv() was called"
    ),
    script(
        "becomes another program of another environment",
        "import os; os.execle('/bin/true', 'true', {})",
        "found ProcessExit: os.execve() was called",
    ),
    script(
        "ends the process by a signal of its own", "import os; os.abort()", "found ProcessExit: os.abort() was called"
    ),
    closing("closes every descriptor, and fails", "os.closerange(0, 2**20)"),
    closing("closes every descriptor, and is empty", "os.closerange(0, 2**20)", "found NoneType", more=""),
    Attack(
        "C19",
        "a config that asks another program something",
        train(
            *("--run-dir", "{here}/run"),
            config="{here}/one.py",
            before=write(
                "one.py",
                "import subprocess\nassert subprocess.run(['false']).returncode == 1\n"
                "from gspn_jax.configs.digits import config\n",
            ),
        ),
        "",
        GOES_ON,
        writes=("run*",),
    ),
    Attack("C19", "a config that is as it should be", train(*START), "", GOES_ON, writes=("run*",)),
    Attack("C18", "no HOME and no user name", flags(without_home, "--config", "digits"), "", GOES_ON, writes=("run*",)),
    Attack("C18", "a stdout of ASCII is told of umlauts", flags(to_ascii), "", GOES_ON),
    Attack(
        "C18",
        "an allocation fails",
        out_of_memory(MemoryError("Unable to allocate 9 TiB")),
        "there is not enough memory (Unable to allocate 9 TiB)",
    ),
    Attack(
        "C18",
        "a device has not enough memory",
        out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")),
        "the devices have not enough memory: RESOURCE_EXHAUSTED",
    ),
    Attack(
        "C18",
        "stdout is full, as /dev/full is, before a file is named",
        out_of_memory(OSError(errno.ENOSPC, "No space left on device")),
        "No space left on device: stdout, or a file that was being written",
    ),
    Attack(
        "C20", "Ctrl-C while the config is read", flags(interrupted, "--config", "digits"), "stopped by Ctrl-C", 130
    ),
]
UNREAD = '"$@" | true; exit ${PIPESTATUS[0]}'
IMPORTS = ("-X", "importtime")
"""Says on stderr what was imported, so that Ctrl-C comes at a known point."""
PROCESSES = [
    Attack("C18", "stdout is closed", process("train_dit.py", shell='"$@" >&-'), "needs --config"),
    Attack("C18", "stdout and stderr are closed", process("train_dit.py", shell='"$@" >&- 2>&-'), ""),
    Attack(
        "C18",
        "stdout is full",
        process("sample.py", "--help", shell='"$@" >/dev/full', environment={"PYTHONUNBUFFERED": None}),
        "could not be written to stdout (No space left on device)",
    ),
    Attack(
        "C18",
        "stdout is full, unbuffered",
        process("sample.py", "--help", shell='"$@" >/dev/full', environment={"PYTHONUNBUFFERED": "1"}),
        "No space left on device: stdout",
    ),
    Attack(
        "C18",
        "nobody reads stdout",
        process("sample.py", "--help", shell='"$@" | true; exit ${PIPESTATUS[0]}'),
        "",
        141,
    ),
    Attack(
        "C18",
        "JAX_PLATFORMS=cuda without a GPU: train",
        process("train_dit.py", "--config", "digits", "--run-dir", "{here}/run", environment={"JAX_PLATFORMS": "cuda"}),
        "JAX_PLATFORMS must name devices that this machine has, found 'cuda'",
    ),
    Attack(
        "C18",
        "JAX_PLATFORMS=nonsense: evaluate",
        process("-m", "gspn_jax.evaluate", "--self-test", environment={"JAX_PLATFORMS": "nonsense"}),
        "found 'nonsense'",
    ),
    Attack(
        "C18",
        "1.5 GB of memory (ulimit -d)",
        process("train_dit.py", "--config", "digits", "--run-dir", "{here}/run", memory=1_500_000_000),
        "ulimit -d must allow this process at least 1.95 GB",
    ),
    Attack(
        "C18",
        "1.5 GB of addresses (ulimit -v)",
        process("train_dit.py", "--config", "digits", "--run-dir", "{here}/run", shell='ulimit -v 1500000; "$@"'),
        "ulimit -v must allow this process at least 3.00 GB",
    ),
    Attack(
        "C18",
        "a batch that 2 GB of memory do not hold",
        process(
            *("train_dit.py", "--config", "digits", "--run-dir", "{here}/run", "--train.batch-size", str(10**5)),
            memory=2_000_000_000,
        ),
        "100,000 images must fit into the memory of a device",
    ),
    *(
        Attack(
            "C20",
            f"Ctrl-C while train_dit.py imports {module}",
            process(
                *IMPORTS, "train_dit.py", "--config", "digits", "--run-dir", "{here}/run", interrupt=f" {module}\n"
            ),
            "stopped by Ctrl-C",
            130,
        )
        for module in ("gspn_jax.cli.exits", "numpy", "jax", "optax", "orbax")
    ),
    *(
        Attack(
            "C20",
            f"Ctrl-C while python -m gspn_jax.{command} imports {module}",
            process(*IMPORTS, "-m", f"gspn_jax.{command}", *arguments, interrupt=f" {module}\n"),
            "stopped by Ctrl-C",
            130,
        )
        for command, module, arguments in (
            ("doctor", "jax", ("--config", "digits")),
            ("plan", "jax", ("--config", "gspn_b_2", "--gpu", "H100")),
            ("classify", "optax", ("train", "--config", "classify_cifar10")),
            ("text_to_image", "optax", ("--model", "{here}", "--prompt", "a", "--output", "{here}/a.png")),
            ("evaluate", "jax", ("--run", "{run}")),
            ("convert", "jax", ("import", "--weights", "{vae}", "--output", "{here}/run")),
        )
    ),
    *(
        Attack(
            "C20",
            f"Ctrl-C while the {name} of two processes waits for the other",
            process(
                *("train_dit.py", "--config", "digits", "--coordinator", f"127.0.0.1:{port}"),
                *("--num-processes", "2", "--process-id", index),
                interrupt=20.0,
            ),
            "stopped by Ctrl-C",
            130,
        )
        for name, index, port in (("first", "0", 54311), ("second", "1", 54312))
    ),
    Attack(
        "C20",
        "Ctrl-C while gspn_jax.prepare imports its flags",
        process(
            *IMPORTS,
            "-m",
            "gspn_jax.prepare",
            "latents",
            "--vae",
            "{vae}",
            "--output",
            "{here}/out",
            interrupt=" gspn_jax.prepare.images\n",
        ),
        "stopped by Ctrl-C",
        130,
    ),
]
PROCESSES = [dataclasses.replace(row, slow=True) for row in PROCESSES]

ATTACKS = [*AROUND, *CONTAINERS, *MEMORY, *PROCESSES]


@rows(ATTACKS)
def test_a_sentence_is_said(attack, withstand):
    withstand(attack)
