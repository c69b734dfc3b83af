from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import capsae
from capsae.pipeline import code, recipes
from capsae.pipeline.inputs import Inputs
from capsae.pipeline.run import Run
from companion.publish import plan

# A small package: a road of three modules, a registry, a lazy front door, a class, a data file.
SMALL = {
    "__init__.py": """
        from importlib import import_module
        _PUBLIC = {"score": "road", "Model": "parts.model"}
        def __getattr__(name):
            return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    """,
    "maths.py": '''
        """Maths."""
        import numpy as np
        LIMIT = 3
        def f(x):
            """Add one."""
            return np.sum(x) + 1
        def unused(x):
            return x * 5
        class Tally:
            def add(self, x):
                return x + 10
            def never(self):
                return 20
    ''',
    "road.py": """
        import logging
        from . import maths, registry
        from .maths import f as plus
        log = logging.getLogger(__name__)
        def score(x, maths_of=None):
            from .parts.model import Model
            log.info("scoring")
            unused = [f for f in x]
            return plus(x) * maths.LIMIT + maths.Tally().add(x) + Model().go(x) + registry.create("a")(x) + len(unused)
        def other(x):
            return maths.unused(x)
    """,
    "registry.py": """
        _KNOWN = {}
        def register(name):
            def add(made):
                _KNOWN[name] = made
                return made
            return add
        def create(name):
            return _KNOWN[name]
    """,
    "kinds.py": """
        from .registry import register
        @register("a")
        def first(x):
            return x - 7
    """,
    "parts/__init__.py": "from .model import Model\n",
    "parts/model.py": """
        from pathlib import Path
        NAMES = Path(__file__).with_name("names.json")
        class Base:
            def shared(self, x):
                return x + 30
        class Model(Base):
            def go(self, x):
                return self.shared(x) + len(NAMES.read_text())
            def stay(self, x):
                return x + 40
    """,
    "parts/names.json": '["one"]',
}
MOVED = {
    "road.py": "sub/path.py",
    "maths.py": "sub/numbers/sums.py",
    "kinds.py": "kinds/all_of_them.py",
    "registry.py": "sub/known.py",
    "parts/model.py": "models.py",
    "parts/names.json": "names.json",
    "__init__.py": "__init__.py",
}
REWRITTEN = {
    "from . import maths, registry": "from . import known as registry\nfrom .numbers import sums as maths",
    "from .maths import f as plus": "from .numbers.sums import f",
    "return plus(x)": "return f(x)",
    "from .parts.model import Model": "from ..models import Model",
    "from .registry import register": "from ..sub.known import register",
    '"road"': '"sub.path"',
    '"parts.model"': '"models"',
}
CELLS = "import small\nsmall.score(3)"


def write(folder, files):
    for name, text in files.items():
        path = folder / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return code.Sources({"small": folder / "small"})


def of_cells(sources, cells=CELLS):
    return sources.digest(code._Module("", None, code.ast.parse(cells), sources).all())


def changed(tmp_path, file, old, new):
    assert old in SMALL[file]
    return of_cells(write(tmp_path, SMALL | {file: SMALL[file].replace(old, new)}))


@pytest.fixture
def before(tmp_path):
    return of_cells(write(tmp_path / "before", SMALL))


def test_moving_modules_and_rewriting_imports_changes_nothing(tmp_path, before):
    moved = {}
    for old, new in MOVED.items():
        text = SMALL[old]
        for a, b in REWRITTEN.items():
            text = text.replace(a, b.replace("\n", "\n        "))
        moved[new] = text
    for folder in ("sub", "sub/numbers", "kinds"):
        moved[f"{folder}/__init__.py"] = "__all__ = []\n"
    sources = write(tmp_path / "after", moved)
    assert of_cells(sources) == before
    by_module = "from small.sub import path\npath.score(3)"  # another way to write the same call
    assert of_cells(sources, by_module) == before
    assert sources.digest(sources.units("small.sub.path:score")) == (
        (first := write(tmp_path / "again", SMALL)).digest(first.units("small.road:score"))
    )


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("maths.py", "np.sum(x) + 1", "np.sum(x) + 2"),
        ("maths.py", "import numpy as np", "import torch as np"),
        ("maths.py", "LIMIT = 3", "LIMIT = 4"),
        ("maths.py", "x + 10", "x + 11"),
        ("parts/model.py", "x + 30", "x + 31"),  # a method that a subclass calls through self
        ("parts/names.json", "one", "two"),
        ("kinds.py", "x - 7", "x - 8"),  # enters the registry
        ("kinds.py", "from .registry", "import os\n        os.environ.clear()\n        from .registry"),
        ("registry.py", "return _KNOWN[name]", "return _KNOWN[name.lower()]"),
        ("road.py", "+ len(unused)", "- len(unused)"),
    ],
)
def test_whatever_is_reached_counts(tmp_path, before, file, old, new):
    assert changed(tmp_path / "after", file, old, new) != before


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("maths.py", "x * 5", "x * 6"),
        ("maths.py", "return 20", "return 21"),  # a method that nothing calls
        ("maths.py", "Add one.", "Add one to it."),
        ("maths.py", "LIMIT = 3", "# the limit\n        LIMIT  =  3"),
        ("maths.py", "def f(x):", "def f(x: float) -> float:"),
        ("parts/model.py", "x + 40", "x + 41"),
        ("road.py", "return maths.unused(x)", "return maths.unused(x) + 1"),
        ("road.py", '"scoring"', '"scoring now"'),
        ("parts/__init__.py", "from .model import Model", ""),
    ],
)
def test_nothing_else_does(tmp_path, before, file, old, new):
    assert changed(tmp_path / "after", file, old, new) == before


def test_a_module_may_count_by_a_number(tmp_path):
    def of(text):
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        return of_cells(write(tmp_path, SMALL | {"maths.py": text + textwrap.dedent(SMALL["maths.py"])}))

    first = of("__code_version__ = 1\n")
    assert first == of("__code_version__ = 1\nADDED = 4\n")
    assert first != of("__code_version__ = 2\n") and first != of("")


@pytest.mark.parametrize("used", ["getattr(maths, x)(1)", "import_module(x)", "pick(maths, 1)"])
def test_what_the_text_does_not_show_counts_as_a_whole(tmp_path, used):
    def of(unused):
        maths = SMALL["maths.py"].replace("x * 5", unused)
        road = f"""
            from importlib import import_module
            from . import maths
            def score(x):
                return {used}
        """
        sources = write(tmp_path, {"__init__.py": "", "maths.py": maths, "road.py": road})
        return sources.digest(sources.units("small.road:score"))

    assert of("x * 5") != of("x * 6")


def test_locals_hide_what_the_module_calls_the_same(tmp_path):
    def of(body, unused="x * 5"):
        sources = write(tmp_path, {
            "__init__.py": "", "maths.py": SMALL["maths.py"].replace("x * 5", unused),
            "road.py": f"from .maths import f, unused\ndef score(x, f=None):\n    {body}\n",
        })  # fmt: skip
        return {unit.name for unit in sources.reached(sources.units("small.road:score"))}

    assert of("return f(x)") == {"score"}
    assert of("unused = x; return unused") == {"score"}
    assert of("return [unused for unused in x]") == {"score"}
    assert of("return [unused for y in x if unused(y)]") == {"score", "unused"}
    assert of("return [unused for unused in unused(x)]") == {"score", "unused"}
    assert of("return [y for y in x] + (lambda y: unused(y))(x)") == {"score", "unused"}
    assert of("def g(unused): return unused(x)\n    return g") == {"score"}
    assert of("global unused; unused(x); unused = 3") == {"score", "unused"}
    assert "f" in of("from .maths import f as unused; return unused(x)")


def test_what_is_given_in_another_way_is_not_followed(tmp_path):
    sources = write(tmp_path, SMALL)
    score, known = sources.units("small.road:score"), sources.units("small.registry:_KNOWN")
    assert "first" not in {unit.name for unit in sources.reached(score, known)}
    before = sources.digest(score, known)
    other = write(tmp_path, SMALL | {"registry.py": SMALL["registry.py"].replace("_KNOWN = {}", "_KNOWN = dict()")})
    assert other.digest(other.units("small.road:score"), other.units("small.registry:_KNOWN")) == before


def test_an_unknown_entry_and_a_star_import_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no module of .* defines it"):
        code.digest((code, "nothing_here"))
    with pytest.raises(ValueError, match=r"from small.maths import \*: import by name"):
        write(tmp_path, SMALL | {"road.py": "from .maths import *\n"})


def test_a_digest_is_the_same_in_another_process(tmp_path):
    sources = write(tmp_path, SMALL)
    text = f"""
from pathlib import Path
from capsae.pipeline import code, recipes
sources = code.Sources({{"small": Path({str(tmp_path)!r}) / "small"}})
print(sources.digest(sources.units("small.road:score")))"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sources.digest(sources.units("small.road:score"))


# --- this package


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The sources of a copy of capsae, after `old` is replaced by `new` in files."""
    folder = tmp_path_factory.mktemp("copy") / "capsae"
    shutil.copytree(
        Path(capsae.__file__).parent, folder, ignore=shutil.ignore_patterns("packs", "*.pyc", "experiments")
    )

    @cache
    def edited(*edits):
        texts = {folder / file: (folder / file).read_text() for file, _, _ in edits}
        for file, old, new in edits:
            assert old in texts[folder / file]
            (folder / file).write_text(texts[folder / file].replace(old, new, 1))
        sources = code.Sources({"capsae": folder, "companion": plan.root() / "companion"})
        for path, text in texts.items():
            path.write_text(text)
        return sources

    gc.disable()  # parsed sources are many objects, and none of them is garbage: collections take most of the time
    yield edited
    gc.enable()


def _page(sources, notebook):
    cells = plan.read_notebook(plan.root() / "notebooks" / f"{notebook}.ipynb")["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    unit = code._Module("", None, code.ast.parse(text), sources)
    return sources.digest(unit.all(), sources.units(recipes.code))


def test_a_change_of_auroc_makes_the_causal_page_stale(copy):
    now, other = copy(), copy(("metrics.py", "def auroc(", "def auroc(shift=0, *"))
    assert _page(now, "12_causal") != _page(other, "12_causal")
    unused = copy(("pipeline/kept.py", "def used(", "def used(shift=0, *"))
    assert _page(now, "12_causal") == _page(unused, "12_causal")


def test_progress_and_extraction_make_no_artefact_stale(copy):
    shown, extracted = (
        ("sae/progress.py", "EVERY = 0.5", "EVERY = 5"),
        ("features/extract.py", "MAX_BAD = 0.01", "MAX_BAD = 1"),
    )
    now, other = copy(), copy(shown, extracted)
    for of in (Run._trained, Inputs._extracted):
        assert now.digest(now.units(of)) == other.digest(other.units(of))


def test_every_detector_counts_for_a_table_and_only_its_own_variant_for_an_sae(copy):
    now, other = (
        copy(),
        copy(("detectors/baselines/logits.py", "class MSP(Detector):", "class MSP(Detector):\n    x = 1")),
    )
    assert now.digest(now.units(Run.detectors)) != other.digest(other.units(Run.detectors))
    assert {"TopKSAE", "train_saes", "JumpReLU"} <= {u.name for u in now.reached(now.units(Run._trained))}
    from capsae.sae.dictionaries import methods as dictionaries
    from capsae.sae.variants import thresholds as variants

    names = [(variants, "REGISTRY"), (dictionaries, "METHODS")]
    shut = [unit for name in names for unit in now.units(name)]
    assert "JumpReLU" not in {unit.name for unit in now.reached(now.units(Run._trained), shut)}
