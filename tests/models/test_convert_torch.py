"""The same with PyTorch itself: a DiT module with the original's names, saved and loaded."""

import argparse
import math

import numpy as np
import pytest

from gspn_jax.models.convert import dit_from_torch, dit_to_torch
from gspn_jax.state_dict import read_state_dict
from tests.models.model_cases import DIT, make_config, random_inputs, relative_error, run
from tests.models.numpy_dit import positions

pytestmark = pytest.mark.torch
CONFIG = make_config(DIT)
TOLERANCE = 1e-4  # largest error over the largest output, both float32


def torch_dit(hidden=16, depth=2, heads=2, patch=2, channels=3, out_channels=6, num_classes=5, grid=4):
    import torch
    from torch import nn
    from torch.nn import functional as F

    def modulated(x, shift, scale):
        return F.layer_norm(x, (hidden,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

        def forward(self, t):
            angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)[None]
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, hidden // heads)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Heads(), Mlp()
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

        def forward(self, x, c):
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
            x = x + gate1.unsqueeze(1) * self.attn(modulated(x, shift1, scale1))
            return x + gate2.unsqueeze(1) * self.mlp(modulated(x, shift2, scale2))

    class Final(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(hidden, patch * patch * out_channels)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

        def forward(self, x, c):
            return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, dim=1)))

    class DiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.x_embedder, self.y_embedder = nn.Module(), nn.Module()
            self.x_embedder.proj = nn.Conv2d(channels, hidden, patch, stride=patch)
            self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, hidden)
            self.pos_embed = nn.Parameter(torch.tensor(positions(grid, grid, hidden)[None], dtype=torch.float32))
            self.t_embedder, self.final_layer = Time(), Final()
            self.blocks = nn.ModuleList(Block() for _ in range(depth))

        def forward(self, x, t, y):
            rows, columns = x.shape[2] // patch, x.shape[3] // patch
            tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
            c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
            for block in self.blocks:
                tokens = block(tokens, c)
            tokens = self.final_layer(tokens, c).reshape(-1, rows, columns, patch, patch, out_channels)
            return torch.einsum("nhwpqc->nchpwq", tokens).reshape(-1, out_channels, *x.shape[2:])

    torch.manual_seed(0)
    return DiT().eval()


@pytest.fixture(scope="module")
def original():
    import torch

    model = torch_dit()
    x, t, y = random_inputs(3, 8, 8)
    with torch.no_grad():
        truth = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(y.astype(np.int64)))
    return model, (x, t, y), truth.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["plain", "checkpoint", "safetensors"])
def test_output_is_that_of_the_torch_module(tmp_path, original, kind):
    import torch
    from safetensors.torch import save_file

    model, inputs, truth = original
    path = tmp_path / ("dit.safetensors" if kind == "safetensors" else "dit.pt")
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "plain":
        torch.save(model.state_dict(), path)
    else:  # as a training run saves it
        other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        torch.save({"model": other, "ema": model.state_dict(), "args": argparse.Namespace(lr=1e-4)}, path)
    found = run(CONFIG, dit_from_torch(read_state_dict(path), CONFIG), *inputs)
    assert relative_error(found, truth) < TOLERANCE


def test_the_way_back_loads_into_the_torch_module(original):
    import torch

    model, _, _ = original
    state_dict = {name: value.numpy() for name, value in model.state_dict().items()}
    back = dit_to_torch(dit_from_torch(state_dict, CONFIG), CONFIG)
    torch_dit().load_state_dict({name: torch.tensor(value) for name, value in back.items()}, strict=True)


def test_files_without_tensors_are_named(tmp_path):
    import torch

    torch.save({"model": 3}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd.pt must hold a state_dict"):
        read_state_dict(tmp_path / "odd.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text.pt must be a PyTorch file of tensors, it cannot be read"):
        read_state_dict(tmp_path / "text.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.pt must be a PyTorch file of tensors, it cannot be read"):
        read_state_dict(tmp_path / "empty.pt")
