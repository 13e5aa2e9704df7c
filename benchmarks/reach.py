"""How long a sequence fits into a memory, extrapolated from records of seq_scaling.py."""

from __future__ import annotations

from harness import TRAINING

LIMIT_GB = 16.0


def longest(points: list[tuple[int, float]], limit: float, quadratic: bool) -> float | None:
    """Return the length at which memory reaches a limit, from the two longest lengths measured.

    Through these goes a T + b T^2 where memory is known to grow with the square, else a + b T.

    Args:
        points: (T, memory), of one or more lengths; of one, growth is taken as b T^2 or b T.
        limit: In the units of the memory.
        quadratic: How memory grows.

    Returns:
        T, or None where the memory measured does not grow.
    """
    (x, y), (last, top) = [(0, 0.0), *sorted(points)][-2:]
    if top <= y:
        return None
    if not quadratic:
        return last + (limit - top) * (last - x) / (top - y)
    a, b = 0.0, top / last**2
    if x:
        b = (top / last - y / x) / (last - x)
        a = top / last - b * last
    if b <= 0:
        return None
    return ((a * a + 4 * b * limit) ** 0.5 - a) / (2 * b)


def rows(records: list[dict]) -> list[list[str]]:
    """Return a table of where each case runs out of memory in training, its head first."""
    last = f"{LIMIT_GB:g} GB at T = (extrapolated)"
    lines = [["case", "longest measured", "extra MB there", "grows as", last]]
    # records of older versions do not say how memory grows
    found = [r for r in records if r["mode"] == TRAINING and "quadratic_memory" in r]
    for name in dict.fromkeys(r["case"] for r in found):
        of_case = [r for r in found if r["case"] == name and r["status"] == "ok"]
        # below a megabyte it is the allocator's rounding that is measured
        points = [(r["length"], r["extra_mb"]) for r in of_case if r["extra_mb"] >= 1]
        if not points:
            continue
        quadratic = of_case[0]["quadratic_memory"]
        length, megabytes = max(points)
        end = longest(points, LIMIT_GB * 1e3, quadratic)
        shown = "?" if end is None else rounded(end)
        lines.append([name, str(length), f"{megabytes:.0f}", "T^2" if quadratic else "T", shown])
    return lines


def rounded(length: float) -> str:
    """Return a length to two digits."""
    return f"{float(f'{length:.1e}'):,.0f}"
