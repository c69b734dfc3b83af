"""The extract of WordNet that capsae embeds, made again: python -m companion.chapters.ontology.make_wordnet FOLDER."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from capsae.files import replacing
from capsae.latents.wordnet import EXTRACT, extract, wnid


def packed_wnids() -> list[str]:
    """Every synset that names a class in an embedded pack, near OOD sets included; sorted."""
    from capsae.pipeline.packs import load_pack, pack_sets, packs

    names = (name for pack in packs() for of in pack_sets(pack) for name in load_pack(pack, of).class_names)
    return sorted({found for name in names if (found := wnid(name))})


def write_extract(folder: str | Path, wnids: Iterable[str], out: str | Path = EXTRACT) -> Path:
    """Write :func:`extract` as JSON, one synset a line."""
    found = extract(folder, wnids)
    rows = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.pop("synsets").items()]
    head = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]
    text = "{\n" + ",\n".join(head) + ',\n "synsets": {\n' + ",\n".join(rows) + "\n }\n}\n"
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(out)


if __name__ == "__main__":
    sys.stdout.write(f"{write_extract(sys.argv[1], packed_wnids())}\n")
