"""`capsae verify`: one changed number is found and named with both values; what is exempt is not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from capsae.__main__ import main
from companion.publish import plan, verify

ROOT = plan.root()
PAGE = "digits/04_score_ood"
RECORDED = "book/runs/imagenet20/ablation/base.ipynb"  # numbers in the notebook itself
CSV = "book/runs/digits/data/04_score_ood/roc.csv"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository that holds the digits' pages, another, and the notebook by which it is known for one."""
    shutil.copytree(ROOT / "book/runs/digits", tmp_path / "book/runs/digits")
    for name in ("notebooks/01_features.ipynb", "_toc.yml", RECORDED):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    commit(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan.root.cache_clear()
    yield tmp_path
    plan.root.cache_clear()


def commit(folder: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A", "-f"], [*who, "commit", "-qm", "published"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_one_changed_number_is_named_with_both_values(clone, capsys):
    assert main(["verify"]) == 0
    assert "Nothing was executed here" in capsys.readouterr().out
    lines = (clone / CSV).read_text().splitlines()
    *others, last = lines[5].split(",")
    (clone / CSV).write_text("\n".join([*lines[:5], ",".join([*others, "0.123456"]), *lines[6:], ""]))
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert f"{PAGE}: differ" in out and "1 pages differ" in out
    column = lines[0].split(",")[-1]
    line = next(one for one in out.splitlines() if "roc.csv" in one)
    assert line.endswith(f"{column}: published {last}, here 0.123456") and "row 5 (" in line


def test_a_number_that_a_page_recorded_counts_too(clone, capsys):
    path = clone / RECORDED
    page = json.loads(path.read_text())
    spread = page["metadata"]["capsae"]["results"]
    name = next(key for key, value in spread.items() if isinstance(value, float))
    before, spread[name] = spread[name], spread[name] + 1
    path.write_text(json.dumps(page))
    assert main(["verify"]) == 1
    assert f"published {before:.6g}, here {before + 1:.6g}" in capsys.readouterr().out
    spread[name] = before * (1 + 1e-9)  # the same to the printed digit
    path.write_text(json.dumps(page))
    assert main(["verify"]) == 0


def test_what_is_exempt_is_counted_and_explained(clone, capsys):
    change(clone / "book/runs/digits/data/04_score_ood/provenance.csv", '"version, numpy",', '"version, numpy",9')
    assert main(["verify"]) == 0
    assert "a newer package may be installed" in capsys.readouterr().out
    change(clone / "book/runs/digits/data/04_score_ood/provenance.csv", '"seed, sae",', '"seed, sae",9')
    assert main(["verify"]) == 1, "only versions are exempt in that table"


def test_seconds_are_exempt_and_nothing_that_is_merely_called_alike():
    assert verify.why_exempt("grid.csv", "train_wall_s", "topk") and verify.why_exempt("x.csv", "peak_rss_mb", "")
    for column in ("fvu", "value", "alarms", "seed"):
        assert verify.why_exempt("grid.csv", column, "topk") is None


def test_tables_that_are_missing_or_of_another_shape_differ():
    here = {"a/data/p/x.csv": b"m,v\nepd,1\n", "a/data/p/y.csv": b"v\n1\n"}

    def differences(other):
        (report,) = verify.compare(here, other)
        return [str(each) for each in report.differences]

    assert differences(here) == []
    assert differences({"a/data/p/x.csv": here["a/data/p/x.csv"]}) == ["y.csv: published there, here missing"]
    assert differences(here | {"a/data/p/z.csv": b"v\n"}) == ["z.csv: published missing, here there"]
    assert differences(here | {"a/data/p/y.csv": b"v\n1\n2\n"}) == ["y.csv, rows: published 1, here 2"]
    assert differences(here | {"a/data/p/x.csv": b"m,w\nepd,1\n"}) == ["x.csv, columns: published m, v, here m, w"]
    assert differences(here | {"a/data/p/x.csv": b"m,v\nrpd,1\n"}) == ["x.csv, row 1 (epd), m: published epd, here rpd"]


def test_without_git_the_copy_counts_that_was_kept_before_anything_was_overwritten(clone, capsys):
    shutil.rmtree(clone / ".git")
    if verify._in_git(clone):
        pytest.skip("the temporary folder lies in a repository that holds book/runs")
    assert main(["verify"]) == 2
    assert "no build/as_published" in capsys.readouterr().err
    verify.keep_published(clone)
    assert main(["verify"]) == 0
    change(clone / CSV, "EPD", "epd")
    verify.keep_published(clone)  # a second run keeps the first copy
    capsys.readouterr()
    assert main(["verify"]) == 1
    assert "published EPD, here epd" in capsys.readouterr().out


def test_a_record_counts_what_was_executed_here_and_says_what_was_emulated(clone, capsys, monkeypatch):
    assert main(["verify", "--record"]) == 2 and "nothing was executed here" in capsys.readouterr().err
    verify.mark_run(clone, PAGE, clone / f"book/runs/{PAGE}.ipynb")
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    assert main(["verify", "--record"]) == 0
    (path,) = (clone / "book/reproduced_on").glob("*.json")
    made = json.loads(path.read_text())
    assert (
        made["pages"]["equal"] == 1
        and made["pages"]["not_run_here"] == len(verify.compare(*[verify.folder_files(clone / "book/runs")] * 2)) - 1
    )
    assert made["emulated"]["NUMBA_CPU_NAME"] == "haswell" and "haswell" in path.name
    assert made["cpu"] and made["versions"].keys() >= {"python", "numpy", "numba", "torch"}
    table = (clone / "book/reproduced_on/machines.csv").read_text()
    assert "NUMBA_CPU_NAME=haswell" in table and "1 equal" in table
    change(clone / f"book/runs/{PAGE}.ipynb", "EPD", "epd")
    assert not verify.ran_here(clone, PAGE), "it is not the page that was executed"


def test_the_published_table_of_machines_is_that_of_the_records():
    folder = ROOT / verify.MACHINES
    assert (folder / "machines.csv").read_text() == verify.machines_table(folder)
