"""The book's interactive pieces, in a real browser where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion import widgets

SCRIPT = Path(__file__).resolve().parents[2] / "book" / "_static" / "widgets.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STATIC = pd.DataFrame({"score": ["EPD"], "value": [9.8]})

RESULTS = {
    "metrics": {"fpr95_ood_pos": "FPR95", "auroc": "AUROC"},
    "rows": [
        ["EPD", "paper", "all", "fpr95_ood_pos", 9.8, 8.3, 11.6, "one"],
        ["EPD", "paper", "all", "auroc", 97.0, 96.0, 98.0, "one"],
        ["ViM", "baseline", "all", "fpr95_ood_pos", 6.2, 5.2, 7.5, "one"],
        ["MSP", "baseline", "all", "fpr95_ood_pos", 15, None, None, "one"],
        ["KNN", "baseline", "all", "fpr95_ood_pos", 7, None, None, "two"],
    ],
}
THRESHOLD = {"scores": {"EPD": {"lo": 0, "hi": 10, "counts": {"id": [60, 35, 5, 0], "near": [10, 10, 40, 40]}}}}
SAMPLES = [["test", 0.5, [0.5, 0.5], 0.0], ["far/x", 2.5, [0, 0.1], 0.9]]
PROFILES = {"classes": [["tench", [7, 3], [0.6, 0.4], SAMPLES]], "core": 4}
LATENTS = {
    "kinds": {"class": "one class"},
    "rows": [[7, 9.5, 0.9, "class", "tench", ""], [3, 2.0, 0.1, "class", "", "dog"]],
}


def test_data_lie_in_the_page_and_no_text_can_end_the_script():
    html = widgets.widget("latents", 'a "label"', {"name": "</script><b>"}, STATIC)
    text = html.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(text) == {"name": "</script><b>"}
    assert "EPD" in html and "a &quot;label&quot;" in html


def test_all_scores_of_all_experiments_are_in_the_explorer():
    names = ("value", "lo", "hi")
    row = {f"{metric}_{part}": float(i) for i, metric in enumerate(widgets.METRICS) for part in names}
    table = pd.DataFrame(
        [{"method": m, "kind": "paper", "group": g} | row for m in ("EPD", "MSP") for g in ("near", "all")]
    )
    html = widgets.results({"one": table, "two": table.head(2).assign(auroc_lo=np.nan)})
    rows = json.loads(html.split('<script type="application/json">')[1].split("</script>")[0])["rows"]
    assert len(rows) == (4 + 2) * len(widgets.METRICS) and {tuple(r[7:]) for r in rows} == {("one",), ("two",)}
    assert ["EPD", "paper", "all", "auroc", 2.0, None, 2.0, "two"] in rows


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    if CHROMIUM is None:
        pytest.skip("no browser: install chromium to test the interactive pieces")
    pieces = {"results": RESULTS, "threshold": THRESHOLD, "profiles": PROFILES, "latents": LATENTS}
    body = "".join(widgets.widget(kind, kind, data, STATIC) for kind, data in pieces.items())
    actions = """
    const errors = []; addEventListener("error", (e) => errors.push(e.message));
    addEventListener("DOMContentLoaded", () => setTimeout(() => {
      const of = (kind) => document.querySelector(`[data-kind=${kind}]`), out = { errors };
      const column = (kind, i = 0) => [...of(kind).querySelectorAll("tbody tr")].map((r) => r.cells[i].textContent);
      const set = (node, value, type = "change") => { node.value = value; node.dispatchEvent(new Event(type)); };
      out.first = column("results");
      of("results").querySelectorAll("th button")[0].click(); out.byName = column("results");
      set(of("results").querySelector("input"), "vi", "input"); out.found = column("results");
      set(of("results").querySelector("input"), "", "input");
      const [experiment, metric] = of("results").querySelectorAll("select");
      set(experiment, "two"); out.second = column("results"); set(experiment, "one");
      set(metric, "auroc"); out.auroc = column("results", 2);
      const status = (kind) => of(kind).querySelector("p[role=status]").textContent;
      out.start = status("threshold");
      set(of("threshold").querySelector("input"), 1, "input"); out.moved = status("threshold");
      out.id = status("profiles"); set(of("profiles").querySelectorAll("select")[1], 1); out.ood = status("profiles");
      out.latents = column("latents");
      of("latents").querySelectorAll("th button")[0].click(); out.sorted = column("latents");
      out.unlabelled = [...document.querySelectorAll("input, select")].filter((c) => !c.labels.length).length;
      out.static = document.querySelectorAll(".capsae-static").length;
      const pre = document.createElement("pre");
      pre.id = "out"; pre.textContent = JSON.stringify(out); document.body.append(pre);
    }, 50));"""
    page = tmp_path_factory.mktemp("page") / "page.html"
    head = f"<meta charset=utf-8><script>{actions}</script><script src='{SCRIPT.as_uri()}'></script>"
    page.write_text(head + body, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    flags.append(f"--user-data-dir={page.parent / 'browser'}")
    run = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, env=os.environ
    )
    text = run.stdout.split('<pre id="out">')[1].split("</pre>")[0]
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_results_sort_filter_and_change_the_metric(seen):
    assert seen["errors"] == [] and seen["static"] == 0 and seen["unlabelled"] == 0
    assert seen["first"] == ["ViM", "EPD", "MSP"]  # the best first
    assert seen["byName"] == ["EPD", "MSP", "ViM"]
    assert seen["found"] == ["ViM"] and seen["second"] == ["KNN"]
    assert [text.split()[0] for text in seen["auroc"]] == ["97.0"]


def test_the_threshold_tells_both_error_rates(seen):
    assert seen["start"] == "Threshold 5.00. ID flagged: 5.0 %. near OOD missed: 20.0 %."
    assert seen["moved"] == "Threshold 2.50. ID flagged: 40.0 %. near OOD missed: 10.0 %."


def test_the_viewer_tells_the_score_of_the_chosen_image(seen):
    assert "EPD 0.50 nats" in seen["id"] and "far/x" in seen["ood"] and "EPD 2.50 nats; 90 %" in seen["ood"]


def test_latents_come_densest_first_and_sort(seen):
    assert seen["latents"] == ["7", "3"] and seen["sorted"] == ["3", "7"]
