"""Show the records of seq_scaling.py as tables and a picture, and those of decode.py as a picture.

python benchmarks/report.py benchmarks/out/seq_scaling.jsonl
python benchmarks/report.py benchmarks/out/decode.jsonl
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from timing.measure import BASELINE, FORWARD, MODES, TRAINING

from fastpe_lab import checks
from fastpe_lab.records import brief, describe, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# the memory whose length `reach` extrapolates
LIMIT_GB = 16.0
QUIET = "#9a9a9a"
COLOURS = {
    "sdpa": "#4d4d4d",
    "fastpe": "#0b3c8c",
    "fastpe-rope": "#1f77d0",
    "fastpe-ropepool": "#3aa6c9",
    "fastpe-sinespe": "#d1495b",
    "fastpe-fstripe-sff": "#e07b00",
    "fastpe-fstripe-chroma": "#b8860b",
    "fastpe-fstripe-pooled": "#2a8a4a",
    "fastpe-fstripe-unpooled": "#7a4fb5",
}


def ratio(record: dict, records: list[dict]) -> tuple[float, bool] | None:
    """Return how many times faster than SDPA a record is, and whether both took turns."""
    if record["status"] != "ok" or record["case"] == BASELINE:
        return None
    if record["sdpa_ms"]:
        return record["sdpa_ms"]["median"] / record["ms"]["median"], True
    for other in records:
        same = other["length"] == record["length"] and other["mode"] == record["mode"]
        if other["case"] == BASELINE and other["status"] == "ok" and same:
            return other["ms"]["median"] / record["ms"]["median"], False
    return None


def crossover(rows: list[dict], records: list[dict]) -> str:
    """Return the shortest measured length from which on a case is faster than SDPA.

    Otherwise "none", or "none to 512" where longer ones were not measured.
    """
    known = [(r["length"], ratio(r, records)) for r in rows]
    known = [(length, x[0]) for length, x in known if x]
    first = None
    for length, x in sorted(known, reverse=True):
        if x <= 1:
            break
        first = length
    if not known:
        return "?"
    last = max(length for length, _ in known)
    complete = last == max(r["length"] for r in rows)
    return str(first) if first else "none" if complete else f"none to {last}"


def tables(records: list[dict]) -> str:
    """Return tables for both modes and the reason for every gap, in markdown."""
    parts = []
    lengths = sorted({r["length"] for r in records})
    peers_first = sorted(records, key=lambda r: r["ours"])
    names = list(dict.fromkeys(r["case"] for r in peers_first))
    both_ways = {r["case"] for r in records if not r.get("causal", True)}
    for mode in MODES:
        head = ["case", *(f"T={length}" for length in lengths), "faster from"]
        lines = [head]
        for name in names:
            rows = [r for r in records if r["case"] == name and r["mode"] == mode]
            cells = {r["length"]: _cell(r, records) for r in rows}
            last = "" if name == BASELINE else crossover(rows, records)
            shown = f"{name} (bidirectional)" if name in both_ways else name
            lines.append([shown, *(cells.get(length, "") for length in lengths), last])
        parts.append(f"**{mode.capitalize()}**\n\n{markdown(lines)}")
    parts.append(
        "A cell shows the median in ms / times as fast as SDPA / extra peak MB. Both sides of a "
        "ratio took turns in one process, unless ~ marks it. 'faster from' is the shortest length "
        "from which the case is faster than SDPA at every longer one. Forward has no gradients and "
        "fixed noise; forward+backward has gradients of q, k, v and of all parameters, and draws "
        "new noise. SDPA is F.scaled_dot_product_attention with is_causal=True."
    )
    lines = reach(peers_first)
    if len(lines) > 1:
        parts.append(
            f"**{LIMIT_GB:g} GB**\n\n{markdown(lines)}\n\nThe length at which one "
            "forward+backward fills this extra memory, extrapolated from the two longest lengths "
            "measured."
        )
    parts.append(_gaps(records))
    parts.append(describe(records[-1]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(r: dict, records: list[dict]) -> str:
    if r["status"] != "ok":
        return r["status"]
    ms, mb, x = r["ms"]["median"], r["extra_mb"], ratio(r, records)
    cells = [brief(ms)]
    if x:
        cells.append(f"{'' if x[1] else '~'}{brief(x[0])}x")
    return " / ".join([*cells, f"{mb:.0f}" if mb >= 1 else "<1"])


def longest(points: list[tuple[int, float]], limit: float, quadratic: bool) -> float | None:
    """Return the length at which memory reaches a limit, from the two longest lengths measured.

    The curve through them is a T + b T^2 if memory is known to grow with the square, else a + b T.
    From one length it is b T^2 or b T.

    Args:
        points: (T, memory) for one or more lengths.
        limit: a memory in the same units.
        quadratic: whether memory grows with the square.

    Returns:
        length: T, or None if the measured memory does not grow.
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
    return ((a * a + 4 * b * limit) ** 0.5 - a) / (2 * b) if b > 0 else None


def reach(records: list[dict]) -> list[list[str]]:
    """Return a table of where each case runs out of memory in training, its head first."""
    last = f"{LIMIT_GB:g} GB at T = (extrapolated)"
    lines = [["case", "longest measured", "extra MB there", "grows as", last]]
    # older records do not say how memory grows
    found = [r for r in records if r["mode"] == TRAINING and "quadratic_memory" in r]
    for name in dict.fromkeys(r["case"] for r in found):
        of_case = [r for r in found if r["case"] == name and r["status"] == "ok"]
        # below a megabyte, the allocator's rounding is measured
        points = [(r["length"], r["extra_mb"]) for r in of_case if r["extra_mb"] >= 1]
        if not points:
            continue
        quadratic = of_case[0]["quadratic_memory"]
        length, megabytes = max(points)
        end = longest(points, LIMIT_GB * 1e3, quadratic)
        shown = "?" if end is None else f"{float(f'{end:.1e}'):,.0f}"
        lines.append([name, str(length), f"{megabytes:.0f}", "T^2" if quadratic else "T", shown])
    return lines


def _gaps(records: list[dict]) -> str:
    # {(case, status, reason): {length: modes}}
    gaps: dict[tuple[str, str, str], dict[int, list[str]]] = {}
    for r in records:
        if r["status"] != "ok":
            # predictions differ with the length
            reason = re.sub(r"predicted [\d.]+ (GB|s a call), ", "", r["reason"])
            modes = gaps.setdefault((r["case"], r["status"], reason), {})
            modes.setdefault(r["length"], []).append(r["mode"])
    lines = []
    for (name, status, reason), lengths in gaps.items():
        where = ", ".join(
            str(length) if len(modes) == len(MODES) else f"{length} ({modes[0]})"
            for length, modes in lengths.items()
        )
        lines.append(f"- {name}: {status} at T = {where}: {reason}")
    return "\n".join(lines)


def plot(records: list[dict], path: Path) -> bool:
    """Draw time and memory over the length, log-log, one panel for each mode.

    Returns:
        drawn: whether anything was measured, and so drawn.
    """
    good = [r for r in records if r["status"] == "ok"]
    panels = []
    for title, value in (
        ("milliseconds", lambda r: r["ms"]["median"]),
        ("extra peak MB", lambda r: max(r["extra_mb"], 0.5)),
    ):
        for mode in MODES:
            name = "Forward" if mode == FORWARD else "Forward + backward"
            panels.append(([r for r in good if r["mode"] == mode], value, f"{name}: {title}"))
    title = "Causal attention on music: colour is fastpe, grey is everything else (lower is better)"
    return _draw(path, good, title, panels, 2)


def plot_decoding(records: list[dict], path: Path) -> bool:
    """Draw tokens a second over the context, log-log, one panel for each level.

    The fastest backend counts, called or as a CUDA graph. Softmax is measured beside each encoding;
    its line is the median.

    Returns:
        drawn: whether anything was measured, and so drawn.
    """
    good = [r for r in records if "ms" in r]
    panels = []
    for level in dict.fromkeys(r["level"] for r in good):
        lines = decoding_lines([r for r in good if r["level"] == level])
        panels.append((lines, lambda r: r["rate"], f"{level.capitalize()}: tokens a second"))
    return _draw(path, good, "Decoding after a context (higher is better)", panels, 1)


def _draw(path: Path, records: list[dict], title: str, panels: list[tuple], rows: int) -> bool:
    # panels are (rows, value of a row, title), drawn row by row
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not records:
        return False
    plt.rcParams.update({"font.size": 10.5, "axes.titlesize": 12})
    columns = len(panels) // rows
    size = 7.5 * columns, 6.25 * rows if rows > 1 else 6.5
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=True):
        _panel(ax, *panel)
    figure.suptitle(f"{title}\n", fontsize=15, fontweight="bold")
    height = 0.962 if rows > 1 else 0.925
    figure.text(0.5, height, describe(records[-1]), ha="center", fontsize=9.5, color="#555555")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def decoding_lines(records: list[dict]) -> list[dict]:
    """Return one level as {case, label, ours, length, rate}, with rate in tokens a second."""
    lines, softmax = [], {}
    for r in records:
        rates = {p: 1e3 * r["batch"] * r["steps"] / ms["median"] for p, ms in r["ms"].items()}
        best = max(rate for provider, rate in rates.items() if provider.startswith("fastpe"))
        line = {"case": r["case"], "label": r["row"], "ours": True, "length": r["context"]}
        lines.append(line | {"rate": best})
        best = max(rate for provider, rate in rates.items() if provider.startswith("softmax"))
        softmax.setdefault(r["context"], []).append(best)
    same = {"case": BASELINE, "label": "softmax, KV cache", "ours": False}
    return lines + [
        same | {"length": context, "rate": statistics.median(rates)}
        for context, rates in softmax.items()
    ]


def _panel(ax: Axes, rows: list[dict], value: Callable[[dict], float], title: str) -> None:
    from matplotlib.ticker import LogLocator

    lengths = sorted({r["length"] for r in rows})
    ends: dict[int, list[tuple[float, str, str]]] = {}
    for name in dict.fromkeys(r["case"] for r in rows):
        line = sorted((r for r in rows if r["case"] == name), key=lambda r: r["length"])
        x, y = [r["length"] for r in line], [value(r) for r in line]
        ours = line[0]["ours"]
        colour = COLOURS.get(name, "#0b3c8c" if ours else QUIET)
        style = {"color": colour, "lw": 2.0 if ours or name == BASELINE else 1.4}
        style |= {"marker": "o", "ms": 3.5, "zorder": 3 if ours else 2}
        ax.plot(x, y, **style)
        ends.setdefault(x[-1], []).append((y[-1], line[0]["label"], colour))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    ax.set_xlabel("tokens")
    ax.set_title(title, loc="left", fontweight="bold")
    ax.grid(True, color="#e6e6e6", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    for length, lines in ends.items():
        _label(ax, lines, length, 1.045 if length == lengths[-1] else None)


def _label(ax: Axes, ends: list[tuple[float, str, str]], length: int, column: float | None) -> None:
    # write names beside the ends of lines, or in a column, and move close ones apart
    low, high = (math.log10(y) for y in ax.get_ylim())
    left, right = (math.log2(x) for x in ax.get_xlim())
    if column is None:
        column = (math.log2(length) - left) / (right - left) + 0.015
    gap = 0.036
    ends = sorted(ends, key=lambda end: end[0])
    want = [(math.log10(y) - low) / (high - low) for y, _, _ in ends]
    place = spaced(want, gap)
    for (y, text, colour), at in zip(ends, place, strict=True):
        ax.annotate(
            text,
            xy=(length, y),
            xytext=(column, at),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6},
        )


def spaced(want: list[float], gap: float) -> list[float]:
    """Return places near the wanted ones (sorted), at least `gap` apart: groups share a mean."""
    groups: list[list[float]] = []
    for place in want:
        groups.append([place])
        while len(groups) > 1:
            low = sum(groups[-2]) / len(groups[-2]) + (len(groups[-2]) - 1) / 2 * gap
            high = sum(groups[-1]) / len(groups[-1]) - (len(groups[-1]) - 1) / 2 * gap
            if high - low >= gap:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    return [
        sum(group) / len(group) + (i - (len(group) - 1) / 2) * gap
        for group in groups
        for i in range(len(group))
    ]


# the largest size in a record
_LARGEST = 2**40
_ON = {"length": int, "batch": int, "heads": int, "head_dim": int, "dtype": str, "device": str}
_ON |= {"threads": int, "backend": str, "cpu": str, "date": str}
_ON |= {"torch": str, "fastpe": str, "python": str, "commit": (str, type(None))}
_ON_GPU = dict.fromkeys(("gpu", "driver", "cuda", "triton"), (str, type(None)))
_SCALING = {"case": str, "label": str, "ours": bool, "mode": str, "status": str}
_DECODING = {"case": str, "row": str, "level": str, "context": int, "steps": int}


def check(record: object) -> None:
    """Raise a ValueError unless a record has the fields that are shown here."""
    checks.record(record, _ON)
    if record["device"] == "cuda":
        checks.record(record, _ON_GPU)
    for name in ("length", "batch", "heads", "head_dim", "threads"):
        checks.within(name, record[name], 1, _LARGEST)
    times = _times_of_decoding(record) if "level" in record else _times_of_scaling(record)
    for name, ms in times.items():
        checks.record(ms, {"median": (int, float)}, name)
        if ms["median"] <= 0:
            raise ValueError(f"{name}.median must be positive, got {ms['median']}")


def _times_of_scaling(record: dict) -> dict[str, object]:
    checks.record(record, _SCALING)
    if record["mode"] not in MODES:
        got = checks.printable(record["mode"])
        raise ValueError(f"mode must be of {', '.join(MODES)}, got {got}")
    if record["status"] != "ok":
        checks.record(record, {"reason": str})
        return {}
    checks.record(record, {"ms": dict, "sdpa_ms": (dict, type(None)), "extra_mb": (int, float)})
    return {name: record[name] for name in ("ms", "sdpa_ms") if record[name] is not None}


def _times_of_decoding(record: dict) -> dict[str, object]:
    checks.record(record, _DECODING)
    for name in ("context", "steps"):
        checks.within(name, record[name], 1, _LARGEST)
    if "ms" not in record:
        checks.record(record, {"error": str})
        return {}
    checks.typed("ms", record["ms"], dict)
    for side in ("fastpe", "softmax"):
        if not any(name.startswith(side) for name in record["ms"]):
            got = checks.printable(", ".join(record["ms"]))
            raise ValueError(f"ms must have times of {side}, got {got or 'none'}")
    return {f"ms.{name}": ms for name, ms in record["ms"].items()}


def main(argv: list[str] | None = None) -> int:
    """Print the tables of a file and draw its picture beside it; return 1 if nothing is in it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=Path, help="seq_scaling.jsonl or decode.jsonl")
    path = parser.parse_args(argv).file
    if not path.is_file():
        parser.error(f"file {checks.printable(path)} does not exist")
    records, skipped = checks.json_lines(path, check)
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    # a file may hold both kinds: show the first one
    records = [r for r in records if ("level" in r) == ("level" in records[0])]
    if not records:
        print(f"error: {checks.printable(path)} has no record", file=sys.stderr)
        return 1
    if "level" in records[0]:
        plot_decoding(records, path.with_suffix(".png"))
    else:
        print(tables(records))
        plot(records, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
