"""The idea in one figure: a class's profile, and an ID and an OOD image on the same latents, with their EPD."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from capsae.caps import energy_profile_divergence
from capsae.pipeline.latents import class_names

from .figures import BLUE, ORANGE, _figure, set_label

LATENTS = 60  # of the core, the class's strongest first: what comes after them is too small to be seen


def hero_data(run) -> pd.DataFrame:
    """Profile Q of a class and codes P of two images on its core: the median ID test image and the median OOD image.

    The class is the one for which most OOD images are taken; both images are those of median EPD, so that neither is a
    chosen example. Columns: panel, class, set, epd (nats), rank (1 = the class's strongest latent), expected (Q),
    share (P).
    """
    caps, fraction = run.caps, run.experiment.caps.core_fraction
    sets = {name: run.observations(name) for name in ("test", *run.experiment.ood_sets)}
    taken = sum(np.bincount(obs.predicted, minlength=caps.n_classes) for name, obs in sets.items() if name != "test")
    c = int(np.argmax(taken))
    core = caps.core(fraction)[c]
    expected = caps.mean[c, core] / caps.mean[c, core].sum()
    found = []
    for panel, names in (("ID test image", ["test"]), ("OOD image", run.experiment.ood_sets)):
        all_of = []
        for name in names:
            rows = np.flatnonzero(sets[name].predicted == c)
            epd = energy_profile_divergence(sets[name].codes[rows], np.full(len(rows), c), caps, fraction)
            all_of += [(float(value), name, int(row)) for value, row in zip(epd, rows, strict=True)]
        epd, name, row = sorted(all_of)[len(all_of) // 2]
        inside = sets[name].codes[np.array([row])].dense()[0, core]
        ranks = np.arange(1, len(core) + 1)
        frame = pd.DataFrame({"rank": ranks, "expected": expected, "share": inside / inside.sum()})
        found.append(frame.assign(panel=panel, **{"class": class_names(run)[c]}, set=name, epd=epd).head(LATENTS))
    return pd.concat(found, ignore_index=True)


def hero(data: pd.DataFrame) -> Figure:
    """Two panels of :func:`hero_data`: Q as a filled curve, P as bars."""
    figure, axes = _figure(7, 4.4, 2, 1, sharex=True, sharey=True)
    for ax, (panel, rows) in zip(axes.flat, data.groupby("panel", sort=False), strict=True):
        first = rows.iloc[0]
        ax.fill_between(rows["rank"], rows["expected"], step="mid", color=BLUE, alpha=0.45, label="Q: the class")
        fired = rows[rows["share"] > 0]
        ax.vlines(fired["rank"], 0, fired["share"], color=ORANGE, linewidth=2.4, label="P: the image")
        where = "" if first["set"] == "test" else f" ({set_label(first['set'])})"
        ax.set_title(f"{panel}{where}, taken for {first['class']}: EPD {first['epd']:.2f} nats", loc="left")
        ax.set(ylabel="share of energy", xlim=(0.4, rows["rank"].max() + 0.6))
    axes[0, 0].set_ylim(bottom=0)
    axes[-1, 0].set_xlabel("latents of the class's core, its strongest first")
    axes[0, 0].legend(loc="upper right")
    return figure
