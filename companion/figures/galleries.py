"""Images behind latents, profiles and scores, where ``show_images`` allows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from capsae.caps import energy_profile_divergence
from capsae.pipeline.latents import class_names

from .figures import image_grid


def shown(page, name: str, made, *args, **options) -> None:
    """Show ``made(*args)``, a grid of images, on a page (findings.Chapter) whose images may be given away."""
    if page.run.experiment.show_images:
        data, images = made(*args, **options)
        page.show(image_grid, data, name, images=images)


def top_images(run, classes: int = 4, images: int = 8) -> tuple[pd.DataFrame, list]:
    """Images behind latents and profiles: rows of titles, and the images.

    For each of the first classes: the training images that drive the strongest latent of its profile most, and the ID
    test images with the lowest EPD among those predicted as the class.
    """
    codes, caps, names = run.codes("train"), run.caps, class_names(run)
    seen = run.observations("test")
    epd = energy_profile_divergence(seen.codes, seen.predicted, caps, run.experiment.caps.core_fraction)
    rows, pictures = [], []
    for c in range(min(classes, caps.n_classes)):
        latent = int(caps.core(run.experiment.caps.core_fraction)[c, 0])
        activation = np.where(codes.indices == latent, codes.values, 0).sum(axis=1)
        for row in np.argsort(-activation, kind="stable")[:images]:
            rows.append((f"latent {latent}\n({names[c]})", f"{activation[row]:.1f}"))
            pictures.append(run.image("train", int(row)))
        own = np.flatnonzero(seen.predicted == c)
        for row in own[np.argsort(epd[own], kind="stable")[:images]]:
            rows.append((f"profile of\n{names[c]}", f"EPD {epd[row]:.2f}"))
            pictures.append(run.image("test", int(row)))
    return pd.DataFrame(rows, columns=["row", "title"]), pictures


def extreme_images(run, scores: pd.DataFrame, method: str = "epd", images: int = 8) -> tuple[pd.DataFrame, list]:
    """The images with the lowest and highest scores of ID test and of each OOD set."""
    rows, pictures = [], []
    for name in ("test", *run.experiment.ood_sets):
        part = scores[(scores["method"] == method) & (scores["set"] == name)].sort_values("score", kind="stable")
        short = name.split("/")[-1].replace("_", " ")
        for heading, ends in ((f"{short}\nlowest", part.head(images)), (f"{short}\nhighest", part.tail(images)[::-1])):
            for found in ends.itertuples():
                rows.append((heading, f"{found.score:.2f}"))
                pictures.append(run.image(name, int(found.row)))
    return pd.DataFrame(rows, columns=["row", "title"]), pictures
