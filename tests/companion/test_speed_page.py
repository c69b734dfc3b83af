"""The page on speed says what the files say: numbers, targets that are met or not, and what was never measured."""

from __future__ import annotations

import json
import re

import pytest

from companion.publish import plan
from companion.publish.speed_page import read_results, speed_page

SHAPE = {"d": 192, "latents": 1920, "k": 32, "batch": 4096}


def rate(trainer: str, vectors: float, ratio: float) -> dict:
    numbers = {"trainer": trainer, "rate": vectors, "rates": [vectors]}
    numbers |= {"fastest_peer": "theirs", "of_fastest_peer": ratio}
    return SHAPE | numbers | {"fvu": 0.2, "dead_fraction": 0.0, "load": [0.1, 0.2]}


def write(folder, ratio: float, gpu: bool = False) -> None:
    step = SHAPE | {"step_ms": 20.0, "product_ms": 8.0, "read_ms": 1.0, "load": [0.1, 0.2]}
    table = {"machine": "A, 2 cores", "threads": 2, "lr": 0.004, "versions": {"torch": "2"}, "missing": {"x": "broken"}}
    table |= {"memory": [SHAPE | {"trainer": "theirs", "peak_mb": 512.0}]}
    table |= {"rates": [rate("capsae", 1e5 * ratio, ratio), rate("theirs", 1e5, 1.0)], "floor": [step], "scan": [step]}
    (folder / "a-sae.json").write_text(json.dumps(table))
    if gpu:
        run = {"part": "paper", "seconds": 20.0, "rate": 6.4e6, "fvu": [0.1], "peak_bytes": 2**32}
        (folder / "g-sae-gpu.json").write_text(json.dumps({"gpu": "G", "results": [run]}))


@pytest.mark.parametrize("ratio, verdict", [(8.5, "| met |"), (7.5, "| not met |")])
def test_a_target_is_met_or_not(tmp_path, ratio, verdict):
    write(tmp_path, ratio)
    line = next(line for line in speed_page(tmp_path).splitlines() if "at least 8 times" in line)
    assert line.endswith(verdict) and f"{ratio:.1f} times theirs" in line


def test_what_was_not_measured_says_so(tmp_path):
    write(tmp_path, 8.0)
    page = speed_page(tmp_path)
    assert "| 512 |" in page
    assert page.count("**not measured**") == 4 and "has not run on a GPU" in page and "x was left out: broken" in page
    write(tmp_path, 8.0, gpu=True)
    page = speed_page(tmp_path)
    assert page.count("**not measured**") == 3 and "| 20.0 s | met |" in page and "has not run on a GPU" not in page


def test_the_committed_page_is_made_from_the_committed_files():
    def text(page: str) -> str:
        return re.sub(r"<figure.*?</figure>", "", page, flags=re.S)

    made = speed_page(plan.root() / "benchmarks" / "results")
    committed = (plan.root() / "book" / "speed.md").read_text(encoding="utf-8")
    assert text(committed) == text(made), "run python -m companion.build pages"
    assert read_results(plan.root() / "benchmarks" / "results")["sae"], "no machine's file: run make bench"
