"""docs/performance.md, from the results of benchmarks/gpu_compile.py."""

import json
import pathlib
from typing import Any

TEMPLATE = """# The GPU programs, compiled and not run

What XLA makes of the training step and of the sampler for NVIDIA GPUs, on a machine that has none
(`make gpu-compile`; [numbers](../benchmarks/results/gpu_compile.json); {versions}; {dates}). **No time here was
measured.** They are bounds: a kernel takes at least as long as its bytes at 85 % of the memory bandwidth (3.35 TB/s on
H100, 4.8 on H200), and a product at least as long as its operations at 700 TFLOP/s. Launches, the latency of the scans'
lines and slow kernels are left out. Nothing is tuned: products are cuBLAS's, where a GPU picks the fastest of several.
The page says what programs ask of the memory, not how fast the kernels in them are: one H100 took 1.3 times the bound
of GSPN-XL/2's step ([performance_gpu.md](performance_gpu.md)).

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
the last layer.

| kind of work | {columns} |
|---|{rule}|
{kinds}

## Image classification
GSPN-T, S and B on images of 224 pixels ([classification.md](classification.md)); bfloat16 computation, a step with
erasing, mixing, AdamW and one average, inference up to the class. Bounds as above.

| program | batch | remat | H100 ms | H200 ms | images/s, at most (H200) | state or weights GB | temporary GB |
|---|---|---|---|---|---|---|---|
{classifiers}

Where the time goes, ms on one H200; "outside of blocks" has stem, downsampling, head, augmentation and AdamW.

| kind of work | {classifier_columns} |
|---|{classifier_rule}|
{classifier_kinds}

## For an RTX 4090
Bounds by 1.008 TB/s, of which 85 % as above, and a peak of 165 TFLOP/s; an RTX 4090 has 24 GiB.

| program | batch | remat | ms | images/s, at most | state GB | temporary GB |
|---|---|---|---|---|---|---|
{rtx4090}

{rtx4090_before}
## What GPUs send one another
By the compiled programs of 8 GPUs; GB sent by one of them in a step, by a ring. The bounds above have their bytes in
memory, not their way over the links. An asynchronous exchange costs only what it takes longer than the kernels that are
scheduled beside it, and the last column bounds these. Options of XLA that schedule otherwise were not tried.

| preset | data x fsdp | batch | remat | kind | a step | GB sent | of which asynchronous | kernels beside them, ms |
|---|---|---|---|---|---|---|---|---|
{exchanged}

{history}"""

HISTORY = """## What was changed by it
One step of GSPN-XL/2 with 64 images, whole programs compiled one after the other (2026-11-26 and 27, JAX 0.12.0.1).
Each row has what is in the rows above it.

| | H100 ms | H200 ms | temporary GB |
|---|---|---|---|
| as it was, `remat full` | 309.8 | 243.4 | 10.4 |
| convolutions in bfloat16, `remat names`, padded widths, tokens row by row between blocks | 249.3 | 196.7 | 34.8 |
| no mask in the layer norm, weights cast for all blocks at once, long skips as they are read | 238.5 | 189.1 | 33.9 |
| the join as two products | 236.8 | 188.0 | 33.9 |
| a barrier between their gradients | 233.0 | 185.3 | 33.8 |
| the gradient of long skips read where it is | 232.4 | 184.9 | 33.8 |
| kernels of our own for `chunk=2` and for depthwise convolutions | 210.1 | 169.3 | 21.7 |
| the blocks of every chunk go back by XLA's terms (0.75 ms), factors get their sums once | 211.0 | 170.0 | 21.9 |
| no loop over blocks (`gspn_jax.models.stack`) | 185.4 | 152.1 | 20.0 |
| the layer norm's derivative by its result | 182.3 | 150.0 | 20.0 |
| the 3x3 convolution kept, the layer norm's sums in one pass | 179.8 | 148.2 | 22.8 |
| the gradients of the 3x3 convolution in one launch | 175.8 | 145.4 | 22.8 |
| proxies of every chunk expanded in registers, both ways | 174.0 | 144.2 | 21.8 |

These count bytes. The instructions of our kernels (docs/kernel.md), one a clock and scheduler at 1.7 GHz, take longer
than their bytes on an H200 in three places: `chunk=2` forward 111 us in place of 27, the 7x7 convolution 142 in place
of 74 for its three passes, and the gradients of the 3x3 39 in place of 37; in the two blocks of every chunk reads of
shared memory do, 500 us in place of 70 forward and 500 in place of 330 backward. That would add 9.8 ms to the step: 154
ms.
(Counted in the same way, it was 128 and 165, and 230 in place of 212 for `chunk=2` backward, before instructions were
saved: 162 of 150.0.)

An evaluation of GSPN-L/2 with 64 images: 47.1 ms on H100 and 37.5 on H200 as it was; 35.9 and 29.7 with convolutions in
bfloat16, proxies of 75 computed as 96 and tokens row by row; 34.8 and 28.9 with weights cast once for all evaluations
and the join as two products; 33.5 and 28.0 with long skips and weights read where they are; 25.8 and 22.6 with the two
kernels; 25.5 and 22.5 with proxies of every chunk expanded in registers.

- **No loop over blocks**: a loop stacks what the backward pass needs, in arrays that it first fills with zeros, and
  takes it out again, 14 ms a step. Without one each value stays where it was computed, and norms join what is before
  them. All blocks of one chunk are one function, traced and lowered once: GSPN-XL/2's step took 26 s to lower and 86 to
  compile on two cores (with loops 136 and 85 s, under another load); GSPN-S's 871 s at a load of 8 (320). Gradients of
  weights are put side by side at the end, and over fsdp gathers and sums have the kernels of other blocks beside them
  (below). What `remat` computes again must be kept apart from what was computed before by barriers, and gradients of a
  block go on together: where they are sent to other devices XLA made those of weights late, and kept what they are
  made of for all blocks, 34.2 GB of temporary memory over 8 GPUs in place of 10.8. Samplers keep their loop over
  blocks: without it GSPN-L/2 would take 21.7 ms in place of 22.6 and DiT-XL/2 27.3 in place of 26.2, whose products
  then get their weights in copies and their biases by kernels of their own.
- **The layer norm's derivative**: with y the result, s one over the deviation, x gets s (g - mean(g) - y mean(g y)),
  two sums in one pass where the operations' own derivative makes three in two; `remat names` keeps mean and s.
  Beside a derivative the sums of x and of its squares are made in one pass over x, too, of differences from the first
  channel so that nothing cancels: 3.7 of 88 ms of a DiT-B/2 with GSPN at 4,096 tokens. Alone, in samplers, XLA makes
  one kernel of both passes, and one pass would take 0.9 ms of 20 more.
- **Convolutions**: one that widens bfloat16 to float32 has XLA:GPU read its arguments in float32 as well.
- **Named values** (`gspn_jax.models.remat`): products after their bias, the convolutions, the result and the states of
  the scans. The kernel writes its states to where they are kept, without a copy.
- **Weights cast for all blocks at once**, not block by block in each pass; their gradients are kept in the type of the
  products, bfloat16.
- **Widths** (`gspn_jax.models.width`): cuBLAS copies a matrix whose rows are no multiple of 16 bytes. 1500 channels are
  computed as 1536 and proxies of 93 as 96; the cast pads them, nothing is stored so. A mask in the layer norm would be
  kept, as large as the tokens and in float32, and read by each norm: the sums are corrected instead.
- **The join**: cuBLAS adds the second product to the first. Without a barrier XLA computes the gradients of both as one
  product, and puts their arguments together for it.

At 512 pixels (latents of 64x64, 64 images, one H200) an evaluation takes at least 93 ms with GSPN-L/2 (106 before
`chunk=2` took maps in pieces), 92 with `groups=1`, and 110.5 with DiT-XL/2 by its bytes, 119 by the operations of its
attention: 1.2 to 1.3 times. Products alone are 65 ms of GSPN-L/2's, so that 1.5 times is out of reach.

Left out:
- The 7x7 convolution computed again and not kept: 0.7 ms less by its bytes, but it is not as fast as the memory.
- 1504 channels in place of 1536: 2 % fewer bytes in the bound, but rows that are no whole lines of 128 bytes.
"""


RTX_4090 = """Until 2026-11-27 XLA expanded all proxies there. The same step, compiled on that day before and after:

| kind of work | ms, before | ms | GB, before | GB |
|---|---|---|---|---|
| products | 152.8 | 110.9 | 84.0 | 48.1 |
| outside of blocks | 71.1 | 47.2 | 60.9 | 40.4 |
| scans | 62.4 | 17.4 | 53.4 | 14.9 |
| around scans | 39.2 | 13.2 | 33.6 | 11.3 |
| convolutions | 9.9 | 9.9 | 8.5 | 8.5 |
| elementwise | 8.8 | 9.0 | 7.5 | 7.7 |
| others | 4.8 | 4.8 | 4.1 | 4.1 |
| **all** | **348.9** | **212.4** | **252.0** | **135.0** |

Temporary memory was 9.52 GB, more than XLA gives a program of this GPU: it computed some values again, 20 GB of those
"outside of blocks" (padded weights, copies). Products on chip are not among the operations.
"""


def write(results: pathlib.Path, page: pathlib.Path) -> None:
    """Writes the page from a file of results."""
    page.write_text(render(list(json.loads(results.read_text()).values())))


def render(results: list[dict[str, Any]]) -> str:
    """The page: one GPU before eight, the largest models and batches first."""
    results = sorted(
        results,
        key=lambda result: (
            result["mesh"] != "1x1",
            result["mesh"],
            result["preset"].startswith("DiT"),
            -result["arguments_gb"],
            result["preset"],
            -result["batch"],
            result["remat"] == "full",
        ),
    )
    rtx4090 = [result for result in results if result["gpu"] == "rtx4090"]
    classifiers = [result for result in results if "/" not in result["preset"]]
    results = [result for result in results if result not in classifiers + rtx4090]
    steps = [result for result in results if result["what"] == "step"]
    samplers = [result for result in results if result["what"] == "sampler"]
    shown = [result for result in results if result["mesh"] == "1x1" and result["batch"] == 64]
    dates = sorted({result["date"] for result in results})
    values = {
        "versions": ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items()),
        "dates": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "steps": "\n".join(map(_step, steps)),
        "samplers": "\n".join(map(_sampler, samplers)),
        "columns": _columns(shown),
        "rule": "|".join("---" for _ in shown),
        "kinds": "\n".join(_kinds(shown)),
        "classifiers": "\n".join(map(_classifier, classifiers)),
        "classifier_columns": _columns(classifiers),
        "classifier_rule": "|".join("---" for _ in classifiers),
        "classifier_kinds": "\n".join(_kinds(classifiers)),
        "rtx4090": "\n".join(map(_rtx4090, rtx4090)),
        "rtx4090_before": RTX_4090,
        "exchanged": "\n".join(row for result in steps for row in _exchanged(result)),
        "history": HISTORY,
    }
    text = TEMPLATE
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def _bounds(result: dict[str, Any]) -> str:
    """End of a row: milliseconds on H100 and H200, images/s on the latter, GB of arguments and temporary memory."""
    ms = result["ms"]
    return (
        f"| {ms['h100']:.1f} | {ms['h200']:.1f} | {1e3 * result['batch'] / ms['h200']:,.0f} | "
        f"{result['arguments_gb']:.2f} | {result['temporary_gb']:.1f} |"
    )


def _step(result: dict[str, Any]) -> str:
    mesh = result["mesh"].replace("x", " x ")
    return f"| {result['preset']} | {mesh} | {result['batch']} | {result['remat']} {_bounds(result)}"


def _sampler(result: dict[str, Any]) -> str:
    return f"| {result['preset']} | {result['batch']} {_bounds(result)}"


def _classifier(result: dict[str, Any]) -> str:
    remat = result["remat"] if result["what"] == "step" else ""
    return f"| {result['what']}, {result['preset']} | {result['batch']} | {remat} {_bounds(result)}"


def _rtx4090(result: dict[str, Any]) -> str:
    ms = result["ms"]["rtx4090"]
    return (
        f"| {result['what']}, {result['preset']} | {result['batch']} | {result['remat']} | {ms:.1f} | "
        f"{1e3 * result['batch'] / ms:,.0f} | {result['arguments_gb']:.2f} | {result['temporary_gb']:.2f} |"
    )


def _columns(shown: list[dict[str, Any]]) -> str:
    return " | ".join(f"{result['what']}, {result['preset']}" for result in shown)


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
        rows.append(
            f"| {result['preset']} | {result['mesh'].replace('x', ' x ')} | {result['batch']} | "
            f"{result['remat']} | {kind} | {sent['count']:,} | {sent['gigabytes_sent']:.2f} | {share:.0%} | "
            f"{beside:.1f} |"
        )
    return rows
