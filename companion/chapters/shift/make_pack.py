"""Makes corrupted copies of an experiment's ID test images into a pack of features.

    python -m companion.chapters.shift.make_pack imagenet20 --set data_root=FOLDER --out FOLDER

is how the embedded pack ``imagenet20_shift`` was made; any experiment with images gets one of its own in the same way.
A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .corruptions import CORRUPTIONS, STRENGTHS, VERSION, corrupted

PER_CLASS = 25  # images: 20 sets of 500 are a quarter of an hour on one core, and well under the size of a pack


def balanced_rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Row numbers, ascending: at most ``per_class`` of each class, evenly spaced over its rows."""
    kept = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        size = min(per_class, len(rows))
        kept.append(rows[np.linspace(0, len(rows) - 1, size).round().astype(int)])
    return np.sort(np.concatenate(kept))


def make_shift_pack(
    run,
    out: str | Path,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    strengths: Sequence[int] = STRENGTHS,
    per_class: int = PER_CLASS,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    max_bytes: int | None = None,
    **options,
) -> Path:
    """Extract the corrupted ID test images of an experiment into a pack; its sets are called ``blur/1`` and so on.

    Returns
    -------
    Path
        ``out``, for ``companion.chapters.shift.maths.sets(run, pack=out)``.

    Notes
    -----
    An image is brought to the backbone's input (resized and cropped as the experiment has it) first and corrupted then,
    as in ImageNet-C; the backbone that follows crops nothing more.
    """
    from capsae.features.backbone import load_backbone
    from capsae.pipeline.packs import make_pack

    given = dict(run.inputs.backbone_settings(checkpoint))
    seen = load_backbone(given)
    backbone = load_backbone(given | {"crop": 1.0})
    source = run.inputs.source("test")
    source = source.take(balanced_rows(source.labels, per_class))

    def prepare(image: Image.Image) -> Image.Image:
        return Image.fromarray(seen.prepare(image))

    sources = {f"{name}/{s}": corrupted(source, name, s, seed, prepare) for name in names for s in strengths}
    notes = (
        f"ID test images of experiment {run.experiment.name!r}, at most {per_class} a class and the same in all sets, "
        "corrupted at the size that the backbone sees by companion.chapters.shift.corruptions "
        f"(version {VERSION}, seed {seed}); constants after ImageNet-C (arXiv 1903.12261). "
        "Labels and ids are those of the test images. "
        f"Made by `python -m companion.chapters.shift.make_pack {run.experiment.name}`. "
        "Pixel statistics are those of the corrupted images; file_size is that of their PNG."
    )
    return make_pack(
        f"{run.experiment.name}_shift", sources, backbone, out, notes=notes, max_bytes=max_bytes, **options
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module."""
    from capsae.pipeline.experiments import overrides_of
    from capsae.pipeline.run import Run

    parser = argparse.ArgumentParser(prog="python -m companion.chapters.shift.make_pack", description=__doc__)
    parser.add_argument("experiment", help="name, or path of a .toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the experiment")
    parser.add_argument("--out", type=Path, help="folder of the pack (default: packs/EXPERIMENT_shift)")
    parser.add_argument("--checkpoint", type=Path, help="weights of the backbone")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help=f"images (default: {PER_CLASS})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--workers", type=int, help="decoding threads")
    chosen = parser.parse_args(arguments)
    run = Run(chosen.experiment, overrides_of(chosen.set))
    out = chosen.out or Path("packs") / f"{run.experiment.name}_shift"
    make_shift_pack(
        run, out, per_class=chosen.per_class, seed=chosen.seed, checkpoint=chosen.checkpoint, workers=chosen.workers
    )
    sys.stdout.write(f"{out}: for companion.chapters.shift.maths.sets(run, pack={str(out)!r})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
