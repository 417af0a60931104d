"""The sides of `peers.py` in PyTorch: written for it, of the same structure as the published programs they stand for.

facebookresearch/DiT itself is not shipped here. `DiT` has its blocks (adaLN-zero, one linear for q, k and v, PyTorch's
own scaled_dot_product_attention as timm's has it, MLP with tanh GELU), trained eagerly by AdamW with one average of the
weights, as its train.py does. `GSPNTrunk` has the blocks of this project's paper layout around a line loop that is
vectorised over all but the lines. Latents are one .npy file each, as fast-DiT stores them.
"""

import copy
import importlib
import itertools
import math
import pathlib
import sys
import types
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

EMA_DECAY, LEARNING_RATE = 0.9999, 1e-4
FREQUENCIES = 256


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Time(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        half = FREQUENCIES // 2
        self.register_buffer("rate", torch.exp(-math.log(10_000) * torch.arange(half) / half))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * self.rate
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulated(x, shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulated(x, shift2, scale2))


class Denoiser(nn.Module):
    """Patches and condition in, a trunk (called with tokens and condition), prediction out; [B, C, H, W]."""

    def __init__(
        self,
        trunk: nn.Module,
        hidden: int,
        *,
        patch: int = 2,
        channels: int = 4,
        tokens: int = 256,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.embed = nn.Conv2d(channels, hidden, patch, stride=patch)
        self.register_buffer("positions", torch.randn(1, tokens, hidden) * 0.02)
        self.time, self.label = Time(hidden), nn.Embedding(num_classes + 1, hidden)
        self.trunk = trunk
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.final = nn.Linear(hidden, patch * patch * channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        condition = self.time(t) + self.label(y)
        tokens = self.trunk(self.embed(x).flatten(2).transpose(1, 2) + self.positions, condition)
        tokens = self.final(modulated(tokens, *self.modulation(condition).chunk(2, dim=1)))
        tokens = tokens.reshape(-1, rows, columns, self.patch, self.patch, self.channels)
        return torch.einsum("nhwpqc->nchpwq", tokens).reshape(x.shape)


class DiTTrunk(nn.Module):
    def __init__(self, hidden: int, depth: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(hidden, heads) for _ in range(depth))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


class LineLoop(nn.Module):
    """Four scans with weights from a proxy; chunks of lines run side by side. [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, hidden: int, proxy: int, chunk: int | None):
        super().__init__()
        self.chunk = chunk
        self.proxy = nn.Linear(hidden, proxy)
        self.gates = nn.Linear(proxy, 12 * hidden, bias=False)
        self.scale, self.out_gate = nn.Linear(proxy, 4 * hidden, bias=False), nn.Linear(proxy, 4 * hidden, bias=False)
        self.merge = nn.Parameter(torch.full((4,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        proxy = self.proxy(x)
        gates = self.gates(proxy).unflatten(-1, (4, 3, -1))
        scale, out_gate = (1 + linear(proxy).unflatten(-1, (4, -1)) for linear in (self.scale, self.out_gate))
        y = 0
        for k in range(4):
            h = self.scan(self.turn(scale[..., k, :] * x, k), self.turn(gates[..., k, :, :], k))
            y = y + self.merge[k] * out_gate[..., k, :] * self.turn_back(h, k)
        return y

    def turn(self, a: torch.Tensor, k: int) -> torch.Tensor:
        a = a if k < 2 else a.transpose(1, 2)
        return a.flip(1) if k % 2 else a

    def turn_back(self, a: torch.Tensor, k: int) -> torch.Tensor:
        a = a.flip(1) if k % 2 else a
        return a if k < 2 else a.transpose(1, 2)

    def scan(self, drive: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """drive [B, lines, positions, C], gates [B, lines, positions, 3, C]."""
        exists = drive.new_ones(drive.shape[2], 3, 1)
        exists[0, 0] = exists[-1, 2] = 0
        weights = torch.sigmoid(gates) * exists
        weights = weights / weights.sum(-2, keepdim=True)
        steps = self.chunk or drive.shape[1]
        drive, weights = (a.unflatten(1, (-1, steps)) for a in (drive, weights))
        lines = []
        for line, weight in zip(drive.unbind(2), weights.unbind(2), strict=True):
            if lines:
                before = F.pad(lines[-1], (0, 0, 1, 1))
                left, center, right = weight.unbind(-2)
                line = line + left * before[:, :, :-2] + center * lines[-1] + right * before[:, :, 2:]
            lines.append(line)
        return torch.stack(lines, 2).flatten(1, 2)


class GSPNBlock(nn.Module):
    def __init__(self, hidden: int, chunk: int | None, long_skip: bool, proxy_ratio: int = 16):
        super().__init__()
        self.join = nn.Linear(2 * hidden, hidden) if long_skip else None
        self.in_proj, self.mixer_out, self.out_proj = (nn.Linear(hidden, hidden) for _ in range(3))
        self.conv7 = nn.Conv2d(hidden, hidden, 7, padding=3, groups=hidden, bias=False)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.lines = LineLoop(hidden, hidden // proxy_ratio, chunk)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, skip], -1))
        y = self.in_proj(F.layer_norm(x, x.shape[-1:], eps=1e-6))
        y = self.mixer_out(self.lines(self.convolved(self.conv7, y)))
        y = self.convolved(self.conv3, y)
        return x + self.out_proj(y * F.relu(y))

    def convolved(self, conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last, as it lies


class GSPNTrunk(nn.Module):
    def __init__(self, hidden: int, depth: int):
        super().__init__()
        half = depth // 2
        chunks = [2] * (depth - 1) + [None, None]
        self.blocks = nn.ModuleList(GSPNBlock(hidden, chunk, i > half) for i, chunk in enumerate(chunks))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        x = (x + condition.unsqueeze(1)).unflatten(1, (side, side))
        kept: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, kept.pop() if block.join is not None else None)
            if block.join is None and len(kept) < len(self.blocks) // 2:
                kept.append(x)
        return x.flatten(1, 2)


def trainer(model: nn.Module, batch_size: int, size: int = 32, channels: int = 4) -> Callable[[], None]:
    """One step of flow matching: loss, backward, AdamW, average of the weights."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    images, labels = torch.randn(batch_size, channels, size, size), torch.randint(1000, (batch_size,))

    def step() -> None:
        noise, t = torch.randn_like(images), torch.rand(batch_size)
        mixed = torch.lerp(images, noise, t[:, None, None, None])
        loss = F.mse_loss(model(mixed, 1000 * t, labels), noise - images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.mul_(EMA_DECAY).add_(new, alpha=1 - EMA_DECAY)
        loss.item()

    return step


def train_dit(hidden: int, depth: int, heads: int, batch_size: int) -> Callable[[], None]:
    torch.manual_seed(0)
    return trainer(Denoiser(DiTTrunk(hidden, depth, heads), hidden), batch_size)


def train_gspn(hidden: int, depth: int, batch_size: int) -> Callable[[], None]:
    torch.manual_seed(0)
    return trainer(Denoiser(GSPNTrunk(hidden, depth), hidden), batch_size)


def sample_dit(hidden: int, depth: int, heads: int, batch_size: int, steps: int) -> Callable[[], None]:
    """Euler steps of the flow, without guidance."""
    torch.manual_seed(0)
    model = Denoiser(DiTTrunk(hidden, depth, heads), hidden).eval()
    labels = torch.randint(1000, (batch_size,))

    @torch.no_grad()
    def draw() -> np.ndarray:
        x = torch.randn(batch_size, 4, 32, 32)
        times = torch.linspace(1, 0, steps + 1)
        for now, then in itertools.pairwise(times):
            x = x + (then - now) * model(x, now.expand(batch_size) * 1000, labels)
        return x.numpy()

    return draw


def torch_fidelity(name: str):
    """The module `name` of torch-fidelity. It imports torchvision, of which these metrics use nothing and whose builds
    do not load beside every PyTorch: an empty one takes its place."""

    def module(name: str, **contents) -> types.ModuleType:
        stub = sys.modules[name] = types.ModuleType(name)
        vars(stub).update(contents)
        return stub

    transforms = module("torchvision.transforms", functional=module("torchvision.transforms.functional"))
    datasets = module("torchvision.datasets", CIFAR10=object, CIFAR100=object, STL10=object)
    module("torchvision", transforms=transforms, datasets=datasets)
    return importlib.import_module(f"torch_fidelity.{name}")


def precision_recall(rows: int, size: int) -> Callable[[], tuple[float, float]]:
    """torch-fidelity's, whose distances are float32."""
    module = torch_fidelity("metric_prc")
    arguments = [torch.from_numpy(_features(rows, size, seed)) for seed in (0, 1)]
    return lambda: module.calculate_precision_recall_full(*arguments)


def fid_moments(rows: int, size: int, batch_size: int) -> Callable[[], dict[str, np.ndarray]]:
    """torch-fidelity's: of all features at once, after the last batch."""
    module = torch_fidelity("metric_fid")
    batches = torch.from_numpy(_features(rows, size, 0)).split(batch_size)
    return lambda: module.fid_features_to_statistics(torch.cat(batches))


def fid_distance(rows: int, size: int) -> Callable[[], float]:
    """torch-fidelity's, of two Gaussians that are there."""
    module = torch_fidelity("metric_fid")
    statistics = [module.fid_features_to_statistics(torch.from_numpy(_features(rows, size, seed))) for seed in (0, 1)]
    return lambda: module.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]


def _features(rows: int, size: int, seed: int) -> np.ndarray:
    """As large as Inception's."""
    return (0.5 * np.abs(np.random.default_rng(seed).standard_normal((rows, size)))).astype(np.float32)


class Folder(torch.utils.data.Dataset):
    """Images of a folder of classes, cropped as ADM and DiT do, flipped at random."""

    def __init__(self, folder: str, size: int):
        self.size, self.files = size, sorted(pathlib.Path(folder).glob("*/*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self.files[index]
        image = Image.open(file).convert("RGB")
        while min(image.size) >= 2 * self.size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        array = np.array(image)[top : top + self.size, left : left + self.size]
        if torch.rand(()) < 0.5:
            array = array[:, ::-1].copy()
        return torch.from_numpy(array), self.classes.index(file.parent.name)


class Latents(torch.utils.data.Dataset):
    """One file of moments or latents an image."""

    def __init__(self, folder: str):
        self.files = sorted(pathlib.Path(folder).glob("*.npy"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.load(self.files[index]).astype(np.float32)), 0


def image_folder(size: int, batch_size: int, batches: int, workers: int, folder: str) -> Callable[[], None]:
    return _reader(Folder(folder, size), batch_size, batches, workers)


def latents(batch_size: int, batches: int, folder: str) -> Callable[[], None]:
    return _reader(Latents(f"{folder}/torch"), batch_size, batches, 2)


def _reader(dataset: torch.utils.data.Dataset, batch_size: int, batches: int, workers: int) -> Callable[[], None]:
    """Without end, so that no call waits for workers to start."""
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**7)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers))

    def call() -> None:
        for _, labels in itertools.islice(loader, batches):
            assert len(labels) == batch_size

    return call
