"""Inception-v3 of 2015 in PyTorch, float64, written apart from the JAX one: layer by layer as pytorch-fid names them.

Each mistake that other implementations make can be switched on by its name, for the tests to catch.
"""

import numpy as np
import torch
import torch.nn.functional as F

MISTAKES = (
    "half-pixel resize",
    "divided by 127.5",
    "bfloat16 convolutions",
    "TF32 convolutions",
    "padding counted",
    "average in 7c",
    "no resize",
    "logits with bias",
    "spatial in NCHW order",
    "spatial before ReLU",
    "spatial of 6c",
    "epsilon of 1e-5",
)


def resize(images: np.ndarray, *, half_pixel: bool = False) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float64 [N, 299, 299, 3], a loop over rows and columns."""

    def along(x: np.ndarray, axis: int) -> np.ndarray:
        size, lines = x.shape[axis], []
        for i in range(299):
            at = (i + 0.5) * size / 299 - 0.5 if half_pixel else i * size / 299
            at = min(max(at, 0.0), size - 1)
            low = int(at)
            high = min(low + 1, size - 1)
            lines.append((1 - (at - low)) * x.take(low, axis) + (at - low) * x.take(high, axis))
        return np.stack(lines, axis)

    return along(along(images.astype(np.float64), 1), 2)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits behind the leading one, as the tensor cores of NVIDIA GPUs do with float32."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def features(weights: dict[str, np.ndarray], images: np.ndarray, mistake: str | None = None) -> dict[str, np.ndarray]:
    """{"pool", "spatial", "logits"} of uint8 images [N, H, W, 3]."""
    assert mistake is None or mistake in MISTAKES
    w = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
    epsilon = 1e-5 if mistake == "epsilon of 1e-5" else 1e-3

    def conv(name: str, x: torch.Tensor, stride: int = 1, padding: tuple[int, int] | int = 0, relu: bool = True):
        kernel = w[f"{name}.conv.weight"]
        if mistake == "bfloat16 convolutions":
            x, kernel = x.to(torch.bfloat16).double(), kernel.to(torch.bfloat16).double()
        if mistake == "TF32 convolutions":
            x, kernel = to_tf32(x), to_tf32(kernel)
        y = F.conv2d(x, kernel, stride=stride, padding=padding)
        y = F.batch_norm(
            y,
            w[f"{name}.bn.running_mean"],
            w[f"{name}.bn.running_var"],
            w[f"{name}.bn.weight"],
            w[f"{name}.bn.bias"],
            eps=epsilon,
        )
        return F.relu(y) if relu else y

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=mistake == "padding counted")

    def inception_a(b, x):
        five = conv(f"{b}.branch5x5_2", conv(f"{b}.branch5x5_1", x), padding=2)
        three = conv(f"{b}.branch3x3dbl_1", x)
        three = conv(f"{b}.branch3x3dbl_2", three, padding=1)
        three = conv(f"{b}.branch3x3dbl_3", three, padding=1)
        return torch.cat([conv(f"{b}.branch1x1", x), five, three, conv(f"{b}.branch_pool", average(x))], 1)

    def inception_b(b, x):
        three = conv(f"{b}.branch3x3dbl_1", x)
        three = conv(f"{b}.branch3x3dbl_2", three, padding=1)
        three = conv(f"{b}.branch3x3dbl_3", three, stride=2)
        return torch.cat([conv(f"{b}.branch3x3", x, stride=2), three, F.max_pool2d(x, 3, 2)], 1)

    def inception_c(b, x):
        seven = conv(f"{b}.branch7x7_1", x)
        seven = conv(f"{b}.branch7x7_2", seven, padding=(0, 3))
        seven = conv(f"{b}.branch7x7_3", seven, padding=(3, 0))
        double = conv(f"{b}.branch7x7dbl_1", x)
        for number, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = conv(f"{b}.branch7x7dbl_{number}", double, padding=padding)
        return torch.cat([conv(f"{b}.branch1x1", x), seven, double, conv(f"{b}.branch_pool", average(x))], 1)

    def inception_d(b, x):
        three = conv(f"{b}.branch3x3_2", conv(f"{b}.branch3x3_1", x), stride=2)
        seven = conv(f"{b}.branch7x7x3_1", x)
        seven = conv(f"{b}.branch7x7x3_2", seven, padding=(0, 3))
        seven = conv(f"{b}.branch7x7x3_3", seven, padding=(3, 0))
        seven = conv(f"{b}.branch7x7x3_4", seven, stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def inception_e(b, x, pool):
        three = conv(f"{b}.branch3x3_1", x)
        three = [conv(f"{b}.branch3x3_2a", three, padding=(0, 1)), conv(f"{b}.branch3x3_2b", three, padding=(1, 0))]
        double = conv(f"{b}.branch3x3dbl_2", conv(f"{b}.branch3x3dbl_1", x), padding=1)
        double = [
            conv(f"{b}.branch3x3dbl_3a", double, padding=(0, 1)),
            conv(f"{b}.branch3x3dbl_3b", double, padding=(1, 0)),
        ]
        return torch.cat([conv(f"{b}.branch1x1", x), *three, *double, conv(f"{b}.branch_pool", pool(x))], 1)

    with torch.no_grad():
        x = (
            images.astype(np.float64)
            if mistake == "no resize"
            else resize(images, half_pixel=mistake == "half-pixel resize")
        )
        x = torch.tensor((x / 127.5 - 1) if mistake == "divided by 127.5" else (x - 128) / 128).permute(0, 3, 1, 2)
        x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, stride=2))
        x = F.max_pool2d(conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
        x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
        x = inception_a("Mixed_5d", inception_a("Mixed_5c", inception_a("Mixed_5b", x)))
        b = inception_b("Mixed_6a", x)
        c = inception_c("Mixed_6c", inception_c("Mixed_6b", b))
        d = inception_c("Mixed_6d", c)
        spatial = {
            "spatial of 6c": conv("Mixed_6c.branch1x1", inception_c("Mixed_6b", b)),
            "spatial before ReLU": conv("Mixed_6d.branch1x1", c, relu=False),
        }.get(mistake, conv("Mixed_6d.branch1x1", c))[:, :7]
        if mistake != "spatial in NCHW order":
            spatial = spatial.permute(0, 2, 3, 1)
        x = inception_d("Mixed_7a", inception_c("Mixed_6e", d))
        x = inception_e("Mixed_7b", x, average)
        x = inception_e("Mixed_7c", x, average if mistake == "average in 7c" else lambda x: F.max_pool2d(x, 3, 1, 1))
        pool = x.mean((2, 3))
        logits = pool @ w["fc.weight"].T
        if mistake == "logits with bias":
            logits = logits + w["fc.bias"]
    return {"pool": pool.numpy(), "spatial": spatial.reshape(len(images), -1).numpy(), "logits": logits.numpy()}
