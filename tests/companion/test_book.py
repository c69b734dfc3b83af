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

from capsae import detectors
from companion import findings
from companion.chapters.claims import profile_claims
from companion.chapters.claims import table as claims_table
from companion.findings import LONGEST, Finding, Numbers, slug
from companion.publish import pages, plan, publish

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
    assert len(text) < 800_000  # a heat map of 40 detectors is most of the largest page
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users|mnt)/", text)
    assert str(ROOT) not in text
    if not plan._experiment(notebook["metadata"]["capsae"]["experiment"]).show_images:
        assert 'id=\\"fig-top_images' not in text and 'id=\\"fig-extremes' not in text and "image/jpeg" not in text


def test_claims_and_detectors_pages_are_in_step_with_their_sources():
    claims = pages.read_claims(BOOK / "claims.yml")
    assert (BOOK / "claims.md").read_text() == pages.claims_page(claims, pages.published), "run companion.build pages"
    assert (BOOK / "intro.md").read_text() == pages.intro_page(claims, pages.published), "run companion.build pages"
    assert (BOOK / "detectors.md").read_text() == pages.detectors_page(), "run python -m companion.build pages"
    assert (BOOK / "rpd.md").read_text() == pages.rpd_page(publish.root() / pages.SELECTION)


def test_every_detector_stands_on_its_page_and_every_source_is_in_the_references():
    text, references = pages.detectors_page(), (BOOK / "references.bib").read_text()
    for name in detectors.available():
        assert f"(`{name}`)" in text
    for key in re.findall(r"\{cite:p\}`(\w+)`", text):
        assert f"{{{key}," in references, key


# --- claims


def _claims(**changes):
    claim = {"sentence": "A is below B.", "source": "The paper", "page": "04_score_ood", "numbers": {"a": "A less B"}}
    claim |= {"test": "a < 0", "decided": "a", "family": "paper"} | changes
    return {"numbers": [], "numbers_note": "note", "claims": {"one": claim}}


def _recorded(value, p, more=()):
    numbers = Numbers()
    numbers.add("a", value, value - 1, value + 1, p)
    for key, of in more:
        numbers.add(key, of)
    return lambda page: numbers


@pytest.mark.parametrize(
    "value, p, mark",
    [(-3, 0.01, "holds"), (3, 0.01, "does not hold on this run"), (-3, 0.2, "undecided")],
)
def test_a_claim_is_marked_by_its_numbers(value, p, mark):
    text = pages.claims_page(_claims(), _recorded(value, p), ["digits"])
    assert f"| A is below B. | {mark} |" in text
    assert f"| digits | {mark} | {value}" in text and "{doc}`page <runs/digits/04_score_ood>`" in text


def test_the_claims_of_one_family_are_corrected_together_and_families_apart():
    claims = _claims()
    claims["claims"]["two"] = claims["claims"]["one"] | {"sentence": "Again.", "test": "b < 0", "decided": "b"}
    numbers = Numbers()
    numbers.add("a", -3, -5, -1, 0.03)
    numbers.add("b", -3, -5, -1, 0.04)
    assert pages.claims_page(claims, lambda page: numbers, ["digits"]).count("| undecided |") == 4
    claims["claims"]["two"]["family"] = "controls"
    assert pages.claims_page(claims, lambda page: numbers, ["digits"]).count("| undecided |") == 0


def test_what_is_not_measured_or_not_judged_says_so():
    other = Numbers()
    other.add("b", 1.0)
    assert "| A is below B. | not measured here |" in pages.claims_page(_claims(), lambda page: other, ["digits"])
    missing = pages.claims_page(_claims(), lambda page: Numbers(), ["digits"])
    assert "| A is below B. |  |" in missing and "| digits | not run here yet | – | none |" in missing
    claims = _claims()
    for key in ("test", "decided", "family"):
        del claims["claims"]["one"][key]
    assert f"| {pages.SHOWN} |" in pages.claims_page(claims, _recorded(-3, 0.01), ["digits"])
    broken = pages.claims_page(_claims(), _recorded(-3, 0.01, [("pixel_wins", 2)]), ["digits"])
    assert "On some OOD sets of digits a control that reads pixel statistics" in broken
    assert "On some OOD sets" not in pages.claims_page(_claims(), _recorded(-3, 0.01, [("pixel_wins", 0)]), ["digits"])


BACKBONES = ["imagenet20", "imagenet20-augreg", "digits"]


def _by_experiment(**values):
    """What each experiment's page recorded of "a": a value that is decided; nothing where none is given."""
    found = {name.replace("_", "-"): _recorded(value, 0.001)("") for name, value in values.items()}
    return lambda page: found.get(page.partition("/")[0], Numbers())


@pytest.mark.parametrize(
    "second, mark, both",
    [(-2, "holds", "holds"), (2, "does not hold on this run", "does not hold on this run"), (None, "", "not run")],
)
def test_a_claim_on_two_backbones_holds_if_it_holds_on_both(second, mark, both):
    runs = {"imagenet20": -3, "digits": -1} | ({} if second is None else {"imagenet20_augreg": second})
    text = pages.claims_page(_claims(), _by_experiment(**runs), BACKBONES)
    assert "| claim | imagenet20 | imagenet20-augreg | imagenet20, both backbones | digits |" in text
    assert f"| A is below B. | holds | {mark} | {both} | holds |" in text
    start = pages.intro_page(_claims(), _by_experiment(**runs), BACKBONES)
    counts = {"holds": "1 | 0 | 0", "does not hold on this run": "0 | 0 | 1", "not run": "not run |  | "}[both]
    assert f"| imagenet20, both backbones | – | – | {counts} |" in start and "| digits | – | – | 1 | 0 | 0 |" in start
    assert start.count("both backbones |") == 1, "the table of scores has no row for two runs together"


def test_the_joint_verdict_of_made_up_marks():
    holds, undecided, fails = findings.HOLDS, findings.UNDECIDED, findings.FAILS
    for marks, wanted in [
        ((holds, holds), holds),
        ((holds, undecided), undecided),
        ((undecided, fails), fails),
        ((holds, findings.MISSING), findings.MISSING),
        ((pages.SHOWN, pages.SHOWN), pages.SHOWN),
        ((fails, ""), claims_table.NOT_RUN),
        (("", ""), claims_table.NOT_RUN),
    ]:
        assert claims_table.joint(marks) == wanted
    assert claims_table.backbones(["a", "a-x", "b"]) == {"a": ["a", "a-x"], "b": ["b"]}


def test_a_claim_on_our_scores_becomes_a_row_for_each():
    short = {
        "e": {"sentence": "{score} beats MDS++.", "source": "us", "score": "ours", "beats": "mds++", "family": "f"}
    }
    found = claims_table.expanded(short, ("rpd", "rpd_dense"))
    assert [of["sentence"] for of in found.values()] == ["RPD beats MDS++.", "RPD on dense ReLU beats MDS++."]
    assert [of["decided"] for of in found.values()] == [f"{n}_less_mdspp_fpr95_ood_pos" for n in ("rpd", "rpd_dense")]
    assert len(found["rpd_e"]["numbers"]) == 3 and {of["family"] for of in found.values()} == {"f"}
    rivals = [of for of in pages.read_claims(BOOK / "claims.yml")["claims"].values() if of.get("family") == "rivals"]
    assert len(rivals) == 4 * len(claims_table.OUR_SCORES)


def test_the_start_page_says_where_epd_stands_and_how_many_claims_hold():
    claims = _claims()
    claims["claims"]["two"] = claims["claims"]["one"] | {"sentence": "Again.", "test": "a > 0"}
    claims["claims"]["three"] = claims["claims"]["one"] | {"family": "controls"}
    numbers = Numbers()
    numbers.add("a", -3, -5, -1, 0.001)
    numbers.add("epd rank", 15)
    numbers.add("detectors", 43)
    numbers.add("epd fpr95_ood_pos", 0.115, 0.1, 0.13, unit="%")
    text = pages.intro_page(claims, lambda page: numbers, ["digits"])
    assert "| digits | 11.5 (10.0 to 13.0) % | 15 of 43 | " in text
    assert "| digits | 11.5 (10.0 to 13.0) % | – | – | – | – | – |" in text
    assert "paper's 2 claims" in text and "| 15 of 43 | 1 | 0 | 1 |" in text
    nothing = pages.intro_page(claims, lambda page: Numbers(), ["digits"])
    assert "| digits | – | – | not run |  |  |" in nothing


def test_a_number_that_nobody_ran_says_so_and_one_that_was_run_is_compared():
    entry = {"id": "x", "claim": "EPD", "setting": "S", "source": "n", "paper": 11.0, "tolerance": 1.0, "run": None}
    claims = _claims() | {"numbers": [entry]}
    assert f"| EPD | S | 11.0 % | {pages.NOT_RUN} |" in pages.claims_page(claims, _recorded(-3, 0.01), ["digits"])
    entry |= {"run": "imagenet1k/04_score_ood", "value": "epd"}
    for value, word in ((0.115, "within"), (0.5, "outside")):
        numbers = Numbers()
        numbers.add("epd", value, unit="%")
        assert f"%, {word} tolerance" in pages.claims_page(claims, lambda page, of=numbers: of, ["digits"])


def test_an_incomplete_claim_is_refused(tmp_path):
    (tmp_path / "claims.yml").write_text("numbers: []\nclaims: {a: {sentence: b, source: c, page: d}}\n")
    with pytest.raises(ValueError, match="claims, a: has no 'numbers'"):
        pages.read_claims(tmp_path / "claims.yml")


def test_every_claim_has_a_test_that_its_page_can_answer():
    """Names in the tests are those that the pages record: a typing error would read 'not measured here' for ever."""
    claims = pages.read_claims(BOOK / "claims.yml")["claims"]
    measured = {slug(f"{a} {b}") for a in profile_claims.MEASURES for b in ("trained", "untrained", "difference")}
    known = measured | {"active_any_mean", "active_5_percent_mean"}
    for name, of in claims.items():
        finding = Finding(name, of["sentence"], of.get("test", "1 > 0"), of.get("decided"), numbers=of["numbers"])
        assert len(of["sentence"].split()) <= LONGEST
        for key in finding.names:
            pair = re.fullmatch(r"(\w+?)_less_(\w+?)_(fpr95_ood_pos|fpr95_id_pos|auroc)", key)
            names = {claims_table.number_name(one) for one in detectors.available()}
            assert key in known or {pair[1], pair[2]} <= names, key
    assert sum(of.get("family") == "paper" for of in claims.values()) == 11


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
        assert addresses
        cells = plan.read_notebook((page.parent / addresses[0]).resolve())["cells"]
        assert cells and not any(cell.get("outputs") for cell in cells)  # the page shows them
    assert not [*built.rglob("*.map")]


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
