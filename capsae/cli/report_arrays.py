"""What ``capsae evaluate`` prints: the table of means over sets, what it rests on, and what is missing."""

from __future__ import annotations

import pandas as pd

from ..detectors.baselines.pixels import PIXEL_CONTROLS, pixel_controls_verdict
from ..pipeline.arrays import Evaluation

SHOWN = {"auroc": "AUROC", "fpr95_ood_pos": "FPR95 OOD+", "fpr95_id_pos": "FPR95 ID+"}
LEGEND = """\
Percent; unweighted means over the OOD sets. Single sets and further metrics are in the CSV (--out).
FPR95 OOD+: ID rejected where 95 % of OOD are caught (as OpenOOD); ID+: OOD accepted where 95 % of ID stay."""
TESTS = """\
[95 % intervals]: {intervals} bootstrap replicates over both sides. p: of the difference in AUROC from {against}, by
DeLong, corrected by Holm over all methods. Verdicts against {against} at 5 %, of FPR95 by {comparison} paired draws."""
TOO_FEW = "Some FPR95 are too clear for so few replicates to say so after Holm: give a larger --n-boot."


def report(found: Evaluation) -> str:
    """The whole text; percent throughout, both conventions of FPR95, best mean AUROC first."""
    settings, n_boot = found.settings, found.settings["n_boot"]
    sizes = ", ".join(f"{name} {one['rows']}" for name, one in settings["sets"].items())
    lines = [
        f"{settings['source']}: {settings['dim']} columns, {settings['n_classes']} classes",
        f"  rows: {sizes}",
        *(f"  {note}" for note in found.notes),
        *(f"  accuracy on {r.set}: {_cell(r)} %" for r in found.table.query("metric == 'accuracy'").itertuples()),
        f"\n{aligned(_table(found))}\n\n{LEGEND}",
    ]
    if n_boot["intervals"]:
        lines.append(TESTS.format(**n_boot, against=settings["against"]))
    if len(found.comparison) and (found.comparison["p_at_most"] & (found.comparison["p_holm"] >= 0.05)).any():
        lines.append(TOO_FEW)
    if set(found.table["method"]) & set(PIXEL_CONTROLS):
        lines.append(f"\nPixel controls beside the best other score, AUROC:\n{aligned(_pixels(found.table))}")
    if found.left_out:
        left_out = pd.DataFrame(found.left_out.items(), columns=["name", "why"]).groupby("why", sort=False)["name"]
        lines += ["\nLeft out:", *(f"  {', '.join(names)}: {why}" for why, names in left_out)]
    return "\n".join(lines)


def _table(found: Evaluation) -> pd.DataFrame:
    """A row a method: means over all sets with intervals, over groups of sets, and the tests of both."""
    means = found.table[found.table["set"] == "mean"]
    cells = means.assign(cell=[_cell(row) for row in means.itertuples()], short=100 * means["value"])
    cells = cells.set_index(["method", "group", "metric"])
    order = cells.xs(("all", "auroc"), level=("group", "metric"))["short"].sort_values(ascending=False).index
    table = pd.DataFrame({title: cells["cell"].xs(("all", m), level=(1, 2)) for m, title in SHOWN.items()})
    for group in (one for one in cells.index.unique("group") if one != "all"):
        parts = [cells["short"].xs((group, metric), level=(1, 2)).map("{:.1f}".format) for metric in SHOWN]
        table[f"{group}: AUROC/OOD+/ID+"] = parts[0].str.cat(parts[1:], sep="/")
    if len(found.comparison):
        tests = found.comparison[found.comparison["set"] == "mean"].pivot(index="method", columns="metric")
        table[f"p vs {found.settings['against']}"] = tests["p_holm", "auroc"].map("{:.2g}".format)
        for metric, title in SHOWN.items():
            table[f"by {title}"] = tests["verdict", metric]
    return table.loc[order].fillna("").rename_axis("method").reset_index()


def _pixels(table: pd.DataFrame) -> pd.DataFrame:
    found = pixel_controls_verdict(table)
    shares = {key: found[key].map("{:.1%}".format) for key in ("control_value", "method_value")}
    return found.assign(**shares, control_wins=found["broken"].map({True: "yes", False: "no"})).drop(columns="broken")


def _cell(row) -> str:
    ends = "" if pd.isna(row.lo) else f" [{100 * row.lo:.1f}, {100 * row.hi:.1f}]"
    return f"{100 * row.value:.1f}{ends}"


def aligned(table: pd.DataFrame) -> str:
    """Aligned columns, to the left."""
    cells = [list(table.columns), *([str(cell) for cell in row] for row in table.itertuples(index=False))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
