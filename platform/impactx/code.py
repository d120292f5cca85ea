"""The fingerprint of the code that computes a number.

A number is reused only if the code that computed it is still the same. The code that counts are the
modules that a step's function imports, directly or not, in this package and in the user's own
modules. Of each module its normalised syntax tree counts, so that a changed comment, message or
type annotation, and a module that is moved, keep every number. No module is imported for this.

What the fingerprint cannot see: files of data, variables of the environment, installed libraries
(`impactx.version` records their versions), and modules that are imported by a computed name.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = "impactx"
# Modules and packages of `impactx` that compute no numbers: they hold the settings, whose values
# are in every key themselves, carry work out, keep it, or show it. Each would otherwise be reached
# from many steps, and a change of the report would cost all maps. "" is impactx/__init__.py. An
# extension's class holds its settings and its methods in one file outside of them, which counts
# whole.
ROOMS_WITHOUT_NUMBERS = frozenset({
    "", "benchmarks", "cli", "cluster", "code", "command", "configuration", "costs", "fetching",
    "logging", "plugins", "report", "results", "run", "serving", "settings", "settings_doc",
    "storage", "timing", "tracking", "version"})


@dataclass(frozen=True)
class CodeFingerprint:
    """The code that is reached from some modules.

    Attributes:
        digest: sha256 in hex of all normalised syntax trees and of what their imported names are.
            The modules' own names have no part in it.
        modules: A hash of each module's normalised syntax tree and of the names that it uses of
            others, by the module's name. Modules with nothing but imports and docstrings are left
            out.
    """

    digest: str
    modules: Mapping[str, str]


def code_fingerprint(
    roots: Iterable[str], path: Sequence[str] | None = None
) -> CodeFingerprint:
    """Return the fingerprint of the code that is reached from some modules.

    Counted are the modules of this package and of the user: neither Python's library nor installed
    packages. A root counts in any case, and with it all that it reaches in its own top-level
    package (an extension may be an installed package). A name that a package's `__init__` only
    hands on counts in the module that defines it; the package's other modules do not count then.

    Args:
        roots: Dotted names of the modules to begin with.
        path: Folders in which modules are looked for; None for Python's own search, by which a
            module that is already imported is the one that was imported.

    Raises:
        ModuleNotFoundError: A root has no file, so that nothing is known of its code.
    """
    graph = _Graph(roots, path)
    for root in graph.roots:
        if not graph.counts(root):
            raise ModuleNotFoundError(f"the module {root} has no file whose code could be compared",
                                      name=root)
    reached = graph.reached()
    trees = {name: graph.source(name).tree for name in reached}
    links = {name: graph.links(name) for name in reached}
    parts, modules = set(), {}
    for name in reached:
        if not trees[name] and not links[name]:
            continue
        inside = sorted((a, b, trees.get(c, "")) for a, b, c in links[name])
        parts.add(_digest(json.dumps([trees[name], inside])))
        modules[name] = _digest(json.dumps([trees[name], [use[:2] for use in inside]]))[:16]
    return CodeFingerprint(_digest(json.dumps(sorted(parts))), dict(sorted(modules.items())))


def imported_files(roots: Iterable[str], path: Sequence[str] | None = None) -> dict[str, Path]:
    """Return the file of every module of the user's that must be there to import some modules.

    Other than for the fingerprint, every import statement counts, and this package does not.

    Args:
        roots: Dotted names of the modules to begin with.
        path: As for `code_fingerprint`.
    """
    graph = _Graph(roots, path)
    waiting, files = list(graph.roots), dict[str, Path]()
    while waiting:
        name = waiting.pop()
        if name in files or name.partition(".")[0] == PACKAGE or not graph.counts(name):
            continue
        files[name] = Path(str(graph.spec(name).origin))  # type: ignore[union-attr]
        for imported in graph.source(name).imports:
            origin = graph.origin(name, imported)
            waiting += [*_with_parents(origin), *imported.whole, f"{origin}.{imported.attribute}"]
        waiting += _with_parents(name)
    return dict(sorted(files.items()))


def explain_difference(old: CodeFingerprint, new: CodeFingerprint) -> str:
    """Return one sentence that says which code differs, or "" if it is the same.

    Args:
        old: The fingerprint of earlier code.
        new: The fingerprint of today's code, from the same roots.
    """
    if old.digest == new.digest:
        return ""
    gone, added = set(old.modules) - set(new.modules), set(new.modules) - set(old.modules)
    # A module that was moved is gone in one place and new in another, with the same hash.
    gone_hashes, added_hashes = {old.modules[n] for n in gone}, {new.modules[n] for n in added}
    both = set(old.modules) & set(new.modules)
    groups = (
        ({n for n in both if old.modules[n] != new.modules[n]}, "{} changed"),
        ({n for n in added if new.modules[n] not in gone_hashes}, "{} {be} new"),
        ({n for n in gone if old.modules[n] not in added_hashes}, "{} {be} no longer used"))
    clauses = [text.format(_listed(sorted(names)), be="is" if len(names) == 1 else "are")
               for names, text in groups if names]
    return f"the code differs: {', '.join(clauses) or 'the same modules import other names'}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


class _Graph:
    """Modules and what they import, as far as it is asked for.

    Args:
        roots: Names of modules; the top-level packages of these count though they are installed.
        path: Folders in which modules are looked for, or None.
    """

    def __init__(self, roots: Iterable[str], path: Sequence[str] | None) -> None:
        self.roots = sorted(set(roots))
        self._packages = {root.partition(".")[0] for root in self.roots} | {PACKAGE}
        self._path = path
        self._specs: dict[str, ModuleSpec | None] = {}

    def spec(self, name: str) -> ModuleSpec | None:
        """Return where a module is, without importing it or its parents."""
        if name not in self._specs:
            self._specs[name] = self._find(name)
        return self._specs[name]

    def _find(self, name: str) -> ModuleSpec | None:
        loaded = sys.modules.get(name) if self._path is None else None
        file = getattr(loaded, "__file__", None)
        if file:
            return getattr(loaded, "__spec__", None) or ModuleSpec(name, None, origin=file)
        parent, _, last = name.rpartition(".")
        if not last.isidentifier():
            return None
        folders = self._path
        if parent:
            above = self.spec(parent)
            if above is None or above.submodule_search_locations is None:
                return None
            # A package without __init__ would look for its folders again, in imported packages.
            locations = above.submodule_search_locations
            folders = list(getattr(locations, "_path", locations))
        # Packages that are installed in place bring finders of their own.
        finders = sys.meta_path if self._path is None else [PathFinder]
        try:
            found = (finder.find_spec(name, folders, None) for finder in finders)
            return next((spec for spec in found if spec is not None), None)
        except KeyError:  # a package without __init__ in a package that is not imported
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [
                str(Path(folder, last)) for folder in folders or () if Path(folder, last).is_dir()]
            return spec

    def counts(self, name: str) -> bool:
        """Return whether a module has a file and is this package's, the user's or a root's."""
        spec = self.spec(name)
        if spec is None or not spec.origin or not spec.has_location and spec.loader is not None:
            return False
        if name.partition(".")[0] in self._packages:
            return True
        return is_users_own(Path(spec.origin))

    def source(self, name: str) -> _Source:
        """Return what a module that counts holds."""
        spec = self.spec(name)
        assert spec is not None and spec.origin is not None
        file = Path(spec.origin)
        if file.is_file():
            status = file.stat()
            return _read(str(file), status.st_mtime_ns, status.st_size, status.st_ino)
        return _parsed(spec.loader.get_data(spec.origin))  # type: ignore[union-attr]  # in a zip

    def origin(self, name: str, imported: _Import) -> str:
        """Return the full name of the module that an import statement of `name` begins with."""
        if not imported.level:
            return imported.module
        spec = self.spec(name)
        package = name
        if spec is None or spec.submodule_search_locations is None:
            package = name.rpartition(".")[0]
        try:
            return resolve_name("." * imported.level + imported.module, package)
        except ImportError:  # beyond the top-level package: an error of the module's, when it runs
            return imported.module

    def definition(
        self, module: str, attributes: Sequence[str],
        seen: frozenset[tuple[str, str]] = frozenset(),
    ) -> tuple[list[str], str]:
        """Follow attributes of a module to where the last of them is defined.

        Returns:
            The modules on the way, the defining one last, and the rest of the attributes: of the
            defining module, or of an object in it ("" if the module itself is meant).
        """
        way = [module]
        if not attributes or not self.counts(module):
            return way, ".".join(attributes)
        first, rest = attributes[0], attributes[1:]
        if (module, first) not in seen:
            seen |= {(module, first)}
            for imported in self.source(module).imports:
                if imported.bound in (first, "*") and imported.attribute:
                    target = self.origin(module, imported)
                    name = first if imported.bound == "*" else imported.attribute
                    further, left = self.definition(target, [name, *rest], seen)
                    if imported.bound != "*" or self._defines(further[-1], left):
                        return [*way, *further], left
        if self.spec(f"{module}.{first}") is not None:
            further, left = self.definition(f"{module}.{first}", rest, seen)
            return [*way, *further], left
        return way, ".".join(attributes)

    def _defines(self, module: str, attribute: str) -> bool:
        first = attribute.partition(".")[0]
        return not first or not self.counts(module) or first in self.source(module).defined

    def references(self, name: str) -> Iterator[tuple[str, str, list[str], str]]:
        """Give what a module uses of each of its imports.

        Yields:
            The bound name; the attributes of it that are used, joined by dots; the modules on the
            way to their definition; and the definition's name in the last of these.
        """
        spec = self.spec(name)
        hands_on = spec is not None and spec.submodule_search_locations is not None
        source = self.source(name)
        for imported in source.imports:
            if imported.typing_only:
                continue
            origin = self.origin(name, imported)
            first = [imported.attribute] if imported.attribute else []
            if imported.bound == "*":
                yield from self._all_of("*", origin)
                continue
            chains = source.uses.get(imported.bound, frozenset())
            if not chains:
                # What a package takes from modules and does not use, it hands on. Any other import
                # whose name appears nowhere is there for its effect; one whose name appears in
                # annotations and messages alone does nothing.
                handed_on = hands_on and imported.attribute
                if not handed_on and imported.bound not in source.mentioned:
                    way, left = self.definition(origin, first)
                    yield "", "", [*way, *imported.whole], left
                continue
            for chain in sorted(chains):
                way, left = self.definition(origin, [*first, *chain])
                yield imported.bound, ".".join(chain), [*way, *imported.whole], left
                if not left and not chain:  # the module itself is handed to somebody
                    yield from self._all_of(imported.bound, way[-1])

    def _all_of(self, bound: str, module: str) -> Iterator[tuple[str, str, list[str], str]]:
        """Give a module that is used whole, and each name that it hands on, as `references` do."""
        yield bound, "*", [module], ""
        if not self.counts(module):
            return
        for imported in self.source(module).imports:
            if imported.attribute not in ("", "*"):
                way, left = self.definition(self.origin(module, imported), [imported.attribute])
                yield bound, f"*.{imported.bound}", way, left

    def reached(self) -> list[str]:
        """Return the names of all modules that count, sorted."""
        waiting, found = list(self.roots), set[str]()
        while waiting:
            name = waiting.pop()
            if name in found or _without_numbers(name) or not self.counts(name):
                continue
            found.add(name)
            waiting += _with_parents(name)
            for _, _, way, _ in self.references(name):
                waiting += way
        return sorted(found)

    def links(self, name: str) -> set[tuple[str, str, str]]:
        """Return what the imported names of a module stand for: (use, definition, its module).

        The module is "" unless it counts; the definition's name is full if it is in a library.
        """
        links = set()
        for bound, chain, way, left in self.references(name):
            home = way[-1]
            own = self.counts(home)
            if not bound and not own:
                continue  # a library imported for its effect
            use = f"{bound}.{chain}" if chain else bound
            links.add((use, left if own else f"{home}:{left}",
                       home if own and not _without_numbers(home) else ""))
        return links


def _without_numbers(name: str) -> bool:
    package, _, rest = name.partition(".")
    return package == PACKAGE and rest.partition(".")[0] in ROOMS_WITHOUT_NUMBERS


def is_users_own(file: Path) -> bool:
    """Return whether a module's file is neither Python's library nor an installed package's."""
    return not {"site-packages", "dist-packages"} & set(file.parts) and not any(
        file.is_relative_to(folder) for folder in _standard_library())


@cache
def _standard_library() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple({Path(paths[name]) for name in ("stdlib", "platstdlib")})


@dataclass(frozen=True)
class _Import:
    """One name of an import statement.

    Attributes:
        bound: The name that it has in the importing module; "*" for all names.
        module: The module as it is written, without the dots of a relative import.
        level: The number of these dots.
        attribute: What is taken from the module; "" for the module itself.
        typing_only: Whether it stands under `if TYPE_CHECKING`.
        whole: For `import a.b.c`, which binds `a`: the modules that it imports.
    """

    bound: str
    module: str
    level: int
    attribute: str
    typing_only: bool
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """What one file holds.

    Attributes:
        tree: sha256 in hex of the normalised syntax tree; "" if nothing is left of it.
        imports: Every name of every import statement, in functions too.
        uses: For each imported name, the chains of attributes that the normalised tree reads of it.
        mentioned: All names in the whole tree.
        defined: Names that the module's own statements bind.
    """

    tree: str
    imports: tuple[_Import, ...] = ()
    uses: Mapping[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)
    mentioned: frozenset[str] = frozenset()
    defined: frozenset[str] = frozenset()


@cache
def _read(file: str, mtime_ns: int, size: int, inode: int) -> _Source:
    """Return what a file holds; the arguments after the first notice that it has changed."""
    content = Path(file).read_bytes()
    if file.endswith(tuple(EXTENSION_SUFFIXES)) or not file.endswith(".py"):
        return _Source(hashlib.sha256(content).hexdigest())
    return _parsed(content)


def _parsed(content: bytes) -> _Source:
    try:
        tree = ast.parse(content)
        imports = tuple(_imports(tree))
        writer = _Writer({imported.bound for imported in imports})
        writer.write(tree.body)
    except (SyntaxError, ValueError, RecursionError):
        return _Source(hashlib.sha256(content).hexdigest())
    text = "".join(writer.written)
    return _Source(
        _digest(text) if text else "", imports,
        {name: frozenset(chains) for name, chains in writer.uses.items()},
        frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)),
        frozenset(_defined(tree.body)))


def _imports(tree: ast.Module) -> Iterator[_Import]:
    typing_only = {id(inside) for node in ast.walk(tree)
                   if isinstance(node, ast.If) and _is_type_checking(node.test)
                   for statement in node.body for inside in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                if alias.asname or first == alias.name:
                    yield _Import(alias.asname or first, alias.name, 0, "", id(node) in typing_only)
                else:
                    yield _Import(first, first, 0, "", id(node) in typing_only,
                                  tuple(_with_parents(alias.name)))
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                yield _Import(alias.asname or alias.name, node.module or "", node.level, alias.name,
                              id(node) in typing_only)


def _defined(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """Give the names that statements at a module's top level bind, imports apart."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        else:
            yield from (node.id for node in ast.walk(statement)
                        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
            or isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING")


# Assignments to these describe a module and compute nothing.
_DESCRIPTIONS = {"__all__", "__author__", "__license__", "__version__"}
# Decorators that read no annotations; any other may (pydantic's and functools' do).
_PLAIN_DECORATORS = {"abstractmethod", "cached_property", "classmethod", "contextmanager",
                     "override", "property", "staticmethod"}
_LOGGERS = {"log", "logger", "logging", "LOG", "LOGGER", "_log", "_logger"}
_LEVELS = {"critical", "debug", "error", "exception", "info", "warning"}
_BUILTINS = frozenset(vars(builtins))
# Keywords of pydantic's Field that are documentation.
_DOCUMENTATION = {"description", "examples", "title"}
# Syntax tree fields that repeat what stands around them, or hold comments.
_REDUNDANT = {"ctx", "kind", "type_comment", "type_ignores"}


class _Writer:
    """Writes a syntax tree as text, without what computes nothing.

    Empty fields are left out: a later version of Python that has further ones writes the same text.

    Args:
        imported: Names that import statements bind.
    """

    def __init__(self, imported: set[str]) -> None:
        self.written: list[str] = []
        self.uses: dict[str, set[tuple[str, ...]]] = {}
        self._imported = imported
        self._in_class = False  # whether the statements are a class's own: annotations are fields
        self._annotated = True  # whether the annotations of a function's arguments count

    def write(self, value: object) -> None:
        """Write a node, a list of nodes, or a constant."""
        if isinstance(value, list):
            for item in value:
                self.write(item)
        elif not isinstance(value, ast.AST):
            self.written.append(f"{type(value).__name__}:{value!r};")
        elif isinstance(value, ast.stmt):
            self._statement(value)
        elif isinstance(value, ast.Attribute | ast.Name):
            self._reference(value)
        elif isinstance(value, ast.Call) and _name(value.func) == "Field":
            self._fields(value, without={"keywords"})
            self.write([k for k in value.keywords if k.arg not in _DOCUMENTATION])
        elif isinstance(value, ast.arg) and not self._annotated:
            self._fields(value, without={"annotation"})
        else:
            self._fields(value)

    def _fields(self, node: ast.AST, without: Iterable[str] = ()) -> None:
        self.written.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if name in _REDUNDANT or name in without:
                continue
            if value is None and not isinstance(node, ast.Constant) or value == []:
                continue
            self.written.append(f"{name}=")
            self.write(value)
        self.written.append(")")

    def _reference(self, node: ast.Attribute | ast.Name) -> None:
        chain: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            if inner.id in self._imported:
                self.uses.setdefault(inner.id, set()).add(tuple(reversed(chain)))
            self.written.append(f"{inner.id}{''.join('.' + part for part in reversed(chain))};")
        else:
            self._fields(node)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or _is_description(node):
            return
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant):  # a docstring, or ...
                return
            if isinstance(node.value, ast.Call) and _is_message(node.value.func):
                self._calls([*node.value.args, *(k.value for k in node.value.keywords)])
                return
            self._fields(node)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            self.write(node.orelse)
        elif isinstance(node, ast.Assert):
            self._fields(node, without={"msg"})
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            self.written.append("Raise(")
            self.write([node.exc.func, *(a for a in node.exc.args if not _is_text(a)),
                        *(k for k in node.exc.keywords if not _is_text(k.value))])
            self.written.append(")")
        elif isinstance(node, ast.AnnAssign) and not self._in_class:
            if node.value is not None:
                self._fields(ast.Assign(targets=[node.target], value=node.value))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            self._definition(node)
        else:
            self._fields(node)

    def _definition(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = self._in_class, self._annotated
        self._in_class = isinstance(node, ast.ClassDef)
        self._annotated = any(_name(d) not in _PLAIN_DECORATORS for d in node.decorator_list)
        self._fields(node, without=() if self._annotated else {"returns"})
        self._in_class, self._annotated = before

    def _calls(self, arguments: Iterable[ast.expr]) -> None:
        """Write the calls in a message's arguments: they may do something beside the message."""
        for argument in arguments:
            if isinstance(argument, ast.Call) and not _only_formats(argument.func):
                self.write(argument)
            else:
                self._calls(child for child in _expressions(argument))


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Give the outermost expressions inside a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        else:
            yield from _expressions(child)


def _name(node: ast.expr) -> str:
    """Return the last name of `a.b.name` or of a call of it; "" for other expressions."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_description(node: ast.stmt) -> bool:
    targets = (node.targets if isinstance(node, ast.Assign) else
               [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else [])
    return bool(targets) and all(isinstance(t, ast.Name) and t.id in _DESCRIPTIONS for t in targets)


def _is_message(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id == "print"
    if not isinstance(function, ast.Attribute):
        return False
    receiver = _name(function.value)
    return (receiver in _LOGGERS and function.attr in _LEVELS
            or (receiver, function.attr) == ("warnings", "warn"))


def _only_formats(function: ast.expr) -> bool:
    """Return whether a called function is a builtin, or a method of a literal text."""
    if isinstance(function, ast.Name):
        return function.id in _BUILTINS
    return isinstance(function, ast.Attribute) and _is_text(function.value)


def _is_text(node: ast.expr) -> bool:
    """Return whether an expression is a text by its form.

    An exception may carry a value that the code that catches it computes with; that must count.
    """
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and _is_text(node.func.value)
    return isinstance(node, ast.JoinedStr)
