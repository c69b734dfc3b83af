"""What ``capsae evaluate`` prints: an aligned table of means over sets, what it rests on, and what is missing."""

from __future__ import annotations

import pandas as pd

from .arrays import Evaluation
from .detectors.pixels import pixel_controls_verdict

SHOWN = {"auroc": "AUROC", "fpr95_ood_pos": "FPR95, OOD positive", "fpr95_id_pos": "FPR95, ID positive"}
_SHORT = {"auroc": "AUROC", "fpr95_ood_pos": "FPR95 OOD+", "fpr95_id_pos": "FPR95 ID+"}


def report(found: Evaluation) -> str:
    """The whole text; percent throughout, both conventions of FPR95, best mean AUROC first."""
    sizes = {name: one["rows"] for name, one in found.settings["sets"].items()}
    dim, n_classes = found.settings["dim"], found.settings["n_classes"]
    lines = [
        f"{found.settings['source']}: {dim} columns, {n_classes} classes",
        "  rows: " + ", ".join(f"{name} {rows}" for name, rows in sizes.items()),
        *(f"  {note}" for note in found.notes),
        *_accuracy(found.table),
        "",
        *_aligned(_columns(found)),
        "",
        *_legend(found),
        *_verdicts(found.table),
        *_left_out(found.left_out),
    ]
    return "\n".join(lines)


def _accuracy(table: pd.DataFrame) -> list[str]:
    rows = table[table["metric"] == "accuracy"]
    return [f"  accuracy on {row.set}: {_cell(row)} %" for row in rows.itertuples()]


def _columns(found: Evaluation) -> list[list[str]]:
    """Header and rows, as text. The first columns are means over all sets, with intervals."""
    means = found.table[found.table["set"] == "mean"].set_index(["method", "group", "metric"])
    order = means.xs(("all", "auroc"), level=("group", "metric"))["value"].sort_values(ascending=False).index
    groups = [g for g in means.index.unique("group") if g != "all"]
    header = ["method", *(_SHORT[metric] for metric in SHOWN)]
    header += [f"{group}: AUROC/OOD+/ID+" for group in groups]
    against = found.settings["against"]
    compared = found.comparison
    if len(compared):
        compared = compared[compared["set"] == "mean"].set_index(["method", "metric"])
        header += [f"p vs {against}", "verdict"]
    rows = []
    for name in order:
        row = [name, *(_cell(means.loc[(name, "all", metric)]) for metric in SHOWN)]
        row += ["/".join(f"{100 * means.loc[(name, group, m), 'value']:.1f}" for m in SHOWN) for group in groups]
        if len(compared):
            row += _tested(compared, name)
        rows.append(row)
    return [header, *rows]


def _tested(compared: pd.DataFrame, name: str) -> list[str]:
    """Holm's p of the AUROC's difference, and where the three metrics decide the same way, the verdict."""
    if (name, "auroc") not in compared.index:
        return ["", "(reference)"]
    verdicts = {metric: compared.loc[(name, metric), "verdict"] for metric in SHOWN}
    p = compared.loc[(name, "auroc"), "p_holm"]
    if len(set(verdicts.values())) == 1:
        return [f"{p:.2g}", verdicts["auroc"]]
    decided = [f"{verdict} {_SHORT[metric]}" for metric, verdict in verdicts.items() if verdict != "undecided"]
    return [f"{p:.2g}", ", ".join(decided)]


def _cell(row) -> str:
    if pd.isna(row.lo):
        return f"{100 * row.value:.1f}"
    return f"{100 * row.value:.1f} [{100 * row.lo:.1f}, {100 * row.hi:.1f}]"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _legend(found: Evaluation) -> list[str]:
    n_boot, against = found.settings["n_boot"], found.settings["against"]
    lines = [
        "Percent; unweighted means over the OOD sets. Single sets and further metrics are in the CSV (--out).",
        "FPR95 OOD+: ID rejected where 95 % of OOD are caught (as OpenOOD); ID+: OOD accepted where 95 % of ID stay.",
    ]
    if n_boot["intervals"]:
        lines += [
            f"[95 % intervals] by {n_boot['intervals']} bootstrap replicates over both sides. p: of the difference in "
            "AUROC, by DeLong,",
            f"corrected by Holm over all methods. verdict: against {against} at 5 %, on all three metrics (FPR95 by "
            f"{n_boot['comparison']} paired",
            "replicates) or on those named.",
        ]
    if len(found.comparison) and (found.comparison["p_at_most"] & (found.comparison["p_holm"] >= 0.05)).any():
        lines.append("Some FPR95 are too clear for so few replicates to say so after Holm: give a larger --n-boot.")
    return lines


def _verdicts(table: pd.DataFrame) -> list[str]:
    verdict = pixel_controls_verdict(table) if not set(table["method"]).isdisjoint(("sharpness",)) else pd.DataFrame()
    return ["", "Pixel controls:", *(f"  {words}" for words in verdict["words"])] if len(verdict) else []


def _left_out(left_out: dict[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        by_reason.setdefault(why, []).append(name)
    return ["", "Left out:", *(f"  {', '.join(n)}: {why}" for why, n in by_reason.items())] if by_reason else []
