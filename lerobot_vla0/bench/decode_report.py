"""Table and plot of `bench decode`."""

from pathlib import Path
from typing import Any


def print_table(rows: list[dict[str, Any]], workloads: dict[str, str]) -> None:
    workload = None
    for row in rows:
        if row["workload"] != workload:
            workload = row["workload"]
            print(f"\n{workload}: {workloads[workload]}")
            print(f"  {'mode':17}{'passes':>8}{'ms per chunk (min–max)':>30}{'speed':>8}  identical")
        ms = f"{row['ms_median']:.0f} ({row['ms_min']:.0f}–{row['ms_max']:.0f})"
        print(
            f"  {row['mode']:17}{row['passes']:>8.1f}{ms:>30}{row['speedup']:>7.1f}×  "
            f"{row['identical']}/{row['chunks']}"
            + (f", parted by at most {row['gap']:.1f} roundings" if "gap" in row else "")
        )
    print()


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = result["results"]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(3.4 * len(workloads) + 2.6, 3.4), layout="constrained")
    for axes, workload in zip(
        figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0], workloads, strict=True
    ):
        shown = {row["mode"]: row for row in rows if row["workload"] == workload}
        for place, mode in enumerate(modes):
            row = shown[mode]
            axes.barh(
                place,
                row["ms_median"],
                xerr=[[row["ms_median"] - row["ms_min"]], [row["ms_max"] - row["ms_median"]]],
                color="C0" if mode in ("plain", "forced", "drafts") else "0.65",
                ecolor="0.3",
            )
            axes.annotate(
                f" {row['speedup']:.1f}×, {row['passes']:.4g} passes", (row["ms_max"], place), va="center"
            )
        axes.set(title=workload, xlabel="ms per chunk", yticks=range(len(modes)), yticklabels=modes)
        axes.set_xlim(0, 1.5 * max(row["ms_max"] for row in shown.values()))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(result["machine"], fontsize=9)
    figure.savefig(path, dpi=120)
