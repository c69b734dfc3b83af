"""Interactive pieces of the book: a run's numbers as JSON inside the page, drawn by ``book/_static/widgets.js``.

Everything is inside the page, since a browser reads no other file under file://. Without scripts, and in Jupyter, the
static table that each piece carries stays.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from capsae.caps import energy_profile_divergence
from capsae.detectors import info
from capsae.latents import naming
from capsae.pipeline.latents import class_names, of_run

METRICS = {
    "fpr95_ood_pos": "FPR95, OOD positive, %",
    "fpr95_id_pos": "FPR95, ID positive, %",
    "auroc": "AUROC, %",
}
BINS = 240  # of a score's histogram: an error rate is exact to one bin
SHOWN = 40  # latents of a core in the viewer, the class's strongest first


def widget(kind: str, label: str, data: dict, static: pd.DataFrame) -> str:
    """The HTML of a piece: ``static`` for readers without scripts, ``data`` for the script, ``label`` its name."""
    table = static.to_html(index=False, border=0, float_format="{:.1f}".format, na_rep="", classes="capsae-static")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<div class="capsae-widget" data-kind="{kind}" role="group" aria-label="{html.escape(label)}">{table}'
        f'<script type="application/json">{text}</script></div>'
    )


def show(kind: str, label: str, data: dict, static: pd.DataFrame) -> None:
    """Display a piece in a notebook."""
    from IPython.display import HTML, display

    display(HTML(widget(kind, label, data, static)))


def results(tables: Mapping[str, pd.DataFrame]) -> str:
    """The HTML of every score's means over near, far and all OOD sets, to sort, filter and switch between metrics.

    ``tables``: by experiment, what 04_score_ood published as ``all_detectors.csv``, in %.
    """
    rows, best = [], {}
    for experiment, table in tables.items():
        for r in table.to_dict("records"):
            for metric in METRICS:
                numbers = [r[f"{metric}_{part}"] for part in ("value", "lo", "hi")]
                rows.append([r["method"], r["kind"], r["group"], metric, *_rounded(numbers, 1), experiment])
        best[experiment] = table[table["group"] == "all"].set_index("method")["fpr95_ood_pos_value"]
    static = (
        pd.DataFrame(best).sort_values(next(iter(best))).head(25).rename_axis("FPR95 (OOD positive), %").reset_index()
    )
    return widget("results", "All scores", {"metrics": METRICS, "rows": rows}, static)


def threshold(run, methods: Iterable[str] = ("epd", "rpd", "rpd+", "energy", "vim", "mds++", "msp")) -> None:
    """Histograms of a score with a threshold to move: how many ID images it flags and how many OOD images it misses."""
    scores, data, static = run.scores(), {}, []
    for method in methods:
        rows = scores[(scores["method"] == method) & (scores["group"] != "shifted") & (scores["set"] != "val")]
        edges = np.linspace(*np.quantile(rows["score"], [0.001, 0.999]), BINS + 1)
        clipped = rows.assign(score=rows["score"].clip(edges[0], edges[-1]))
        counts = {g: np.histogram(of["score"], edges)[0].tolist() for g, of in clipped.groupby("group", sort=False)}
        title = info(method)["title"]
        data[title] = {"lo": float(f"{edges[0]:.6g}"), "hi": float(f"{edges[-1]:.6g}"), "counts": counts}
        cut = np.quantile(rows.loc[rows["group"] == "id", "score"], 0.95)
        missed = [100 * (rows.loc[rows["group"] == g, "score"] <= cut).mean() for g in ("near", "far")]
        static.append((title, cut, *missed))
    columns = ["score", "threshold that flags 5 % of ID", "near OOD missed, %", "far OOD missed, %"]
    show("threshold", "Threshold of a score", {"scores": data}, pd.DataFrame(static, columns=columns))


def profiles(run) -> None:
    """A class's profile Q on its core against the code P of an ID and OOD images taken for that class."""
    caps, names, fraction = run.caps, class_names(run), run.experiment.caps.core_fraction
    core, data = caps.core(fraction), []
    sets = {name: run.observations(name) for name in ("test", *run.experiment.ood_sets)}
    for c, name in enumerate(names):
        place = core[c]
        q = caps.mean[c, place] / caps.mean[c, place].sum()
        samples = []
        for of, obs in sets.items():
            rows = np.flatnonzero(np.asarray(obs.predicted) == c)
            if not len(rows):
                continue
            epd = energy_profile_divergence(obs.codes[rows], np.full(len(rows), c), caps, fraction)
            middle = int(np.argsort(epd, kind="stable")[len(rows) // 2])  # the median image, not the one that fits best
            inside = obs.codes[rows[[middle]]].dense()[0, place]
            p = inside / max(inside.sum(), 1e-12)
            rest = _rounded(p[SHOWN:].sum(), 1, 4)
            samples.append([of, float(f"{epd[middle]:.4g}"), _rounded(p[:SHOWN], 1, 4), rest])
        data.append([name, place[:SHOWN].tolist(), _rounded(q[:SHOWN], 1, 5), samples])
    static = pd.DataFrame([(d[0], s[0], s[1]) for d in data[:4] for s in d[3]], columns=["class", "set", "EPD, nats"])
    show("profiles", "Profiles of classes", {"classes": data, "core": int(core.shape[1])}, static)


def latents(run) -> None:
    """Every latent that fires: how often, for which classes, and its name."""
    table = of_run(run).table
    table = table[table["fired"] > 0].sort_values("density", ascending=False, kind="stable")
    numbers = table[["density", "selectivity"]].to_numpy() * (100, 1)
    rows = [
        [int(r.latent), *_rounded(pair, 1, 2), r.kind, r.name, r.classes]
        for r, pair in zip(table[["latent", "kind", "name", "classes"]].to_records(index=False), numbers, strict=True)
    ]
    static = table[["latent", "density", "selectivity", "name", "classes"]].head(10)
    show("latents", "Latents", {"kinds": naming.KIND_TITLES, "rows": rows}, static)


def _rounded(values, factor: float, digits: int = 1):
    """Rounded plain numbers, None for what is not finite (JSON has no NaN)."""
    array = np.round(factor * np.asarray(values, np.float64), digits)
    return [float(v) if np.isfinite(v) else None for v in array] if array.ndim else float(array)
