"""What gpu_check.sh has found, on a page: python benchmarks/gpu_table.py RESULTS STEPS.tsv

STEPS.tsv has a line a step: name, exit code (or a sentence), seconds, limit. Exit code 1 if one of them failed.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kernel_times import by_kind

TIMED_OUT = ("124", "137")
"""Exit codes of `timeout`."""


def values(found: dict[str, Any]) -> Iterator[str]:
    cases = found["cases"]
    wrong = [row for row in cases if row["correct"] is not True]
    yield f"{len(cases) - len(wrong)} of {len(cases)} variants of the kernel agree with float64"
    for row in cases:
        if row.get("expanded_by_xla"):
            yield f"by XLA and the plain kernel {row['case']}: the one that expands proxies {row['expanded_by_xla']}"
    for row in wrong:
        said = row.get("error") or (
            "no answer"
            if row["correct"] is None
            else " ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        )
        yield f"NOT RIGHT {row['case']}: {said}"


def speed(found: dict[str, Any]) -> Iterator[str]:
    yield f"values of the kernel that is timed: {found['values']}"
    for row in found.get("copy", ()):
        yield f"copy {row['bytes_per_second'] / 1e12:.3g} TB/s"
    for row in found.get("products", ()):
        yield (
            f"product {'x'.join(map(str, row['shape']))} forward {row['forward_ms']:.3g} ms, three "
            f"{row['tflops']:.4g} TFLOP/s, {row['padded_ratio']:.2f}x the first"
        )
    for row in found.get("convolutions", ()):
        ours = f", our kernel {row['kernel_ms']:.3g} ms" if "kernel_ms" in row else ""
        yield (
            f"{row['kernel']}x{row['kernel']} on {'x'.join(map(str, row['shape']))} {row['dtype']} to "
            f"{row['result']}, {row['pass']}: XLA's {row['grouped_ms']:.3g} ms, shifted products "
            f"{row['shifted_ms']:.3g} ms{ours}"
        )
    for row in found.get("operator", ()):
        share = f", {row['share_of_copy']:.0%} of the copy" if "share_of_copy" in row else ""
        yield (
            f"propagate {'x'.join(map(str, row['shape']))} groups {row['groups']} chunk {row['chunk']} "
            f"{row['pass']}: {row['ms']:.3g} ms{share}"
        )
    for row in (*found.get("low_rank", ()), *found.get("blocks", ())):
        yield (
            f"{row['what']} {row['pass']}: {row['fused_ms']:.3g} ms, expanded by XLA {row['unfused_ms']:.3g} ms, "
            f"{row['ratio']:.2f}x"
        )
    for row in found.get("attention", ()):
        compared = "no ratio" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        yield (
            f"{row['tokens']} tokens {row['pass']}: {row['ms']:.3g} ms, attention ({row['implementation']}) "
            f"{row['attention_ms']:.3g} ms, {compared}"
        )
    for name, text in found.items():
        if name.endswith("_error"):
            yield f"ERROR in {name.removesuffix('_error')}: {text.strip().splitlines()[-1]}"


COLUMNS = (
    ("train_ms", ".4g", "ms a step"),
    ("evaluation_ms", ".4g", "ms an evaluation"),
    ("images_per_second", ".4g", "images/s"),
    ("sampled_images_per_second", ".4g", "images/s"),
    ("mfu", ".1%", "MFU"),
    ("compile_seconds", ".0f", "s to compile"),
)
"""What is shown of a model."""


def models(found: dict[str, Any]) -> Iterator[str]:
    for model, row in found["results"].items():
        if "error" in row:
            yield f"{model}: {row['error']}"
            continue
        parts = [f"{model} ({row['parameters'] / 1e6:.0f}M, remat {row['remat']}, scans by {row['scans']})"]
        if row["attention"]:
            parts.append(f"attention by {row['attention']}")
        for name, form, unit in COLUMNS:
            if row.get(name) is not None:
                parts.append(f"{row[name]:{form}} {unit}")
        if row.get("peak_bytes"):
            parts.append(f"{row['peak_bytes'] / 1e9:.1f} GB")
        yield ", ".join(parts)
        for name, of in (("train_kernels", "a step"), ("sampler_kernels", "a call of the sampler")):
            if row.get(name):
                kinds = ", ".join(f"{kind} {ms:.4g} ms" for kind, ms in by_kind(row[name]).items())
                yield f"    {of}, by kind: {kinds}"


def run(found: dict[str, Any]) -> Iterator[str]:
    if "steps" in found:
        mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
        yield (
            f"{found['model']} ({found['parameters'] / 1e6:.1f}M): {found['steps']} steps, "
            f"{found['images_seen']:,} images, loss {found['last_loss']:.4g}, "
            f"{found['images_per_second']:.4g} images/s{mfu}"
        )
    if "judge" in found:
        judge = found["judge"]
        yield (
            f"{judge['num_samples']} samples: the class asked for {judge['conditional_accuracy']:.3f} (the "
            f"classifier knows {judge['classifier_accuracy']:.3f} of held-out images), Frechet distance "
            f"{judge['frechet']:.4g} (held-out images {judge['frechet_floor']:.4g})"
        )


LINES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "values": values,
    "speed": speed,
    "training": models,
    "sampling": models,
    "run": run,
}


def outcome(code: str) -> str:
    if code == "0":
        return "ok"
    if code in TIMED_OUT:
        return "OUT OF TIME"
    return f"FAILED ({code})" if code.lstrip("-").isdigit() else f"NOT RUN ({code})"


def table(folder: pathlib.Path, steps: pathlib.Path) -> Iterator[str]:
    """The lines: of each step what became of it, and what its file says."""
    device = None
    for line in steps.read_text().splitlines():
        name, code, seconds, limit = line.split("\t")
        yield f"{name:10} {outcome(code):12} {seconds} s of {limit}"
        path = folder / f"{name}.json"
        if not path.exists():
            if name in LINES:
                yield "    no results"
            continue
        try:
            found = json.loads(path.read_text())
            if found.get("device") and found["device"] != device:
                device = found["device"]
                rehearsed = ", a rehearsal: its times mean nothing" if "cpu" in device else ""
                yield f"    on {device}, jax {found['jax']}, {found['date']}{rehearsed}"
            yield from (f"    {text}" for text in LINES[name](found))
        except (ValueError, KeyError, TypeError) as error:
            yield f"    {path.name} cannot be read: {type(error).__name__} {error}"


def main() -> None:
    folder, steps = map(pathlib.Path, sys.argv[1:3])
    print(*table(folder, steps), sep="\n")
    codes = [line.split("\t")[1] for line in steps.read_text().splitlines()]
    sys.exit(any(code != "0" for code in codes))


if __name__ == "__main__":
    main()
