"""A GSPN layer of a U-Net again, in float64 NumPy loops, and its gradients by the chain rule; parameters by part."""

import numpy as np

from tests.kernels import numpy_scan


def layer(p, form, x, chunk):
    return _forward(p, form, x, chunk)[0]


def gradients(p, form, x, chunk, cotangent):
    """({part: gradient}, that of x) of sum(cotangent * layer)."""
    _, v, proxies, terms, y = _forward(p, form, x, chunk)
    found = {"to_out.0.weight": outer(y, cotangent), "to_out.0.bias": cotangent.sum((0, 1, 2))}
    by_v, *by_terms, by_merge, by_skip = numpy_scan.propagate_gradients(
        v, terms["gates"], terms["lam"], terms["out_gate"], p["merge"], terms.get("skip"), chunk,
        cotangent @ p["to_out.0.weight"].T,
    )  # fmt: skip
    found["merge"] = by_merge
    by_terms = dict(zip(("gates", "lam", "out_gate"), by_terms, strict=True)) | (
        {"skip": by_skip} if "skip" in p else {}
    )
    by_proxies = dict.fromkeys(proxies, 0.0)
    for term, by_term in by_terms.items():
        source = SOURCE[term]
        found[term] = outer(proxies[source], by_term)
        axes = tuple(range(3, by_term.ndim))
        by_proxies[source] = by_proxies[source] + np.tensordot(by_term, p[term], (axes, tuple(a - 2 for a in axes)))
    found["proxy.weight"], by_x = 0.0, 0.0
    for source, by_proxy in by_proxies.items():
        seen = x if source is None or form == "pure" else x + x @ p[f"{source}.weight"]
        found["proxy.weight"] = found["proxy.weight"] + outer(seen, by_proxy)
        by_seen = by_proxy @ p["proxy.weight"].T
        by_x = by_x + by_seen
        if seen is not x:
            found[f"{source}.weight"] = outer(x, by_seen)
            by_x = by_x + by_seen @ p[f"{source}.weight"].T
    by_x = by_x + by_v
    if form == "qkv":
        found["to_v.weight"] = outer(x, by_v)
        by_x = by_x + by_v @ p["to_v.weight"].T
    return found, by_x


SOURCE = {"gates": None, "skip": None, "lam": "to_k", "out_gate": "to_q"}


def outer(left, right):
    return np.tensordot(left, right, ((0, 1, 2), (0, 1, 2)))


def _forward(p, form, x, chunk):
    proxies = {source: (x + x @ p[f"{source}.weight"] if source and form == "qkv" else x) @ p["proxy.weight"]
               for source in SOURCE.values()}  # fmt: skip
    terms = {term: (term in ("lam", "out_gate")) + np.tensordot(proxies[source], p[term], 1)
             for term, source in SOURCE.items() if term in p}  # fmt: skip
    v = x + x @ p["to_v.weight"] if form == "qkv" else x
    y = numpy_scan.propagate(v, terms["gates"], terms["lam"], terms["out_gate"], p["merge"], terms.get("skip"), chunk)
    return y @ p["to_out.0.weight"] + p["to_out.0.bias"], v, proxies, terms, y
