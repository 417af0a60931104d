"""The text tower again, in float64 NumPy, one text at a time, with weights as PyTorch lays them out; random weights."""

import math

import numpy as np

from gspn_jax.text import TextConfig, expected_shapes

QUICK = TextConfig(width=24, layers=2, heads=3, hidden=40, vocabulary=50, length=11)
PROJECTED = TextConfig(
    width=16, layers=3, heads=2, hidden=64, vocabulary=50, length=11, activation="gelu", projection=20
)


def random_state_dict(config: TextConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under which no layer is negligible: normalisations away from 1 and 0, biases too; sharp attention."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        value = rng.standard_normal(shape)
        if "_proj." in name and name.endswith("weight"):
            value *= 2 / math.sqrt(shape[1])
        elif len(shape) > 1 and "embedding" not in name:
            value /= math.sqrt(shape[1])
        elif len(shape) == 1:
            value = 0.3 * value + name.endswith("weight")
        weights[name if name == "text_projection.weight" else f"text_model.{name}"] = value.astype(np.float32)
    return weights


def random_ids(config: TextConfig, lengths: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Texts of `lengths` tokens before the end token, which is repeated up to the longest."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(lengths), max(lengths) + 1), config.vocabulary - 1, np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(0, config.vocabulary - 2, length)
    return ids


def encode(weights, config, ids):
    """last, penultimate and pooled of one text."""

    def get(name):
        return weights.get(f"text_model.{name}", weights.get(name)).astype(np.float64)

    def linear(name, x):
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(name, x):
        normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return normal * get(f"{name}.weight") + get(f"{name}.bias")

    def activation(x):
        if config.activation == "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x / (1 + np.exp(-1.702 * x))

    x = get("embeddings.token_embedding.weight")[ids] + get("embeddings.position_embedding.weight")[: len(ids)]
    for layer in range(config.layers):
        name, before = f"encoder.layers.{layer}", x
        tokens = norm(f"{name}.layer_norm1", x)
        q, k, v = (linear(f"{name}.self_attn.{part}_proj", tokens) for part in "qkv")
        mixed, size = np.empty_like(v), config.width // config.heads
        for head in range(config.heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(len(ids)):
                shares = np.exp(k[: i + 1, part] @ q[i, part] / math.sqrt(size))
                mixed[i, part] = shares @ v[: i + 1, part] / shares.sum()
        x = x + linear(f"{name}.self_attn.out_proj", mixed)
        hidden = activation(linear(f"{name}.mlp.fc1", norm(f"{name}.layer_norm2", x)))
        x = x + linear(f"{name}.mlp.fc2", hidden)
    last = norm("final_layer_norm", x)
    pooled = last[list(ids).index(max(ids))]
    return last, before, pooled if config.projection is None else pooled @ get("text_projection.weight").T


def config_json(config: TextConfig) -> dict:
    """The config.json of a tower, as transformers writes it."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": config.activation,
        "vocab_size": config.vocabulary,
        "projection_dim": config.projection or 512,
        "max_position_embeddings": config.length,
        "eos_token_id": 2,
    }
