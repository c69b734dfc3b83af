from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from capsae import detectors, pages, plan, publish

ROOT = plan.root()
BOOK = ROOT / "book"
RUNS = sorted((BOOK / "runs").rglob("*.ipynb"))


# --- what is committed


def _toc_files(entries) -> list[str]:
    found = []
    for entry in entries:
        if "glob" in entry:
            found += sorted(p.relative_to(BOOK).with_suffix("").as_posix() for p in BOOK.glob(entry["glob"] + ".ipynb"))
        else:
            found += [entry["file"], *_toc_files(entry.get("sections", []))]
    return found


def test_the_table_of_contents_lists_every_page_once_and_nothing_else():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(f for part in toc["parts"] for f in _toc_files(part["chapters"]))]
    runs = {path.relative_to(BOOK).with_suffix("").as_posix() for path in RUNS}
    prose = {path.stem for path in BOOK.glob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == runs | prose
    assert (BOOK / "_toc.yml").resolve() == ROOT / "_toc.yml"


def test_every_page_of_the_plan_is_published_and_no_other():
    assert {publish.page_name(path) for path in RUNS} == set(plan.pages())


def test_published_runs_are_fresh_against_code_data_and_parameters():
    stale = {name: why for name, page in plan.pages().items() if (why := publish.why_stale(page))}
    assert not stale, f"run `make reproduce`; stale: {stale}"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(BOOK / "runs").as_posix())
def test_published_runs_are_clean(path):
    notebook = plan.read_notebook(path)
    assert publish.error_outputs(notebook) == []
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert outputs and not any(o.get("name") == "stderr" for o in outputs)
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_500_000  # two heat maps of 40 detectors, light and dark, are most of the largest page
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users|mnt)/", text)
    assert str(ROOT) not in text
    if not plan._profile(notebook["metadata"]["capsae"]["profile"]).show_images:
        assert 'id=\\"fig-top_images' not in text and 'id=\\"fig-extremes' not in text and "image/jpeg" not in text


def test_claims_and_detectors_pages_are_in_step_with_their_sources():
    claims = pages.read_claims(BOOK / "claims.yml")
    assert (BOOK / "claims.md").read_text() == pages.claims_page(claims, pages._published), "run capsae.build pages"
    assert (BOOK / "detectors.md").read_text() == pages.detectors_page(), "run python -m capsae.build pages"
    assert (BOOK / "rpd.md").read_text() == pages.rpd_page(publish.root() / pages.SELECTION)


def test_every_detector_stands_on_its_page_and_every_source_is_in_the_references():
    text, references = pages.detectors_page(), (BOOK / "references.bib").read_text()
    for name in detectors.available():
        assert f"(`{name}`)" in text
    for key in re.findall(r"\{cite:p\}`(\w+)`", text):
        assert f"{{{key}," in references, key


# --- claims

CELL = {"value": 0.115, "lo": 0.1, "hi": 0.13}


def test_a_claim_holds_or_not_by_its_numbers():
    found = {"a": CELL, "b": {"value": 0.2, "lo": 0.18, "hi": 0.22}, "d": 0.3}
    found["c"] = {"value": 0.12, "lo": 0.1, "hi": 0.14}
    assert pages.judge({"order": ["b", "a"]}, found)[0] == "holds"
    assert pages.judge({"order": ["a", "b"]}, found)[0] == "does not hold"
    assert pages.judge({"order": ["c", "a"]}, found)[0] == "holds (intervals overlap)"
    assert pages.judge({"value": "d", "below": 0.2}, found)[0] == "does not hold (no interval)"
    assert pages.judge({"value": "d", "above": 0.2}, found)[0] == "holds (no interval)"
    assert pages.judge({"order": ["d", "a"]}, found)[0] == "holds (no interval)"
    for lo, hi, verdict in ((-0.03, -0.01, "holds"), (-0.03, 0.01, "undecided"), (0.01, 0.03, "does not hold")):
        paired = {"x": {"value": (lo + hi) / 2, "lo": lo, "hi": hi}}
        assert pages.judge({"difference": "x", "better": -1}, paired)[0] == verdict
        paired = {"x": {"value": -(lo + hi) / 2, "lo": -hi, "hi": -lo}}
        assert pages.judge({"difference": "x", "better": 1}, paired)[0] == verdict
    with pytest.raises(KeyError, match="no 'e'"):
        pages.judge({"value": "e", "above": 0.2}, found)


def test_a_number_that_nobody_ran_says_so_and_one_that_was_run_is_compared():
    entry = {"id": "x", "claim": "EPD", "setting": "S", "source": "n", "paper": 11.0, "tolerance": 1.0, "run": None}
    claims = {"numbers": [entry], "statements": [], "numbers_note": "note"}
    assert f"| EPD | S | 11.0 % | {pages.NOT_RUN} |" in pages.claims_page(claims, lambda page: {})
    entry |= {"run": "imagenet1k/04_score_ood", "value": "epd", "unit": "%"}
    near, far = {"epd": CELL}, {"epd": CELL | {"value": 0.5}}
    assert "11.5 (10.0–13.0), within tolerance" in pages.claims_page(claims, lambda page: near)
    assert "outside tolerance" in pages.claims_page(claims, lambda page: far)


def test_an_incomplete_claim_is_refused(tmp_path):
    (tmp_path / "claims.yml").write_text("numbers: []\nstatements: [{id: a, claim: b}]\n")
    with pytest.raises(ValueError, match="statements, a: has no 'measured'"):
        pages.read_claims(tmp_path / "claims.yml")


# --- the rendered book


class _Html(HTMLParser):
    """Addresses, anchors and images of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.assets, self.links, self.anchors, self.silent, self.errors = [], [], set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        at = dict(attributes)
        self.anchors |= {at[key] for key in ("id", "name") if at.get(key)}
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and at.get("src"):
            self.assets.append(at["src"])
        if tag == "link" and at.get("href") and at.get("rel") not in ("canonical",):
            self.assets.append(at["href"])
        if tag == "a" and at.get("href"):
            self.links.append(at["href"])
        if tag == "img" and not (at.get("alt") or "").strip():
            self.silent.append(at.get("src", "")[:80])
        if re.search(r"traceback|ipythontb", at.get("class") or ""):
            self.errors += 1


_FETCHED = re.compile(r"""(?:src|href|import|fetch|_URL)\W{1,4}['"]https?://\S+?\.(?:js|css|mjs|woff2?)\b""")


def _faults(folder: Path) -> list[str]:
    """What is wrong with the pages under a folder, one line a fault."""
    # Below _static lie templates of the theme, which are no pages.
    found = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.relative_to(folder).parts]
    known = {path: _Html(path.read_text(encoding="utf-8")) for path in found}
    faults = []
    for path, page in known.items():
        where = path.relative_to(folder)
        faults += [f"{where}: no alt text: {src}" for src in page.silent]
        faults += [f"{where}: error output"] * page.errors
        if _FETCHED.search(path.read_text(encoding="utf-8")):
            faults.append(f"{where}: an external script or style in its text")
        for address in [*page.assets, *page.links]:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or (parts.netloc and not parts.scheme):
                if address in page.assets:
                    faults.append(f"{where}: external asset {address}")
                continue
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                faults.append(f"{where}: leads nowhere: {address}")
            elif parts.fragment and target in known and unquote(parts.fragment) not in known[target].anchors:
                faults.append(f"{where}: no such anchor: {address}")
    return faults


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    tool = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "-W", "-n", "--keep-going"]
    done = subprocess.run(
        [*tool, "--path-output", str(folder), "book/"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "_build" / "html"


def test_the_rendered_book_is_whole_and_needs_no_network(built):
    assert _faults(built) == []
    assert (built / "runs/imagenet20/data/04_score_ood/results_ood_positive.csv").is_file()


def test_no_page_links_to_a_repository_while_none_is_known(built):
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"] == ""
    text = (built / "intro.html").read_text()
    assert not re.search(r"github\.com|mybinder|colab", text)


def test_every_run_can_be_downloaded_from_its_page(built):
    for path in RUNS:
        page = (built / path.relative_to(BOOK)).with_suffix(".html")
        addresses = re.findall(r'href="([^"]+\.ipynb)"', page.read_text())
        assert addresses and (page.parent / addresses[0]).resolve().is_file()


@pytest.mark.parametrize(
    "body, fault",
    [
        ('<script src="https://cdn.example/x.js"></script>', "external asset"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "external asset"),
        ('<img src="a.png" alt="a">', "leads nowhere: a.png"),
        ('<a href="#nothing">x</a>', "no such anchor"),
        ('<a href="other.html">x</a>', "leads nowhere"),
        ('<img src="data:image/png;base64,AA" alt=" ">', "no alt text"),
        ('<div class="output traceback highlight-ipythontb">x</div>', "error output"),
        ('<script>const A_URL = "https://unpkg.com/thebe/index.js"</script>', "external script"),
    ],
)
def test_the_check_of_pages_finds_faults(tmp_path, body, fault):
    (tmp_path / "page.html").write_text(f"<html><body id='top'>{body}</body></html>")
    faults = _faults(tmp_path)
    assert any(fault in one for one in faults), faults


def test_a_sound_page_has_no_faults(tmp_path):
    (tmp_path / "a.html").write_text("<h1 id='x'>A</h1><a href='a.html#x'>x</a><a href='https://arxiv.org'>paper</a>")
    assert _faults(tmp_path) == []


def test_mathjax_is_the_vendored_one_with_its_licence():
    folder = BOOK / "_vendor" / "vendor" / "mathjax"
    assert (folder / "LICENSE").is_file() and (folder / "tex-svg.js").stat().st_size > 10**6
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["sphinx"]["config"]["mathjax_path"] == "../vendor/mathjax/tex-svg.js"


def test_runs_carry_their_digest_and_parameters():
    for path in RUNS:
        stamp = json.loads(path.read_text())["metadata"]["capsae"]
        assert stamp["page"] == publish.page_name(path) and len(stamp["digest"]) == 20


def test_rpd_has_the_constants_its_selection_found():
    """The defaults are the best row of the committed grid, which is sorted by the criterion it states."""
    import pandas as pd

    grid = pd.read_csv(publish.root() / pages.SELECTION)
    parts = [name for name in grid.columns if name.startswith("fpr95")]
    assert (grid.criterion - grid[parts].mean(axis=1)).abs().max() < 1e-4
    best = grid[grid.method == "profile"].sort_values("criterion").iloc[0]
    defaults = detectors.info("rpd")["defaults"]
    assert (best.temperature, best.epsilon, best.weight) == (defaults["temperature"], defaults["epsilon"], 1)
