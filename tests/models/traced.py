"""Operations counted in a traced program."""


def traced_products(jaxpr, times: int = 1) -> float:
    """Operations in the matrix products of a traced program, through its scans."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = 1
            for axis in contracted:
                depth *= equation.invars[0].aval.shape[axis]
            total += 2.0 * times * equation.outvars[0].aval.size * depth
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                total += traced_products(getattr(value, "jaxpr", value), inner)
    return total
