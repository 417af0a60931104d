"""The definitions of the ADM evaluator and of torch-fidelity, written again in NumPy and SciPy: plain and slow."""

import numpy as np
import scipy.linalg
import scipy.special


def fid(a, b):
    """Heusel et al. 2017 by the general matrix root, on activations."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def inception_score(logits, split):
    scores = []
    for start in range(0, len(logits), split):
        p = scipy.special.softmax(logits[start : start + split].astype(np.float64), axis=1)
        kl = (p * (np.log(p) - np.log(p.mean(0, keepdims=True)))).sum(1).mean()
        scores.append(np.exp(kl))
    return np.mean(scores)


def _distances(u, v, dtype):
    """|u|^2 - 2 u.v + |v|^2 with each result rounded to `dtype`; sums of products are exact (float64) before that."""

    def rounded(x):
        with np.errstate(over="ignore"):
            return x.astype(dtype).astype(np.float64)

    u, v = rounded(u.astype(np.float64)), rounded(v.astype(np.float64))
    norm_u, norm_v = (rounded(rounded(x * x).sum(1)) for x in (u, v))
    with np.errstate(invalid="ignore"):
        return np.maximum(rounded(rounded(norm_u[:, None] - rounded(2 * rounded(u @ v.T))) + norm_v[None]), 0)


def _block(u, v, float16):
    if float16:
        found = _distances(u, v, np.float16)
        if np.isfinite(found).all():
            return found
    return _distances(u, v, np.float32)


def precision_recall(reference, samples, k=3, float16=False, block=10_000):
    """Distances block by block: a block with an overflow falls back to float32."""

    def pairwise(a, b):
        return np.concatenate(
            [
                np.concatenate(
                    [_block(a[i : i + block], b[j : j + block], float16) for j in range(0, len(b), block)], axis=1
                )
                for i in range(0, len(a), block)
            ]
        )

    radius = [np.partition(pairwise(x, x), k, axis=1)[:, k] for x in (reference, samples)]
    between = pairwise(reference, samples)
    return ((between <= radius[0][:, None]).any(0).mean(), (between <= radius[1]).any(1).mean())


def kid(samples, reference, subsets, size, seed):
    """Binkowski et al. 2018: the unbiased estimate with (x.y/d + 1)^3, over torch-fidelity's subsets."""
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (a[rng.choice(len(a), size, replace=False)].astype(np.float64) for a in (samples, reference))
        k = [(u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
        off = ~np.eye(size, dtype=bool)
        found.append(k[0][off].mean() + k[1][off].mean() - 2 * k[2].mean())
    return np.mean(found)
