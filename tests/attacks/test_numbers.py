"""Numbers that people write (C17): a sentence before anything is allocated."""

from gspn_jax import classify
from tests.attacks.attack import Attack, convert, draw, evaluate, flags, prepare, rows, train
from tests.attacks.given import write


def config_file(values, section="train"):
    """A row's `before`: a config file one.py in which a section has such values, as Python."""
    classes = {"train": "TrainConfig", "sampler": "SamplerConfig", "optimizer": "OptimizerConfig"}
    text = f"from gspn_jax.config import *\nconfig = Config('r', {section}={classes[section]}({values}))\n"
    return write("one.py", text)


def in_config(done, values, says, section="train"):
    """A number that a config file has."""
    return Attack(
        "C17", f"a config file with {done}", train(config="{here}/one.py", before=config_file(values, section)), says
    )


def number(flag, value, says, command=train):
    """A number that a flag has."""
    return Attack("C17", f"{flag} {value}", command(flag, value), says)


PREDICT = ("predict", "--run", "{run}", "--images", "{images}")
LATENTS = ("latents", "--vae", "{vae}", "--output", "{here}/out", "--images", "{images}")
ATTACKS = [
    number("--train.steps", "1.5", "invalid literal for int()"),
    number("--train.steps", "abc", "invalid literal for int()"),
    number("--train.steps", "²", "invalid literal for int()"),
    number("--train.steps", str(2**63), "train.steps must be at most 2,147,483,647"),
    number("--train.steps", "9" * 5000, "Exceeds the limit (4300 digits)"),
    number("--train.batch-size", str(10**12), "train.batch_size must be at most 2,147,483,647"),
    number("--train.batch-size", str(10**9), "125,000,000 images must fit into the memory of a device"),
    number("--train.log-every", str(2**63), "train.log_every must be at most 2,147,483,647"),
    number("--diffusion.timesteps", str(10**11), "diffusion.timesteps must be at most 1,000,000"),
    number("--optimizer.learning-rate", "1e400", "optimizer.learning_rate must be finite, found inf"),
    number("--optimizer.clip-norm", "inf", "optimizer.clip_norm must be finite, found inf"),
    number("--sampler.guidance-scale", "inf", "sampler.guidance_scale must be finite, found inf"),
    number("--model.hidden", str(2**20), "must fit into the memory of a device"),
    number("--model.depth", str(2**16), "must fit into the memory of a device"),
    number("--model.depth", str(2**40), "model.depth must be at most 65,536"),
    number("--data.num-classes", str(2**31 - 1), "must fit into the memory of a device"),
    number("--data.image-size", str(2**31 - 1), "data.image_size must be at most 65,536"),
    number("--data.workers", str(10**6), "data.workers must be at most 4,096"),
    number("--eval.num-samples", str(10**10), "eval.num_samples must be at most 100,000,000"),
    number("--profile.steps", "²:3", "profile.steps must be FIRST:LAST"),
    number("--classes", "²", "found '²'", draw),
    number("--classes", "٣", "found '٣'", draw),
    number("--classes", "cat", "found 'cat'", draw),
    number("--step", "²", "invalid int value", draw),
    number("--per-class", str(10**10), "--per-class must be at most 1,000,000", draw),
    number("--seed", str(2**64), "--seed must be", draw),
    number("--ema", "nan", "--ema must be finite", draw),
    Attack(
        "C17",
        "10**10 samples",
        draw("--num-samples", str(10**10), "--output", "{here}/a.npz"),
        "--num-samples must be at most 100,000,000",
        memory=2**28,
    ),
    Attack(
        "C17",
        "a batch of 10**8 samples",
        draw("--num-samples", str(10**8), "--batch-size", str(10**8), "--output", "{here}/a.npz"),
        "12,500,000 images of 8x8x1 must fit into the memory of a device",
    ),
    Attack(
        "C17",
        "latents of images of 10**9 pixels a side",
        prepare(*LATENTS, "--image-size", str(10**9)),
        "--image-size must be at most 65,536",
    ),
    Attack(
        "C17",
        "10**6 threads that decode",
        prepare(*LATENTS, "--threads", str(10**6)),
        "--threads must be at most 4,096",
    ),
    Attack(
        "C17",
        "the last of three guidance scales is NaN",
        evaluate("--run", "{run}", "--guidance-scales", "1", "1.5", "nan"),
        "--guidance-scales must be finite, found nan",
    ),
    Attack(
        "C17",
        "the last of three guidance scales is negative",
        evaluate("--run", "{run}", "--guidance-scales", "1", "1.5", "-1"),
        "guidance_scale must be 0 or more, found -1",
    ),
    Attack(
        "C17",
        "weights of step 2**63",
        convert("import", "--weights", "{other_weights}", "--output", "{here}/run", "--step", str(2**63)),
        "--step must be at most 2,147,483,647",
    ),
    *(
        Attack("C17", f"a classifier is asked with {flag} {value}", flags(classify.main, *PREDICT, flag, value), said)
        for flag, value, said in (
            ("--crop", "1e-9", "--crop must be from 0.01 to 1, found 1e-09"),
            ("--crop", "0", "--crop must be from 0.01 to 1, found 0"),
            ("--image-size", "0", "--image-size must be 1 or more, found 0"),
        )
    ),
    Attack(
        "C17",
        "a classifier is timed with 10**8 images at a time",
        flags(classify.main, "throughput", "--batch-size", str(10**8)),
        "a batch of 100,000,000 images must fit into the memory of a device",
    ),
    in_config("steps=1e3", "steps=1e3", "train.steps must be a whole number, found 1000.0"),
    in_config("steps=True", "steps=True", "train.steps must be a whole number, found True"),
    in_config("steps='10'", "steps='10'", "train.steps must be a whole number, found '10'"),
    in_config("ema_decays=0.9", "ema_decays=0.9", "train.ema_decays must be several numbers, found 0.9"),
    in_config("a decay that is a text", "ema_decays=('a',)", "train.ema_decays must be a number, found 'a'"),
    in_config("one end of an interval", "guidance_interval=(0.1,)", "must be 2 numbers, found (0.1,)", "sampler"),
    in_config("a rate of 10**400", "learning_rate=10**400", "optimizer.learning_rate must be", "optimizer"),
]


@rows(ATTACKS)
def test_a_number_is_said(attack, withstand):
    withstand(attack)
