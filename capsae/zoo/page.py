"""The page of the book that lists every autoencoder and dictionary, made from their own metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .fitting import KINDS, member, members

NAMED = {  # sources without an arXiv number, by the words of the metadata
    "Bricken et al. 2023": "bricken2023monosemanticity",
    "Ding, Li, Jordan 2008": "ding2010convex",
    "Lloyd 1982": "lloyd1982least",
    "Pearson 1901": "pearson1901lines",
}
# Recipes that were looked at and not ported: name, source, reason.
NOT_APPLICABLE = (
    (
        "FAST",
        "arXiv 2506.07691",
        "a recipe for the order and mixture of chat text that an SAE of an instruction-tuned language model is "
        "trained on. Single images have no dialogue and one [CLS] each: there is nothing to port.",
    ),
    (
        "End-to-end SAEs",
        "",
        "train through the rest of a language model. After the [CLS] there is one linear head, whose gradient `gsae` "
        "uses.",
    ),
    (
        "Transcoders and crosscoders",
        "",
        "map one place of a network to another, or join several. This book's features come from one place; the chapter "
        "on layers compares places with an SAE each.",
    ),
)
_PLURALS = {"variant": "Sparse autoencoders", "dictionary": "Dictionaries without gradients", "control": "Controls"}
_INTROS = {
    "variant": "Trained by gradient, all in one loop: a variant is a rule that selects, terms of the loss and a start. "
    "$z = W_{\\mathrm{enc}}(x - b) + c$ are the pre-activations of a normalised feature $x$, $a$ is the code, "
    "$w_i$ are unit rows of the decoder $D$, and $\\hat x = \\sum_i a_i w_i + b$. "
    "`SAEConfig(variant=\"jumprelu\")`, `capsae train --set sae.variant=jumprelu` or a profile's `[sae]` choose one; "
    "`options` are its parameters. All but MP-SAE and VL-SAE also have AuxK, at 1/32: dead latents learn to "
    "reconstruct what is left over; "
    "it is [r] for ReLU, Gated, JumpReLU and GBA, whose sources have none, and in AbsTopK it revives the "
    "positive side alone. Mutual Choice and Feature Choice count as dead what fires less than Zipf's curve says.",
    "dictionary": "Fitted without gradients, behind the same `fit`, `encode`, `decode`, `save` and `load`: "
    "`dictionaries.create(\"itda\", latents=1920, k=32).fit(x)`. $u$ is a normalised and centred feature.",
    "control": "What any dictionary of this size gives, or none at all. A trained one that does no better has found "
    "nothing that matters to the measure in question.",
}  # fmt: skip


# What a member's own words leave out; the page adds it to them.
_NOTES = {
    "jumprelu": "The weight of the pull to k, 3, is [r].",
    "feature_choice": "The m_i are rounded, and at least one and at most all of a batch [r].",
    "archetypal": "With 1,920 latents and 512 centroids, and no noise at the start, groups of three or four latents "
    "start out identical: many still have a near twin after training.",
    "itda": "The cap `admit`, the order (the worst first) and the threshold `duplicate` are [r].",
    "semi_nmf": "That Z is dense while fitting, with k latents chosen for new rows alone, is [r].",
}


def dictionaries_page(references: Path, heading: str) -> str:
    """The Markdown of dictionaries.md, from the metadata of every member; sources become citations."""
    keys = citations(references)
    lines = [
        heading.rstrip(),
        "",
        "# Sparse autoencoders and dictionaries",
        "",
        "Every member of the {doc}`zoo <runs/imagenet20/08_zoo>`, made from the program's own metadata. **[s]** stands "
        "for what is as in the source, **[r]** for what is our reconstruction: sources leave things open, and some "
        "were read through public notes alone. Codes are never negative: where a method has signed coefficients "
        "(`abs_topk`, `itda`, `pca`), positive and negative parts are two latents. Where a source leaves the number of "
        "active latents to a coefficient, the coefficient is moved until it is $k$.",
        "",
    ]
    for kind in KINDS:
        lines += [f"## {_PLURALS[kind]}", "", _INTROS[kind], ""]
        for one in map(member, members(kind)):
            lines += [
                f"### {one.title} (`{one.name}`)",
                "",
                f"$$\n{one.formula}\n$$",
                "",
                " ".join(filter(None, (_prose(one.description), _NOTES.get(one.name)))),
                "",
                f"Parameters: {_options(one.defaults)}.{_budget(one)} Source: {cited(one.source, keys)}.",
                "",
            ]
    lines += ["## Not in the zoo", ""]
    for name, source, why in NOT_APPLICABLE:
        lines.append(f"- **{name}**{f' ({cited(source, keys)})' if source else ''}: {why}")
    return "\n".join([*lines, ""])


def citations(references: Path) -> dict[str, str]:
    """Keys of the bibliography by arXiv number, and those of `NAMED`."""
    entries = re.split(r"\n(?=@)", references.read_text(encoding="utf-8"))
    found = {}
    for entry in entries:
        key = re.match(r"\s*@\w+\{(\w+),", entry)
        for number in re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", entry):
            found[f"arXiv {number}"] = key[1]
    return found | NAMED


def cited(source: str, keys: Mapping[str, str]) -> str:
    """A source's words with a citation after each work that the bibliography has."""
    known = "|".join(map(re.escape, keys))
    return re.sub(known, lambda at: f"{{cite:p}}`{keys[at[0]]}`", source) if keys else source


def _budget(one) -> str:
    notes = []
    if one.small:
        notes.append(" In the zoo it has $d$ atoms.")
    if not one.targets_k:
        notes.append(" $k$ is not used: in the zoo its number of active latents is what it is.")
    if not one.seeded:
        notes.append(" No random numbers: one fit stands for all seeds.")
    return "".join(notes)


def _options(options: Mapping) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none"


def _prose(docstring: str) -> str:
    """The prose of a docstring: up to its first underlined section, one line, double backticks as Markdown has them."""
    prose = re.split(r"\n\s*[A-Z][a-z]+(?: \([^)]*\))?\n\s*-{3,}", docstring or "")[0]
    return " ".join(prose.replace("``", "`").split())
