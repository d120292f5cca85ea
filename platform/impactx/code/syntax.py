"""The normalised syntax tree of a module, as a hash, and the names that it imports and uses."""

from __future__ import annotations

import ast
import builtins
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


@dataclass(frozen=True)
class Import:
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
class Source:
    """What one file holds.

    Attributes:
        tree: sha256 in hex of the normalised syntax tree; "" if nothing is left of it.
        imports: Every name of every import statement, in functions too.
        uses: For each imported name, the chains of attributes that the normalised tree reads of it.
        mentioned: All names in the whole tree.
        defined: Names that the module's own statements bind.
    """

    tree: str
    imports: tuple[Import, ...] = ()
    uses: Mapping[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)
    mentioned: frozenset[str] = frozenset()
    defined: frozenset[str] = frozenset()


@cache
def read(file: str, mtime_ns: int, size: int, inode: int) -> Source:
    """Return what a file holds; the arguments after the first notice that it has changed."""
    content = Path(file).read_bytes()
    if file.endswith(tuple(EXTENSION_SUFFIXES)) or not file.endswith(".py"):
        return Source(hashlib.sha256(content).hexdigest())
    return parse(content)


def digest_of(text: str) -> str:
    """Return the sha256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def with_parents(name: str) -> list[str]:
    """Return the names of a module and of the packages around it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def parse(content: bytes) -> Source:
    """Return what a module's source holds; what cannot be parsed counts by its bytes."""
    try:
        tree = ast.parse(content)
        imports = tuple(_imports(tree))
        writer = _Writer({imported.bound for imported in imports})
        writer.write(tree.body)
    except (SyntaxError, ValueError, RecursionError):
        return Source(hashlib.sha256(content).hexdigest())
    text = "".join(writer.written)
    return Source(
        digest_of(text) if text else "", imports,
        {name: frozenset(chains) for name, chains in writer.uses.items()},
        frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)),
        frozenset(_defined(tree.body)))


def _imports(tree: ast.Module) -> Iterator[Import]:
    typing_only = {id(inside) for node in ast.walk(tree)
                   if isinstance(node, ast.If) and _is_type_checking(node.test)
                   for statement in node.body for inside in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                if alias.asname or first == alias.name:
                    yield Import(alias.asname or first, alias.name, 0, "", id(node) in typing_only)
                else:
                    yield Import(first, first, 0, "", id(node) in typing_only,
                                  tuple(with_parents(alias.name)))
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                yield Import(alias.asname or alias.name, node.module or "", node.level, alias.name,
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
