"""``python -m bench.plot``: draws docs/benchmarks/*.png from the committed results, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.document import COMPETITORS, ROOT, load, millis, ours

FOLDER = ROOT / "docs" / "benchmarks"


def _axes(rows: float, path: Path, draw: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * rows + 1.4), layout="constrained")
    draw(figure.subplots())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def _bars(results: list[dict[str, Any]], value: Any, label: str, path: Path) -> None:
    names = [n for n in COMPETITORS if any(value(r, n) for r in results)]

    def draw(axis: Any) -> None:
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            found = [(row, value(r, name)) for row, r in enumerate(results) if value(r, name)]
            rows, values = [row + i * height - 0.4 for row, _ in found], [v for _, v in found]
            bars = axis.barh(rows, values, height=height, label=COMPETITORS[name])
            axis.bar_label(bars, [f"{v:.1f}" for v in values], fontsize=6, padding=2)
        axis.set_yticks(range(len(results)), [r["title"] for r in results], fontsize=7)
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(label)
        axis.invert_yaxis()
        axis.margins(x=0.12, y=0.01)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

    _axes(len(results), path, draw)


def draw_ratios(results: list[dict[str, Any]], path: Path) -> None:
    """How many times our time the others take."""

    def value(result: dict[str, Any], name: str) -> float | None:
        theirs, mine = millis(result, name), millis(result, ours(result))
        return theirs / mine if theirs and mine else None

    _bars(results, value, "times our time, forward and backward, caches cold", path)


def draw_memory(results: list[dict[str, Any]], path: Path) -> None:
    """Peak extra memory over ours."""

    def value(result: dict[str, Any], name: str) -> float | None:
        entry = result["providers"].get(name)
        return entry["peak_extra_bytes"] / result["providers"][ours(result)]["peak_extra_bytes"] if entry else None

    _bars(results, value, "times our peak of extra memory", path)


def draw_roofline(results: list[dict[str, Any]], path: Path) -> None:
    """GB/s of compulsory traffic, beside what a streaming pass of the same traffic reaches."""

    def draw(axis: Any) -> None:
        for row, result in enumerate(results):
            moved = result["units"] * result["map_bytes"] / 1e6
            limit = moved / (millis(result, f"streaming_{result['units']:g}") or 1)
            axis.barh(row, limit, height=0.7, color="0.88", label="streaming pass" if row == 0 else None)
            for name, colour in (
                (ours(result), "tab:green"),
                ("simplified_compiled", "tab:orange"),
                ("compiled", "tab:orange"),
            ):
                time = millis(result, name)
                if time:
                    axis.plot(moved / time, row, "o", color=colour, markersize=5)
        for name, colour in (("ours", "tab:green"), ("simplified or same formula, compiled", "tab:orange")):
            axis.plot([], [], "o", color=colour, label=name)
        axis.set_yticks(range(len(results)), [f"{r['case']['subject']}: {r['title']}" for r in results], fontsize=6)
        axis.set_xlabel("GB/s on the case's compulsory units, caches cold")
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)

    _axes(0.7 * len(results), path, draw)


def draw_scaling(series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel per series; where time should grow with what is on the axis, a line shows that growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(series), 3.6), layout="constrained")
    figure.supylabel("ms, forward and backward, caches cold", fontsize=8)
    for axis, (name, points) in zip(figure.subplots(1, len(series)), series.items(), strict=True):
        x = [p["x"] for p in points]
        for provider in points[0]["times"]:
            axis.plot(x, [p["times"][provider]["median_ms"] for p in points], "o-", markersize=3, label=provider)
        if name in ("pixels", "images", "tokens"):
            first = points[0]["times"]["maskd-kernels"]["median_ms"]
            axis.plot(x, [first * value / x[0] for value in x], ":", color="0.6", label="in proportion")
            axis.set_xscale("log")
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.legend(frameon=False, fontsize=6)
    figure.savefig(path, dpi=130, format="png")


def draw_steps(models: list[dict[str, Any]], path: Path) -> None:
    """Bars of student, teacher and loss; a dot where the whole step was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + sum(0.3 * len(m["rows"]) + 0.6 for m in models)), layout="constrained")
    axes = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axis, model in zip(axes, models, strict=True):
        rows = model["rows"]
        names, left = [row["name"] for row in rows], [0.0] * len(rows)
        parts = {
            "student": [rows[0]["median_ms"]] * len(rows),
            "teacher": [row.get("teacher_ms", 0.0) for row in rows],
            "loss": [row.get("loss_ms", 0.0) for row in rows],
        }
        for label, widths in parts.items():
            axis.barh(names, widths, left=left, height=0.7, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.plot([row["median_ms"] for row in rows], names, "k.", label="the whole step, measured")
        axis.tick_params(labelsize=7)
        axis.set_title(model["title"], fontsize=8, loc="left")
        axis.invert_yaxis()
    axes[0].legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=4)
    axes[-1].set_xlabel("ms, medians; each part measured by itself", fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def main() -> None:
    """All pictures, of the first device that has results; training steps of every device."""
    suites = {name: load(name) for name in ("maskd", "operators")}
    results = {name: found[0][1]["results"] for name, found in suites.items() if found}
    draw_ratios(results["maskd"], FOLDER / "ratios.png")
    draw_memory(results["maskd"], FOLDER / "memory.png")
    draw_roofline([*results["maskd"], *results.get("operators", [])], FOLDER / "roofline.png")
    scaling = load("scaling")
    if scaling:
        draw_scaling(scaling[0][1]["series"], FOLDER / "scaling.png")
    for result, steps in load("end_to_end"):
        draw_steps(steps["models"], FOLDER / f"end_to_end-{result.parent.name}.png")


if __name__ == "__main__":
    main()
