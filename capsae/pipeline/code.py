"""What code a result hangs on: found by following the names that code uses, hashed by content.

From entry points (functions, classes, modules, a notebook's cells) the definitions in use are followed through our own
packages. Each counts by its statements without docstrings, comments, annotations, lines to the log, and imports: names
of modules and files do not count, nor the order of definitions, so that moving code makes nothing stale.

What the text does not show counts as a whole:

- a method counts where its class is reached and some reached code uses an attribute of its name; of a class with a base
  from elsewhere (``nn.Module``), all methods do;
- who enters a registry, by a decorator that stores into it, is reached with the registry;
- ``getattr`` with a name that is no literal may mean any method or literal of its module (of a module: all that is in
  it), ``import_module`` all of its package;
- statements of a module that define nothing count with whatever is reached in it;
- a string that names a file beside the module counts with the file's content.

A module may say ``__code_version__ = 1``: this number counts in place of its text, and nothing is followed from there.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

__code_version__ = 1  # what digests are made of does not change what is digested
ROOTS = ("capsae", "companion")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
_STORING = {"append", "add", "setdefault", "update", "insert", "extend"}


def digest(*entries: Any, without: Iterable[Any] = ()) -> str:
    """Return the hex SHA-256 of the code that ``entries`` reach.

    Parameters
    ----------
    entries : functions, methods, properties, classes, modules, ``(module, "NAME")`` for a variable of a module
        A method counts alone, without its class: what comes in through ``self`` is an input.
    without : of the same kinds
        Not followed, since what they stand for is given in another way: among ``entries``, or as an input.

    Raises
    ------
    ValueError
        For an entry that no module of ours defines.
    """
    return _digest(tuple(entries), tuple(without))


@cache
def _digest(entries: tuple, without: tuple) -> str:
    found = _sources()
    return found.digest([u for e in entries for u in found.units(e)], [u for e in without for u in found.units(e)])


@cache
def notebook_digest(source: str, without: tuple = ()) -> str:
    """Return the digest of the code of a notebook's cells, one after the other, with all that it reaches."""
    found = _sources()
    cells = _Module("", None, ast.parse(source), found)
    return found.digest(cells.all(), [u for e in without for u in found.units(e)])


@cache  # read once a process: an edit while a run goes on does not change what the run's artefacts are called
def _sources() -> Sources:
    specs = {name: util.find_spec(name) for name in ROOTS}
    return Sources({name: Path(spec.origin).parent for name, spec in specs.items() if spec and spec.origin})


class Sources:
    """The parsed modules of some packages, given as ``{name: folder}``."""

    def __init__(self, packages: Mapping[str, Path]):
        self.modules: dict[str, _Module] = {}
        for package, folder in packages.items():
            for file in sorted(folder.rglob("*.py")):
                parts = (package, *file.relative_to(folder).with_suffix("").parts)
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                self.modules[name] = _Module(name, file, ast.parse(file.read_text(encoding="utf-8")), self)

    def units(self, entry: Any) -> list[_Unit]:
        """The definitions that an entry point is (or ``"module:NAME"``, ``"module:Class.method"``)."""
        if isinstance(entry, ModuleType):
            return self.modules[entry.__name__].all()
        if isinstance(entry, tuple):
            entry = f"{entry[0].__name__}:{entry[1]}"
        elif not isinstance(entry, str):
            entry = getattr(entry, "func", None) or getattr(entry, "fget", None) or entry  # (cached) properties
            entry = f"{entry.__module__}:{entry.__qualname__}"
        module, _, name = entry.partition(":")
        first, _, method = name.partition(".")
        found = [unit for unit in self.member(module, first) if isinstance(unit, _Unit) and unit.name == first]
        found = [m for unit in found for m in unit.methods if m.name == method] if method else found
        if not found:
            raise ValueError(f"{entry}: no module of {', '.join(ROOTS)} defines it")
        return found

    def member(self, module: str, name: str | None, seen: frozenset = frozenset()) -> list:
        """What a name in a module stands for: definitions, or a dotted name, of a module of ours or from elsewhere."""
        at = self.modules.get(module)
        if name is None or at is None:
            return [f"{module}.{name}" if name else module]
        inside = f"{module}.{at.lazy.get(name, name)}"
        if name in at.lazy and inside in self.modules:
            return self.member(inside, name, seen)
        if name in at.bound and (module, name) not in seen:
            seen |= {(module, name)}
            return [t for b in at.bound[name] for t in ([b] if isinstance(b, _Unit) else self.member(*b, seen))]
        return [inside] if inside in self.modules else at.all()

    @cached_property
    def entered(self) -> dict[_Unit, list[_Unit]]:
        """Definitions by the registry, a variable of a module, that their decorator stores them in."""
        found: dict[_Unit, list[_Unit]] = {}
        for unit in (unit for module in self.modules.values() for unit in module.units):
            calls = getattr(unit.node, "decorator_list", [unit.node.value] if isinstance(unit.node, ast.Expr) else [])
            for variable in (v for by in _Reader(unit.module, calls).used for v in by.stores_into()):
                found.setdefault(variable, []).append(unit)
        return found

    def reached(self, entries: Iterable[_Unit], without: Iterable[_Unit] = ()) -> set[_Unit]:
        """All definitions that the entries use, and those that these use, and so on."""
        found, attributes, shut, todo = set(), set(), set(without), list(entries)
        waiting: dict[str, list[_Unit]] = {}  # methods of reached classes whose name nothing has used yet
        while todo:
            unit = todo.pop()
            if unit in found:
                continue
            found.add(unit)
            if unit in shut or unit.module.version:
                continue
            todo += [*unit.read.used, *unit.module.always, *self.entered.get(unit, ())]
            for method in unit.methods:
                if unit.open or method.name.startswith("__") or method.name in attributes:
                    todo.append(method)
                else:
                    waiting.setdefault(method.name, []).append(method)
            for name in unit.read.attributes - attributes:
                todo += waiting.pop(name, ())
            attributes |= unit.read.attributes
        return found

    def digest(self, entries: Iterable[_Unit], without: Iterable[_Unit] = ()) -> str:
        """Digest of the contents of all that is reached; of each, with the contents that its names stand for."""
        shut, counted = set(without), []
        for unit in self.reached(entries, shut):
            used = () if unit in shut or unit.module.version else unit.read.used
            counted.append(sorted((u.name, "" if u in shut else u.own) for u in {unit, *used}))
        unique = sorted(set(map(json.dumps, counted)))
        return hashlib.sha256(json.dumps(unique).encode()).hexdigest()


class _Module:
    """A module's statements, and what its names stand for: definitions, or (module, name there) of an import."""

    def __init__(self, name: str, file: Path | None, tree: ast.Module, sources: Sources):
        self.name, self.tree, self.sources, self.folder = name, tree, sources, file and file.parent
        is_package = file is not None and file.name == "__init__.py"
        self.package = name if is_package else name.rpartition(".")[0]
        self.version = ""
        self.bound: dict[str, list] = {}
        self.units: list[_Unit] = []
        self.always: list[_Unit] = []
        self.lazy: dict[str, str] = {}  # names that a package loads on first use: {name: its module}
        for node in tree.body:
            self._take(node)
        for node in [unit.node for unit in self.units] if is_package and "__getattr__" in self.bound else ():
            if isinstance(getattr(node, "value", None), ast.Dict):
                self.lazy |= {k.value: v.value for k, v in zip(node.value.keys, node.value.values, strict=True)}

    def _take(self, node: ast.stmt) -> None:
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        for one in () if isinstance(node, _DEFINITIONS) else ast.walk(node):
            for name, of in imported(one, self.package):
                self.bound.setdefault(name, []).append(of)
        if isinstance(node, _IMPORTS) or _says_nothing(node) or "__name__" in test or "TYPE_CHECKING" in test:
            return
        names = [node.name] if isinstance(node, _DEFINITIONS) else [*dict.fromkeys(_stored(node))]
        if "__code_version__" in names:
            self.version = ast.unparse(node.value)
        if names == ["__all__"]:
            return
        made = [_Unit(name, node, self) for name in names or [""]]
        self.units += made
        for name, unit in zip(names, made, strict=False):
            self.bound.setdefault(name, []).append(unit)
        if not names or not isinstance(node, (*_DEFINITIONS, ast.Assign, ast.AnnAssign, ast.AugAssign)):
            self.always += made

    @cached_property
    def names(self) -> set[str]:
        """Every literal, and the names of methods."""
        literals = {n.value for n in ast.walk(self.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return literals.union(unit.name for unit in self.all())

    def all(self) -> list[_Unit]:
        return [part for unit in self.units for part in (unit, *unit.methods)]


class _Unit:
    """A definition or another statement of a module, or a method; a class is one without its methods."""

    def __init__(self, name: str, node: ast.stmt, module: _Module):
        self.name, self.node, self.module, self.methods = name, node, module, []
        if isinstance(node, ast.ClassDef):
            self.methods = [_Unit(n.name, n, module) for n in node.body if isinstance(n, _FUNCTIONS)]
            fields = dict(ast.iter_fields(node)) | {"body": [n for n in node.body if not isinstance(n, _FUNCTIONS)]}
            self.node = ast.ClassDef(**fields)

    def __repr__(self) -> str:
        return f"{self.module.name}:{self.name}"

    @cached_property
    def read(self) -> _Reader:
        return _Reader(self.module, self.node)

    @cached_property
    def own(self) -> str:
        """Digest of its own text, with names of definitions in place of where they lie."""
        text = self.module.version or json.dumps(self.read.form)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def open(self) -> bool:
        """Whether a class has a base that is not ours, which may call any of its methods."""
        for base in getattr(self.node, "bases", ()):
            ours = _Reader(self.module, base).used
            if not ours or any(unit.open for unit in ours):
                return True
        return False

    def stores_into(self) -> Iterator[_Unit]:
        """The variables of its module that a function stores into."""
        for node in ast.walk(self.node) if isinstance(self.node, _FUNCTIONS) else ():
            into = node.value if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) else None
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in _STORING:
                into = node.func.value
            if isinstance(into, ast.Name) and into.id in self.module.bound:
                targets = self.module.sources.member(self.module.name, into.id)
                yield from (unit for unit in targets if isinstance(unit, _Unit))


class _Reader:
    """A statement's form, nested lists without places, and what it uses: definitions of ours, names of attributes."""

    def __init__(self, module: _Module, node: Any):
        self.module, self.sources = module, module.sources
        self.used: set[_Unit] = set()
        self.attributes: set[str] = set()
        self.form = self._form(node, [])

    def _form(self, node: Any, scopes: list[dict]) -> Any:
        """``scopes``: local names, innermost last, each with None or with (module, name there) of an import."""
        if isinstance(node, list):
            return [self._form(n, scopes) for n in node if not _says_nothing(n)]
        if not isinstance(node, ast.AST):
            return node if isinstance(node, str | int) else repr(node)
        if isinstance(node, ast.Name | ast.Attribute):
            return self._name(node, scopes)
        if isinstance(node, ast.Constant):
            return ["Constant", repr(node.value), *self._file(node.value)]
        if isinstance(node, ast.Call):
            self._by_name(node)
        # Python's versions disagree on empty fields.
        fields = {key: value for key, value in ast.iter_fields(node) if value is not None and value != []}
        for key in ("returns", "type_comment", *["annotation"] * (not (scopes and scopes[-1].get("class")))):
            fields.pop(key, None)  # of a class's fields, annotations make code (dataclasses, pydantic)
        outside = {key: self._form(fields.pop(key), scopes) for key in ("decorator_list", "bases", "keywords")
                   if isinstance(node, _DEFINITIONS) and key in fields}  # fmt: skip
        if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
            args = fields.pop("args")
            outside["defaults"] = self._form([*args.defaults, *(d or ast.Pass() for d in args.kw_defaults)], scopes)
            each = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
            outside["args"] = [a.arg if a else None for a in each]
            scopes = [s for s in scopes if not s.get("class")]
            scopes += [{a.arg: None for a in each if a} | _local(node, self.module.package)]
        elif isinstance(node, ast.ClassDef):
            scopes = [*scopes, _local(node, self.module.package) | {"class": True}]
        elif isinstance(node, _COMPREHENSIONS):
            outside["first"] = self._form(node.generators[0].iter, scopes)
            scopes = [*scopes, {name: None for g in node.generators for name in _stored(g.target)}]
            fields["generators"] = [{**vars(g), "iter": g.iter if i else None} for i, g in enumerate(node.generators)]
            fields["generators"] = [self._form(list(g.values()), scopes) for g in fields["generators"]]
        return [type(node).__name__, outside, {key: self._form(value, scopes) for key, value in fields.items()}]

    def _name(self, node: ast.Name | ast.Attribute, scopes: list[dict]) -> list:
        targets = self._targets(node, scopes)
        units = {target for target in targets if isinstance(target, _Unit)}
        ours = [name for name in targets if name in self.sources.modules]
        self.used |= units.union(*(self.sources.modules[name].all() for name in ours))  # a module as a value: any of it
        if units or ours:
            return ["ours", sorted({unit.name for unit in units})]
        if targets:
            if "importlib.import_module" in targets:
                inside = [m for name, m in self.sources.modules.items() if name.startswith(self.module.package)]
                self.used |= {unit for module in inside for unit in module.all()}
            return ["from", sorted(targets)]
        if isinstance(node, ast.Name):
            return ["Name", node.id]
        self.attributes.add(node.attr)
        return ["Attribute", self._form(node.value, scopes), node.attr]

    def _targets(self, node: ast.AST, scopes: list[dict]) -> list:
        """What a (dotted) name stands for, as `Sources.member` has it; nothing for a local or built-in one."""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            for scope in reversed(scopes):
                if node.id in scope:
                    return self.sources.member(*scope[node.id]) if scope[node.id] else []
            found = self.module.bound.get(node.id, ())
            return [t for b in found for t in ([b] if isinstance(b, _Unit) else self.sources.member(*b))]
        if isinstance(node, ast.Attribute):
            above = self._targets(node.value, scopes)
            if not any(isinstance(target, _Unit) for target in above):
                return [found for name in above for found in self.sources.member(name, node.attr)]
        return []

    def _by_name(self, call: ast.Call) -> None:
        if getattr(call.func, "id", None) in ("getattr", "hasattr", "attrgetter", "methodcaller"):
            name = call.args[-1] if len(call.args) < 2 else call.args[1]
            self.attributes |= {*str(name.value).split(".")} if isinstance(name, ast.Constant) else self.module.names

    def _file(self, value: Any) -> Iterator[str]:
        if self.module.folder and isinstance(value, str) and re.fullmatch(r"[\w/-]{1,99}(\.\w{1,9})+", value):
            file = self.module.folder / value
            if file.is_file() and file.suffix != ".py":
                yield hashlib.sha256(file.read_bytes()).hexdigest()


def imported(node: ast.AST, package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """The names that an import binds, each with a module and the name there (None: the module itself)."""
    for alias in node.names if isinstance(node, _IMPORTS) else ():
        first = alias.name.partition(".")[0]
        if isinstance(node, ast.Import):
            yield (alias.asname, (alias.name, None)) if alias.asname else (first, (first, None))
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*above, *filter(None, [node.module])])
        if alias.name == "*":
            raise ValueError(f"{package}: from {module} import *: import by name, so that it can be followed")
        yield alias.asname or alias.name, (module, alias.name)


def _local(node: ast.AST, package: str) -> dict[str, Any]:
    """The names that a function or a class's body binds: None, or what an import says."""
    found, outer = {}, set()
    for n in _inside(node.body if isinstance(node.body, list) else [node.body]):
        found |= dict.fromkeys(_binds(n)) | dict(imported(n, package))
        outer.update(n.names if isinstance(n, ast.Global) else ())
    return {name: of for name, of in found.items() if name not in outer}


def _binds(n: ast.AST) -> Iterator[str]:
    if isinstance(n, ast.Name):
        if not isinstance(n.ctx, ast.Load):
            yield n.id
    elif isinstance(n, _COMPREHENSIONS):
        yield from (walrus.target.id for walrus in ast.walk(n) if isinstance(walrus, ast.NamedExpr))
    elif isinstance(getattr(n, "name", None), str) and not isinstance(n, ast.alias):  # def, except ... as, match
        yield n.name


def _stored(node: ast.AST) -> list[str]:
    """The names that a statement or a target binds in the scope that it stands in, imports aside."""
    return [name for n in _inside([node]) for name in _binds(n)]


def _inside(todo: list[ast.AST]) -> Iterator[ast.AST]:
    """Nodes and all below them, but not what stands in scopes of their own."""
    todo = todo[::-1]
    while todo:
        yield (node := todo.pop())
        if not isinstance(node, (*_DEFINITIONS, ast.Lambda, *_COMPREHENSIONS)):
            todo += [*ast.iter_child_nodes(node)][::-1]


def _says_nothing(node: Any) -> bool:
    """Whether a statement is an import, a docstring or another lone constant, or a line to the log."""
    value = node.value if isinstance(node, ast.Expr) else None
    logs = isinstance(value, ast.Call) and ast.unparse(value.func).startswith("log.")
    return isinstance(node, _IMPORTS) or isinstance(value, ast.Constant) or logs
