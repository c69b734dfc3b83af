from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from companion.figures import display, figures


def _run(name="imagenet20", pack="imagenet20"):
    experiment = SimpleNamespace(name=name, pack=pack, backbone=SimpleNamespace(model="some_vit"))
    return SimpleNamespace(experiment=experiment, digest=lambda stage: {"table": "a" * 64}.get(stage, "b" * 64))


def _rng():
    return np.random.default_rng(0)


def _history():
    epoch = np.arange(1, 31)
    return pd.concat(
        [
            pd.DataFrame({"epoch": epoch, "panel": "FVU", "series": s, "value": v + 1 / epoch})
            for s, v in (("training rows", 0.07), ("held-out rows", 0.12))
        ]
        + [pd.DataFrame({"epoch": epoch, "panel": "loss", "series": "loss", "value": 1 / epoch})]
        + [pd.DataFrame({"epoch": epoch, "panel": "dead latents, %", "series": "dead", "value": 0.0})]
    )


def _boxes():
    sets = {"train": "id", "test": "id", "near/a": "near", "far/b": "far"}
    q = np.array([0.02, 0.05, 0.08, 0.11, 0.2])
    return pd.DataFrame(
        [{"set": s, "group": g} | dict(zip(("q05", "q25", "q50", "q75", "q95"), q * (i + 1), strict=True))
         for i, (s, g) in enumerate(sets.items())]
    )  # fmt: skip


def _overlap(n=20):
    m = 0.05 + 0.95 * np.eye(n)
    a, b = np.indices((n, n)).reshape(2, -1)
    return pd.DataFrame({"class_a": [f"c{i}" for i in a], "class_b": [f"c{i}" for i in b], "jaccard": m.ravel()})


def _profiles():
    q = np.exp(-np.arange(288) / 30.0)
    frames = []
    for panel in ("predicted: tench", "nearest other: church"):
        p = np.where(_rng().random(288) < 0.08, _rng().random(288), 0)
        cells = {"panel": panel, "rank": np.arange(1, 289), "expected": q / q.sum(), "profile": p / p.sum()}
        frames.append(pd.DataFrame(cells))
    return pd.concat(frames)


def _activity():
    kinds = {"ID": 1.0, "OOD, predicted\nas this class": 0.5, "OOD, predicted\nas another": 0.1}
    rows = [(f"c{i}", k, m * (1 + 0.1 * _rng().random())) for k, m in kinds.items() for i in range(20)]
    return pd.DataFrame(rows, columns=["class", "kind", "activation"])


def _sorted():
    rank = np.arange(1, 30)
    return pd.concat(
        [pd.DataFrame({"set": s, "group": g, "rank": rank, "share": np.exp(-rank / w)})
         for s, g, w in (("test", "id", 4), ("near/a", "near", 6), ("far/b", "far", 8))]
    )  # fmt: skip


def _classes(n=20):
    names = [f"class {i}" for i in range(n)]
    return pd.DataFrame({"class": names, "active_fraction": np.linspace(0.6, 0.9, n), "stability": 0.95})


def _map():
    n = 300
    cells = {"x": _rng().normal(size=n), "y": _rng().normal(size=n), "set": ["test", "near/a", "far/b"] * 100}
    data = pd.DataFrame(cells)
    data["group"] = data["set"].map({"test": "id", "near/a": "near", "far/b": "far"})
    data["class"] = np.where(data["group"] == "id", "tench", "")
    return data


def _histogram():
    edges = np.linspace(0, 3, 21)
    return pd.concat(
        [pd.DataFrame({"method": m, "group": g, "left": edges[:-1], "right": edges[1:], "density": _rng().random(20)})
         for m in ("EPD", "RMDS", "MSP") for g in ("id", "near", "far")]
    )  # fmt: skip


def _roc():
    x = np.linspace(0, 1, 50)
    return pd.concat(
        [pd.DataFrame({"set": s, "method": m, "fpr": x, "tpr": x**p})
         for s in ("near/a", "near/b", "far/c") for m, p in (("EPD", 0.2), ("RMDS", 0.3))]
    )  # fmt: skip


def _results():
    rows = []
    for method in ("EPD", "RMDS", "MDS++"):
        for where, group in (("near/a", "near"), ("far/b", "far"), ("mean", "near"), ("mean", "far"), ("mean", "all")):
            rows += [(method, where, group, m, 0.2, 0.18, np.nan if where == "far/b" else 0.22)
                     for m in ("fpr95_ood_pos", "auroc")]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "set", "group", "metric", "value", "lo", "hi"])


def _ablation():
    rows = [(p, f"{k}", s, 0.1 + k / 900, 0.08, 0.2, k == 32)
            for p in ("FPR95", "AUROC") for k in (8, 16, 32, 64) for s in ("EPD", "ours")]  # fmt: skip
    rows.append(("AUROC", "cosine", "a series of one panel", 0.2, 0.1, 0.3, False))
    return pd.DataFrame(rows, columns=["panel", "setting", "series", "value", "lo", "hi", "chosen"])


def _shares():
    kinds = ["too much", "missing", "too much"]
    return pd.DataFrame({"label": ["12: tench", "7: dog", "3: church"], "kind": kinds, "share": [0.5, -0.1, 0.6]})


FIGURES = {
    "training_curves": (_history, {"best_epoch": 12}),
    "decode_quality": (_boxes, {}),
    "jaccard_heatmap": (_overlap, {}),
    "profile_pair": (_profiles, {}),
    "core_activation": (_activity, {}),
    "sorted_profiles": (_sorted, {}),
    "active_fraction": (_classes, {"paper": (0.188, "paper, ImageNet-1k")}),
    "within_class_stability": (_classes, {}),
    "embedding": (_map, {}),
    "score_histograms": (_histogram, {}),
    "roc_curves": (_roc, {}),
    "results_heatmap": (_results, {}),
    "ablation": (_ablation, {}),
    "explanation": (_shares, {}),
}


def _texts(figure: Figure) -> list:
    return [t for ax in figure.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label) if t.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_with_readable_text_in_the_colours_of_the_theme(name):
    make, kwargs = FIGURES[name]
    with figures.style():
        figure = getattr(figures, name)(make(), **kwargs)
        assert isinstance(figure, Figure)
        assert figure.get_size_inches()[0] <= 14
        assert all(t.get_color() == display.INK["text"][0] and t.get_fontsize() >= 9 for t in _texts(figure))
        svg = display.render_svg(figure, name)
    ElementTree.fromstring(svg)  # well-formed
    assert not any(light in svg for light, _ in display.INK.values()) and "var(--capsae-text)" in svg
    assert len(svg) < 150_000


def test_numbers_in_a_heat_map_stand_out_from_their_cells():
    def luminance(colour):
        r, g, b = np.where(
            np.array(colour) <= 0.04045, np.array(colour) / 12.92, ((np.array(colour) + 0.055) / 1.055) ** 2.4
        )
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colour in mpl.colormaps["cividis"](np.linspace(0, 1, 50))[:, :3]:
        ink = luminance(np.array(ImageColor.getrgb(display.ink_on(colour))) / 255)
        light, dark = max(ink, luminance(colour)), min(ink, luminance(colour))
        assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG 2.2, level AA


def test_every_public_figure_is_tested_here():
    own = {
        name
        for name, value in vars(figures).items()
        if callable(value)
        and getattr(value, "__module__", "") == "companion.figures.figures"
        and not name.startswith("_")
    }
    assert own - {"set_label", "image_grid"} == set(FIGURES)


def test_image_grid_wants_one_image_a_row():
    data = pd.DataFrame({"row": ["a", "a", "b"], "title": ["1", "2", "3"]})
    images = [Image.new("RGB", (8, 8), c) for c in ("red", "green", "blue")]
    assert len(figures.image_grid(data, images).axes) == 4
    with pytest.raises(ValueError, match="3 rows, images 2"):
        figures.image_grid(data, images[:2])


def test_an_svg_is_the_same_on_every_run_and_carries_no_metadata():
    svgs = []
    for _ in range(2):
        with figures.style():
            svgs.append(display.render_svg(figures.ablation(_ablation()), "k"))
    assert svgs[0] == svgs[1]
    assert "<metadata" not in svgs[0] and "Matplotlib" not in svgs[0]


def test_a_scatter_of_many_points_is_drawn_as_pixels():
    with figures.style():
        figure = Figure()
        figure.subplots().scatter(range(5000), range(5000))
        svg = display.render_svg(figure, "many")
    assert "data:image/png" in svg and len(svg) < 100_000


def _html(monkeypatch, tmp_path, folder=None, **changes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(display.PAGE_DATA, raising=False)
    if folder:
        monkeypatch.setenv(display.PAGE_DATA, folder)
    arguments = {"name": "bars", "caption": "Shares < 1", "alt": 'bars of "shares"', "run": _run()} | changes
    return display.figure_html(figures.explanation, _shares(), **arguments)


def test_a_shown_figure_has_alt_caption_provenance_and_its_code(monkeypatch, tmp_path):
    html = _html(monkeypatch, tmp_path, "data/page", stage="caps")
    assert 'role="img" aria-label="bars of &quot;shares&quot;"' in html
    assert 'href="code:companion.figures.figures#explanation"' in html
    assert "Shares &lt; 1" in html
    assert "Experiment imagenet20 · backbone some_vit · data: embedded pack imagenet20 · digest bbbbbbbbbbbb" in html
    assert set(re.findall(r"https?://[^\"]*", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_without_a_page_the_csv_travels_in_the_link(monkeypatch, tmp_path):
    html = _html(monkeypatch, tmp_path)
    text = base64.b64decode(re.search(r"data:text/csv;base64,([^\"]+)", html)[1]).decode()
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(text)), _shares())
    assert not list(tmp_path.iterdir())


def test_on_a_page_the_csv_is_a_file_and_the_link_leads_to_it(monkeypatch, tmp_path):
    html = _html(monkeypatch, tmp_path, folder="data/04_score_ood")
    target = re.search(r'<a href="([^"]+)"', html)[1]
    assert target == "data/04_score_ood/bars.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / target), _shares())


@pytest.mark.parametrize("missing", ["alt", "caption"])
def test_a_figure_without_words_is_refused(monkeypatch, tmp_path, missing):
    with pytest.raises(ValueError, match="alt text" if missing == "alt" else "caption"):
        _html(monkeypatch, tmp_path, **{missing: " "})


def test_a_table_escapes_its_cells_and_makes_links_of_a_column():
    data = pd.DataFrame({"run": ["k = 8"], "page": ["k/08.html"], "note": ["a < b"], "value": [np.nan]})
    html = display.table_html(data, "t", "Table", _run(), links={"run": "page"})
    assert '<td><a href="k/08.html">k = 8</a></td><td>a &lt; b</td><td></td>' in html
    assert '<th scope="col">page</th>' not in html


def test_a_result_refuses_nan():
    with pytest.raises(ValueError):
        figures.result({"value": float("nan")})


def test_a_table_or_figure_with_a_nameless_fpr95_is_refused():
    metric = pd.DataFrame({"method": ["epd"], "metric": ["fpr95"], "value": [0.1]})
    for data in (metric, pd.DataFrame({"FPR@95": [0.1]})):
        with pytest.raises(ValueError, match="which class is positive"):
            figures.table(data, "t", "caption", _run())


def test_our_own_score_has_its_colour_under_both_of_its_names():
    found = figures._colours(["EPD", "RPD (ours)", "RPD", "MSP"])
    assert found["RPD (ours)"] == found["RPD"] == figures.PURPLE != found["MSP"]


def test_a_figure_writes_a_repeated_style_once_and_stays_sound_xml():
    with display.style():
        svg = display.render_svg(figures.training_curves(_history()), "small", "falling curves")
    drawn = ElementTree.fromstring(svg)
    styles = [of.get("style") for of in drawn.iter() if of.get("style")]
    assert len(styles) == len(set(styles)) and "<!--" not in svg
    assert all(of.attrib for of in drawn.iter("{http://www.w3.org/2000/svg}g"))
    sheet = drawn.find("{http://www.w3.org/2000/svg}style").text
    assert all(f".{of.get('class')}{{" in sheet for of in drawn.iter() if of.get("class"))
