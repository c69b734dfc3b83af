"""Why one sample got its score: each latent's share, and the classes that the latent belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..caps import ClassActivationProfiles, core_reference
from ..data.asarray import as_numpy
from ..detectors import OURS, Observations

COLUMNS = ["latent", "profile", "expected", "share", "kind", "classes"]
TOP_CLASSES = 3


def explain_epd(
    codes, predicted: int, caps: ClassActivationProfiles, core_fraction: float = 0.15, class_names: Sequence[str] = ()
) -> pd.DataFrame:
    """Take one sample's EPD (``codes`` has one row, scored under the class ``predicted``) apart, latent by latent.

    Returns
    -------
    DataFrame
        One row for each latent of the class's core, largest absolute share first: latent, profile (P), expected (Q),
        share (``P log(P/Q)`` in nats; the shares sum to the score), kind ("too much": P > Q, "missing": P < Q, "as
        expected": equal), classes (where the latent's mean activation lies, top 3). A latent that does not fire has
        share 0: EPD is blind to it, but it raises the others' P. Where EPD is undefined, one row "of no latent"
        (latent -1), or the rows "unknown to the class" (Q = 0), carry the whole score; see
        :func:`capsae.caps.core_reference`.
    """
    code = _dense(codes)
    reference, largest = core_reference(caps, core_fraction)
    core = caps.core(core_fraction)[predicted].astype(np.int64)
    p, q = code[core], reference[predicted, core]
    p = p / p.sum() if p.sum() > 0 else p
    fires, unknown = p > 0, (p > 0) & (q <= 0)
    shares = np.zeros(len(core))
    if unknown.any():
        shares[unknown] = largest * p[unknown] / p[unknown].sum()
    else:
        shares[fires] = p[fires] * np.log(p[fires] / q[fires])
    return _table(core, p, q, shares, 0.0 if fires.any() else largest, caps, class_names)


def explain_slots(
    codes,
    shares: np.ndarray,
    score: float,
    predicted: int,
    caps: ClassActivationProfiles,
    class_names: Sequence[str] = (),
) -> pd.DataFrame:
    """Tabulate the shares (k,) that a detector gives the slots of one sample's code.

    As :func:`explain_epd`, but over the whole dictionary: P is the code over its sum, Q the predicted class's profile
    over its sum. What the shares lack of ``score`` stands in a row of its own (latent -1).
    """
    code, slots = _dense(codes), as_numpy(codes.indices)[0].astype(np.int64)
    share = np.zeros(caps.n_latents)
    np.add.at(share, slots, np.asarray(shares, np.float64))
    q = caps.mean[predicted] / max(caps.mean[predicted].sum(), 1e-300)
    latents = np.flatnonzero((code > 0) | (q > 0))
    p = code[latents] / code.sum() if code.sum() > 0 else code[latents]
    rest = score - share.sum()
    rest = 0.0 if abs(rest) <= 1e-9 * max(1.0, abs(score)) else rest
    return _table(latents, p, q[latents], share[latents], rest, caps, class_names)


def _dense(codes) -> np.ndarray:
    """One sparse code as (M,) float64."""
    if len(codes) != 1:
        raise ValueError(f"codes has {len(codes)} rows, one sample is explained at a time")
    code = np.zeros(codes.n_latents)
    np.add.at(code, as_numpy(codes.indices)[0].astype(np.int64), as_numpy(codes.values)[0])  # unused slots hold 0
    return code


def _table(latents, p, q, shares, rest: float, caps: ClassActivationProfiles, class_names) -> pd.DataFrame:
    """One row a latent, largest absolute share first; ``rest`` gets a row of its own unless it is 0."""
    table = pd.DataFrame({"latent": latents, "profile": p, "expected": q, "share": shares})
    if rest:
        whole = pd.DataFrame({"latent": [-1], "profile": [0.0], "expected": [0.0], "share": [rest]})
        table = pd.concat([whole, table], ignore_index=True)
    table["kind"] = [_kind(row.latent, row.profile, row.expected) for row in table.itertuples()]
    classes = _classes(table["latent"], caps, class_names)
    table["classes"] = pd.Series(classes, dtype=object)  # folders' names may be no UTF-8, which pandas' strings refuse
    order = np.lexsort((-table["expected"], -table["share"].abs()))
    return table.iloc[order].reset_index(drop=True)[COLUMNS]


def explain(run, obs: Observations, row: int, method: str = "epd") -> pd.DataFrame:
    """Explain a row of ``run.observations(set)``, or of new images: :func:`explain_epd`, :func:`explain_slots`.

    ``method`` is "epd", or a detector that has ``contributions(obs)`` (N, k), as our own have. ValueError for a row
    that is not there, or a method that cannot be taken apart.
    """
    if not 0 <= row < len(obs):
        raise ValueError(f"row is {row}, but there are {len(obs)}: use 0..{len(obs) - 1}")
    one, names = obs.take([row]), run.features("train").class_names
    detector = run.detectors([method])[method]
    if method == "epd":
        return explain_epd(one.codes, int(one.predicted[0]), detector.caps, detector.core_fraction, names)
    if not hasattr(detector, "contributions"):
        raise ValueError(f"method is {method!r}, which is no sum over latents; use 'epd' or {OURS!r}")
    shares, score = detector.contributions(one)[0], float(detector.score(one)[0])
    return explain_slots(one.codes, shares, score, int(one.predicted[0]), detector.caps, names)


def describe(table: pd.DataFrame, score: float, title: str, top: int = 10) -> str:
    """Return an explanation as plain text: the latents that raise the score most, and expected ones that are silent."""
    lines = [title, f"score {score:.4f} = the sum of {int((table['share'] != 0).sum())} latents' shares", ""]
    lines += ["latents that raise it most" + " " * 14 + "share   profile  expected  classes"]
    raising = table[table["share"] > 0].head(top)
    lines += [_text_row(row) for row in raising.itertuples()]
    silent = table[(table["kind"] == "missing") & (table["profile"] == 0)]
    silent = silent.sort_values("expected", ascending=False).head(top)
    if len(silent):
        part = silent["expected"].sum()
        lines += ["", f"expected but silent ({part:.1%} of the class's profile in these {len(silent)})"]
        lines += [_text_row(row) for row in silent.itertuples()]
    return "\n".join(lines)


def plain_name(name: str) -> str:
    """Return an ImageNet class name (``n01440764_tench``) without its WordNet number; others as they are, but for what
    a page or a terminal would act on (tags, control characters).
    """
    name = re.sub(r"^n\d{8}_", "", str(name)).replace("_", " ").replace("<", "‹").replace(">", "›")
    return "".join(c if c.isprintable() else "?" for c in name)


def _text_row(row) -> str:
    name = f"latent {row.latent}" if row.latent >= 0 else "-"
    return f"  {name:<12} {row.kind:<24} {row.share:>+8.4f} {row.profile:>8.4f}  {row.expected:>8.4f}  {row.classes}"


def _kind(latent: int, p: float, q: float) -> str:
    if latent < 0:
        return "of no latent"
    if p > 0 and q <= 0:
        return "unknown to the class"
    return "too much" if p > q else "missing" if p < q else "as expected"


def _classes(latents, caps: ClassActivationProfiles, names: Sequence[str]) -> list[str]:
    """For each latent: the classes that its mean activation lies in, with their parts of it."""
    mean, out = caps.mean, []
    names = [plain_name(name) for name in names] or [f"class {c}" for c in range(len(mean))]
    for latent in np.asarray(latents):
        column = mean[:, latent] if latent >= 0 else np.zeros(1)
        top = [c for c in np.argsort(-column, kind="stable")[:TOP_CLASSES] if column[c] > 0]
        out.append(", ".join(f"{names[c]} {column[c] / column.sum():.0%}" for c in top))
    return out
