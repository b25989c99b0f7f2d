"""Pictures of the result rows: time and memory over shape, and the distance from the floor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from families import FAMILIES

Row = dict[str, Any]

FLOORS = frozenset(name for family in FAMILIES.values() for name in family.floors)
# Ours in one hue, told apart by the marker; the floor is a line without one.
_OURS = {"trimtab native": "o", "trimtab triton": "s", "trimtab reference": "v"}
_OURS_COLOUR = "#c1440e"
_OTHERS = (
    "#1f4e79", "#3a7d44", "#7b5ea7", "#8c7a3d", "#4f9da6", "#6b6b6b", "#b0578d",
    "#d4a72c", "#8fb0d9", "#9dc08b",
)  # fmt: skip
_MARKERS = "^DPX<>*"


def draw(rows: Sequence[Row], folder: Path, family: str, machine: str) -> list[Path]:
    """Write the pictures that these rows allow, and return their paths."""
    with _style():
        written = []
        over_shape = list(sweeps(rows))
        if over_shape:
            for field, label, name in (
                ("p50_ms", "ms", "time"),
                ("extra_mib", "MiB beyond inputs and results", "memory"),
            ):
                path = folder / f"{family}-{name}.svg"
                _draw_sweeps(over_shape, field, label, f"{name} on {machine}", path)
                written.append(path)
        against = bars(rows)
        if against:
            written.append(folder / f"{family}-floor.svg")
            _draw_bars(against, f"time over the floor on {machine}", written[-1])
    return written


def draw_op(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time and extra memory of one operator side by side, by case and provider."""
    with _style():
        _draw_op(rows, title, path)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    # The same rows give the same file.
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "trimtab", "font.size": 9, "axes.grid": True,
        "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def sweeps(rows: Sequence[Row], least: int = 3) -> Iterator[tuple[int, str, list[Row]]]:
    """Rows that differ in one dimension alone: ``(dimension, title, rows)``."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        for axis in range(len(row["shape"])):
            rest = tuple(None if i == axis else size for i, size in enumerate(row["shape"]))
            groups[axis, row["op"], row["mode"], row["dtype"], row["threads"], rest].append(row)
    for (axis, op, mode, dtype, _, rest), group in sorted(
        groups.items(), key=lambda item: str(item[0])
    ):
        if len({row["shape"][axis] for row in group}) >= least:
            names = _axes(group[0])
            fixed = ", ".join(
                f"{names[i]} {size}" for i, size in enumerate(rest) if size is not None
            )
            yield axis, f"{op}, {mode}, {dtype}\n{fixed}", group


def bars(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Time over the floor by case and provider, for every mode and dtype, each at one shape."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in at_one_shape(rows):
        if row["over_floor"] and row["provider"] not in FLOORS:
            found[f"{row['mode']}, {row['dtype']}"][row["provider"]] = row["over_floor"]
    return dict(found)


def at_one_shape(rows: Sequence[Row]) -> list[Row]:
    """Of a mode's shapes the one that most modes share, the largest of several such."""
    modes: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for row in rows:
        modes[tuple(row["shape"])].add(row["mode"])
    shown: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        key = (row["mode"], row["dtype"])
        shown[key] = max(
            shown.get(key, []), row["shape"], key=lambda shape: (len(modes[tuple(shape)]), shape)
        )
    return [row for row in rows if row["shape"] == shown[row["mode"], row["dtype"]]]


def _axes(row: Row) -> tuple[str, ...]:
    return FAMILIES[row["family"]].axes_for(row["op"])


def _styles(providers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line styles by name, the same in every panel of a picture."""
    styles: dict[str, dict[str, Any]] = {}
    others = [
        name
        for name in providers
        if name not in _OURS and name not in FLOORS and "trimtab" not in name
    ]
    for name in providers:
        if name in FLOORS:
            styles[name] = {"color": "black", "linestyle": "--", "linewidth": 1}
        elif name in others:
            i = others.index(name)
            styles[name] = {
                "color": _OTHERS[i % len(_OTHERS)],
                "marker": _MARKERS[i % len(_MARKERS)],
            }
        else:
            styles[name] = {"color": _OURS_COLOUR, "marker": _OURS.get(name, "d"), "linewidth": 2}
    return styles


def _draw_sweeps(
    found: Sequence[tuple[int, str, list[Row]]],
    field: str,
    label: str,
    title: str,
    path: Path,
) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    providers = list(dict.fromkeys(row["provider"] for _, _, group in found for row in group))
    styles = _styles(sorted(providers, key=lambda name: ("trimtab" not in name, name)))
    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False)
    for panel, (axis, panel_title, group) in zip(panels[0], found, strict=True):
        for name, style in styles.items():
            points = sorted((row["shape"][axis], row[field]) for row in group
                            if row["provider"] == name and row[field])  # fmt: skip
            if points:
                panel.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        sizes = sorted({row["shape"][axis] for row in group})
        panel.set(xscale="log", yscale="log", xlabel=_axes(group[0])[axis], ylabel=label)
        panel.set_xticks(sizes, [str(size) for size in sizes], rotation=30)
        panel.xaxis.set_minor_locator(NullLocator())
        _plain_numbers(panel.yaxis)
        panel.set_title(panel_title, fontsize=9)
    handles = {
        text: line
        for panel in panels[0]
        for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    figure.set_layout_engine("constrained")
    _save(figure, path)


def _draw_bars(against: dict[str, dict[str, float]], title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    providers = sorted({name for values in against.values() for name in values},
                       key=lambda name: ("trimtab" not in name, name))  # fmt: skip
    styles = _styles(providers)
    lines = sum(len(values) + 1 for values in against.values())
    figure, panel = plt.subplots(figsize=(7, 0.8 + 0.17 * lines), layout="constrained")
    place, ticks = 0.0, []
    for case, values in against.items():
        shown = [name for name in providers if name in values]
        ticks.append((place + (len(shown) - 1) / 2, case))
        for name in shown:
            colour = styles[name]["color"]
            hatch = "///" if name == "trimtab reference" else None
            panel.barh(
                place,
                values[name],
                color=colour,
                hatch=hatch,
                edgecolor="white",
                height=0.9,
                label=name,
            )
            panel.text(values[name] * 1.02, place, f"{values[name]:.2f}", va="center", fontsize=7)
            place += 1
        place += 1
    panel.axvline(1.0, color="black", linestyle="--", linewidth=1)
    ratios = [ratio for values in against.values() for ratio in values.values()]
    limits = (min(0.95, 0.95 * min(ratios)), 1.15 * max(ratios))
    panel.set(xscale="log", xlabel="time over the floor", title=title, xlim=limits)
    panel.set_ylim(-1, place - 1)
    panel.grid(axis="y", visible=False)
    _plain_numbers(panel.xaxis)
    panel.set_yticks(*zip(*ticks, strict=True))
    panel.invert_yaxis()
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    _save(figure, path)


def _draw_op(rows: Sequence[Row], title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cases[row["mode"], row["dtype"]].append(row)
    styles = _styles(sorted({row["provider"] for row in rows}))
    figure, panels = plt.subplots(
        1, 2, figsize=(8, 0.9 + 0.19 * (len(rows) + len(cases))), layout="constrained", sharey=True
    )
    names, ticks, place = {}, [], 0.0
    for (mode, dtype), group in cases.items():
        ticks.append((place + (len(group) - 1) / 2, f"{mode}\n{dtype}"))
        for row in sorted(group, key=ours_first):
            colour = styles[row["provider"]]["color"]
            hatch = "///" if row["provider"] == "trimtab reference" else None
            for panel, field in zip(panels, ("p50_ms", "extra_mib"), strict=True):
                value = row[field]
                if value is None:
                    continue
                bar = panel.barh(
                    place, value, color=colour, hatch=hatch, height=0.9, edgecolor="white"
                )
                names.setdefault(row["provider"], bar)
                panel.text(value, place, f" {measured(value)}", va="center", fontsize=7)
            place += 1
        place += 1
    panels[0].set(xscale="log", xlabel="ms", ylim=(place - 1, -1))
    panels[1].set(xscale="symlog", xlabel="MiB beyond inputs and results")
    fastest = min(row["p50_ms"] for row in rows)
    for panel, low in zip(panels, (0.5 * fastest, 0.0), strict=True):
        panel.set_xlim(low, 2.5 * panel.get_xlim()[1])
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(*zip(*ticks, strict=True))
    _plain_numbers(panels[0].xaxis, subs=(1,))
    panels[1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def measured(value: float) -> str:
    """A time or a size as tables and pictures show it."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def ours_first(row: Row) -> tuple[bool, bool, float]:
    """Sorts floors before ours before others, and each by its time."""
    provider = row["provider"]
    return (provider not in FLOORS, "trimtab" not in provider, row["p50_ms"])


def _plain_numbers(axis: Any, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
