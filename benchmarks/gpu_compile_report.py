"""docs/performance.md, from the results of benchmarks/gpu_compile.py."""

import json
import pathlib
from typing import Any

TEMPLATE = """# The GPU programs, compiled and not run

What XLA makes of the training step and of the sampler for NVIDIA GPUs, on a machine that has none
(`make gpu-compile`; [numbers](../benchmarks/results/gpu_compile.json); {versions}; {dates}). **No time here was
measured.** They are bounds: a kernel takes at least as long as its bytes at 85 % of the memory bandwidth (3.35 TB/s on
H100, 4.8 on H200), and a product at least as long as its operations at 700 TFLOP/s. Launches, the latency of the scans'
lines and slow convolutions are left out. Nothing is tuned: products are cuBLAS's, convolutions cuDNN's, where a GPU
picks the fastest of several. The page says what programs ask of the memory, not how fast the kernels in them are.

Latents of 32x32x4, bfloat16 computation, float32 state, one average. GB are 1e9 bytes of one device: the state, and
beside it the temporary memory of the compiled program.

## Training steps
| preset | GPUs (data x fsdp) | batch | remat | H100 ms | H200 ms | images/s, at most (H200) | state GB | temporary GB |
|---|---|---|---|---|---|---|---|---|
{steps}

## Evaluations of the sampler
The whole loop of the config's sampler, without guidance, divided by its evaluations.

| preset | batch | H100 ms | H200 ms | images x evaluations/s, at most (H200) | weights GB | temporary GB |
|---|---|---|---|---|---|---|
{samplers}

## Where the time goes
Bounds on one H200 in ms of a step, or of an evaluation. "Outside of blocks" is AdamW and the averages, embeddings and
the last layer; "zero-filling" is of the stacks that JAX's loops write their saved values to.

| kind of work | {columns} |
|---|{rule}|
{kinds}

## What GPUs send one another
By the compiled programs of 8 GPUs; GB sent by one of them in a step, by a ring. "Hidden" is the share of the exchanges,
by their bytes, that are asynchronous; what runs beside them is bounded in the last column.

| preset | data x fsdp | batch | remat | kind | a step | GB sent | of which asynchronous | kernels beside them, ms |
|---|---|---|---|---|---|---|---|---|
{exchanged}

{history}"""

HISTORY = """## What was changed by it
"""


def write(results: pathlib.Path, page: pathlib.Path) -> None:
    """Writes the page from a file of results."""
    page.write_text(render(list(json.loads(results.read_text()).values())))


def render(results: list[dict[str, Any]]) -> str:
    """The page."""
    steps = [result for result in results if result["what"] == "step"]
    samplers = [result for result in results if result["what"] == "sampler"]
    shown = [result for result in results if result["mesh"] == "1x1" and result["batch"] == 64]
    dates = sorted({result["date"] for result in results})
    values = {
        "versions": ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items()),
        "dates": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "steps": "\n".join(map(_step, steps)), "samplers": "\n".join(map(_sampler, samplers)),
        "columns": " | ".join(f"{result['what']}, {result['preset']}" for result in shown),
        "rule": "|".join("---" for _ in shown), "kinds": "\n".join(_kinds(shown)),
        "exchanged": "\n".join(row for result in steps for row in _exchanged(result)),
        "history": HISTORY,
    }
    text = TEMPLATE
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def _step(result: dict[str, Any]) -> str:
    ms = result["ms"]
    return (f"| {result['preset']} | {result['mesh'].replace('x', ' x ')} | {result['batch']} | {result['remat']} | "
            f"{ms['h100']:.1f} | {ms['h200']:.1f} | {1e3 * result['batch'] / ms['h200']:,.0f} | "
            f"{result['arguments_gb']:.2f} | {result['temporary_gb']:.1f} |")


def _sampler(result: dict[str, Any]) -> str:
    ms = result["ms"]
    return (f"| {result['preset']} | {result['batch']} | {ms['h100']:.1f} | {ms['h200']:.1f} | "
            f"{1e3 * result['batch'] / ms['h200']:,.0f} | {result['arguments_gb']:.2f} | "
            f"{result['temporary_gb']:.1f} |")


def _kinds(shown: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(kind for result in shown for kind in result["kinds"])

    def cell(result: dict[str, Any], kind: str) -> str:
        row = result["kinds"].get(kind)
        return f"{row['ms']:.2f}" if row else ""

    rows = [f"| {kind} | " + " | ".join(cell(result, kind) for result in shown) + " |" for kind in names]
    totals = " | ".join(f"**{result['ms'][result['gpu']]:.1f}**" for result in shown)
    return [*rows, f"| **all** | {totals} |"]


def _exchanged(result: dict[str, Any]) -> list[str]:
    rows = []
    for kind, sent in result["sent"].items():
        found = [row for row in result["exchanges"] if row["kind"] == kind]
        size = sum(row["times"] * row["megabytes"] for row in found)
        hidden = [row for row in found if row["asynchronous"]]
        share = sum(row["times"] * row["megabytes"] for row in hidden) / size if size else 0
        beside = sum(row["times"] * row["overlapped_us"] for row in hidden) / 1e3
        rows.append(f"| {result['preset']} | {result['mesh'].replace('x', ' x ')} | {result['batch']} | "
                    f"{result['remat']} | {kind} | {sent['count']:,} | {sent['gigabytes_sent']:.2f} | {share:.0%} | "
                    f"{beside:.1f} |")
    return rows
