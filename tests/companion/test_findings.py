"""Findings: numbers are kept as printed, expressions are a small language, a disagreeing run is marked."""

import io
import re

import numpy as np
import pandas as pd
import pytest

from capsae.stats import verdicts
from companion import findings
from companion.findings import FAILS, HOLDS, MISSING, UNDECIDED, Numbers, evaluate, judge, load
from companion.publish.plan import pages, read_notebook, root

TYPED = """# A chapter

**Finding** (gain). EPD gains by
its experiments.

Text between.

- **Finding** (same). Nothing differs.
- **Finding** (gone). A number is missing.
"""
ENTRIES = {
    "gain": {"test": "gain > 0", "decided": "gain", "numbers": {"gain": "less AUROC"}},
    "same": {"test": "not apart(other)"},
    "gone": {"test": "nowhere < 1"},
}


def numbers(**of) -> Numbers:
    made = Numbers()
    made.add("gain", **({"value": 0.0364, "lo": 0.0112, "hi": 0.0631, "p": 0.004, "unit": "points"} | of))
    made.add("other", 0.1, -0.2, 0.4)
    return made


def marks(made) -> dict:
    return {row["key"]: row["mark"] for row in judge(load(TYPED, ENTRIES), made)}


def test_a_run_that_agrees_holds_and_one_that_disagrees_is_marked():
    assert marks(numbers()) == {"gain": HOLDS, "same": HOLDS, "gone": MISSING}
    assert marks(numbers(p=0.2))["gain"] == UNDECIDED
    assert marks(numbers(value=-0.0364, lo=-0.06, hi=-0.01))["gain"] == FAILS
    assert marks(numbers(p=None))["gain"] == HOLDS and marks(numbers(p=None, lo=-0.01))["gain"] == UNDECIDED


def test_the_numbers_of_a_csv_give_the_same_marks_and_texts():
    made = numbers()
    made.add("mds++, far/x", 0.1234567, lo=0.00001)
    made.add("count", 12345)
    again = Numbers.read(io.StringIO(made.frame().to_csv(index=False)))
    assert again == made and judge(load(TYPED, ENTRIES), again) == judge(load(TYPED, ENTRIES), made)
    assert set(made) == {"gain", "other", "mds_plus_plus_far_x", "count"}
    assert findings.text(made["gain"]) == "3.64 (1.12 to 6.31) points, p = 0.004"
    assert findings.text(made["count"]) == "12345"


def test_the_rounded_number_is_the_one_that_is_compared():
    made = Numbers()
    made.add("a", 0.04996, p=0.0496, unit="%")
    assert made["a"].value == 5.0 and not evaluate("a < 5", made) and made["a"].p == 0.05
    made.add("unknown", float("nan"))
    assert "unknown" not in made
    with pytest.raises(ValueError, match="twice"):
        made.add("a", 1)


def test_expressions_are_comparisons_and_arithmetic_and_nothing_else():
    made = numbers()
    for expression in (
        'low("gain") > 1',
        "high(gain) < 7 and p(gain) < 0.05",
        "not apart(other)",
        "0 < gain / 2 <= 2",
        "apart(gain, 7)",
    ):
        assert evaluate(expression, made) is True, expression
    assert findings.names_in('low("gain") > other * 2') == {"gain", "other"}
    for bad in (
        "__import__('os')",
        "gain.real",
        "gain[0]",
        "(lambda: 1)()",
        "[1]",
        "open(gain)",
        "gain ** 9",
        "p(gain, p=1)",
    ):
        with pytest.raises((ValueError, KeyError)):
            evaluate(bad, made)
    with pytest.raises(ValueError, match="not an expression"):
        evaluate("gain >", made)
    with pytest.raises(ValueError, match="recorded without p"):
        evaluate("p(other) < 1", made)


def test_text_and_yml_must_belong_together():
    with pytest.raises(ValueError, match="'gone' is typed but has no entry"):
        load(TYPED, {key: ENTRIES[key] for key in ("gain", "same")})
    with pytest.raises(ValueError, match="'more' is in the yml but nowhere typed"):
        load(TYPED, ENTRIES | {"more": {"test": "gain > 0"}})
    with pytest.raises(ValueError, match="too long: 41, where 40"):
        load("**Finding** (long). " + "word " * 41, {"long": {"test": "a > 0"}})
    with pytest.raises(ValueError, match="typed twice"):
        findings.sentences(TYPED + "\n**Finding** (gain). Again.")
    assert findings.sentences(TYPED)["gain"] == "EPD gains by its experiments."


def test_a_family_is_corrected_together():
    made = Numbers()
    for key, p in (("a", 0.03), ("b", 0.04), ("c", 0.001)):
        made.add(key, 1.0, p=p)
    typed = "\n\n".join(f"**Finding** ({key}). It is so." for key in "abc")
    entry = {key: {"test": f"{key} > 0", "decided": key, "family": "all", "numbers": {key: "it"}} for key in "abc"}
    rows = judge(load(typed, entry), made)
    assert [row["mark"] for row in rows] == [UNDECIDED, UNDECIDED, HOLDS]
    assert rows[2]["numbers"] == [("it", "1, p = 0.003")]


def test_the_box_escapes_what_it_is_given_and_names_each_mark():
    rows = judge(load(TYPED.replace("its experiments", "<b>its</b> experiments"), ENTRIES), numbers())
    html = findings.box(rows, "digits", '<a href="x">CSV</a>')
    assert 'class="key-findings"' in html and "&lt;b&gt;its" in html and '<a href="x">CSV</a>' in html
    assert re.findall(r'class="mark mark-(\w+)"', html) == ["holds", "holds", "not"]


@pytest.mark.parametrize("notebook", sorted(path.stem for path in (root() / "notebooks").glob("*.ipynb")))
def test_the_findings_of_a_notebook_parse_and_use_recorded_names(notebook):
    found = findings.of_notebook(notebook)  # text and yml belong together, at most forty words
    used = {name for one in found for name in one.names if one.page is None}  # the expressions parse
    recorded = [
        made for page in pages().values() if page.notebook == notebook and (made := findings.of_page(page.name))
    ]
    if used and not recorded:
        pytest.skip(f"no published page of {notebook} records numbers yet: make the pages again")
    assert used <= {name for made in recorded for name in made}


@pytest.mark.parametrize("notebook", sorted(path.stem for path in (root() / "notebooks").glob("*.ipynb")))
def test_a_chapter_shows_each_of_its_findings_once(notebook):
    if not findings.beside(notebook):
        pytest.skip(f"{notebook} types no findings yet")
    code = []
    for cell in read_notebook(root() / "notebooks" / f"{notebook}.ipynb")["cells"]:
        text, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if "**Finding**" in text:
            assert tags == ["remove-cell"], "the book shows the box, not the text twice"
        if cell["cell_type"] == "code":
            code.append(text)
            assert "display(" not in text and "Markdown" not in text, text
    typed = [found for text in findings.markdown(notebook) if (found := findings.sentences(text))]
    asked = re.findall(r"\.findings\(numbers(?:, (\d+))?\)", "\n".join(code))
    assert asked in ([""], [str(n + 1) for n in range(len(typed))]), "all at once, or each cell of typed findings"
    assert [name for name in findings.beside(notebook).get("captions", {}) if name not in "".join(code)] == []


def test_the_index_lists_every_finding_of_every_chapter():
    text = findings.index_page()
    for notebook in sorted(path.stem for path in (root() / "notebooks").glob("*.ipynb")):
        for one in findings.of_notebook(notebook):
            assert one.sentence in text
    assert (root() / "book" / "findings.md").read_text(encoding="utf-8") == text, "run companion.build pages"


def test_verdicts_correct_within_families_and_follow_the_sign():
    table = pd.DataFrame(
        {"p": [0.01, 0.04, 0.04, np.nan, 0.03], "e": [1.0, -1, 1, 1, -1], "f": list("aabba")}, index=range(5, 10)
    )
    judged = verdicts(table["e"], table["p"], table["f"])
    np.testing.assert_allclose(judged["p_holm"], [0.03, 0.06, 0.04, np.nan, 0.06])
    assert judged["verdict"].tolist() == ["better", "undecided", "better", "undecided", "undecided"]
    assert judged.index.equals(table.index)
    assert verdicts([1, -1], [0.04, 0.04])["verdict"].tolist() == ["undecided"] * 2
    assert verdicts([1, -1], [0.04, 0.04], corrected=True)["verdict"].tolist() == ["better", "worse"]
    assert verdicts([1, 1, 1], [0.04] * 3, [["x", "x", "y"], [1, 2, 2]])["verdict"].tolist() == ["better"] * 3
