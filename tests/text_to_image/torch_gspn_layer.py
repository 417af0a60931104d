"""A GSPN layer of a U-Net again, in PyTorch after its definition: a loop over the lines of each direction."""

import torch


class Layer(torch.nn.Module):
    """In the place of an attention of diffusers; `values` are the parameters of the layer by part, to be derived by,
    and `sizes` the height and width of a map by its number of tokens."""

    def __init__(self, values, form, chunk, sizes):
        super().__init__()
        self.values, self.form, self.chunk, self.sizes = values, form, chunk, sizes

    def forward(self, hidden_states, **_):
        height, width = self.sizes[hidden_states.shape[1]]
        x = hidden_states.reshape(len(hidden_states), height, width, -1)
        return layer(self.values, self.form, x, self.chunk).reshape(hidden_states.shape)


def layer(p, form, x, chunk):
    """Tokens [B, H, W, D] to tokens."""
    seen = {name: x if form == "pure" else x + x @ p[f"{name}.weight"] for name in ("to_q", "to_k", "to_v")}
    proxy = {name: tokens @ p["proxy.weight"] for name, tokens in (seen | {"x": x}).items()}
    gates = torch.einsum("bhws,skno->bhwkno", proxy["x"], p["gates"])
    lam = 1 + torch.einsum("bhws,sko->bhwko", proxy["to_k"], p["lam"])
    out_gate = 1 + torch.einsum("bhws,sko->bhwko", proxy["to_q"], p["out_gate"])
    value, total = seen["to_v"], 0
    for k, direction in enumerate(("down", "up", "right", "left")):
        scanned = scan(lam[:, :, :, k] * value, gates[:, :, :, k], direction, chunk)
        term = out_gate[:, :, :, k] * scanned
        if "skip" in p:
            term = term + (proxy["x"] @ p["skip"][:, k]) * value
        total = total + p["merge"][k] * term
    return total @ p["to_out.0.weight"] + p["to_out.0.bias"]


def scan(x, gates, direction, chunk):
    """States of every pixel: lines follow one another in `direction`, and start anew every `chunk` of them."""

    def turned(a):
        """Lines as the second axis, in their order."""
        a = a if direction in ("down", "up") else a.transpose(1, 2)
        return a if direction in ("down", "right") else a.flip(1)

    x, shares = turned(x), torch.sigmoid(turned(gates))
    there = torch.ones_like(shares)
    there[:, :, 0, 0], there[:, :, -1, 2] = 0, 0
    shares = shares * there / (shares * there).sum(3, keepdim=True)
    h, lines, beyond = torch.zeros_like(x[:, 0]), [], torch.zeros_like(x[:, 0, :1])
    for t in range(x.shape[1]):
        if chunk and t % chunk == 0:
            h = torch.zeros_like(h)
        left, right = torch.cat([beyond, h[:, :-1]], 1), torch.cat([h[:, 1:], beyond], 1)
        h = shares[:, t, :, 0] * left + shares[:, t, :, 1] * h + shares[:, t, :, 2] * right + x[:, t]
        lines.append(h)
    states = torch.stack(lines, 1)
    states = states if direction in ("down", "right") else states.flip(1)
    return states if direction in ("down", "up") else states.transpose(1, 2)
