"""Which modules a module imports, and where the names are defined that it uses of them."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path

from impactx.code.syntax import Import, Source, parse, read, with_parents

PACKAGE = "impactx"
# Modules and packages of `impactx` that compute no numbers: they hold the settings, whose values
# are in every key themselves, carry work out, keep it, or show it. Each would otherwise be reached
# from many steps, and a change of the report would cost all maps. "" is impactx/__init__.py. An
# extension's class holds its settings and its methods in one file outside of them, which counts
# whole. What a checkpoint holds is known by the fingerprint of its weights, and the steps that open
# one name the module of its approach themselves.
ROOMS_WITHOUT_NUMBERS = frozenset({
    "", "approaches.checkpoint", "benchmarks", "cli", "cluster", "code", "configuration", "costs",
    "experiment.artifacts", "experiment.ownership", "experiment.steps.base", "fetching",
    "logging", "plugins", "report", "results", "run", "serving", "settings", "settings_doc",
    "storage", "timing", "tracking", "version"})


class Graph:
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

    def source(self, name: str) -> Source:
        """Return what a module that counts holds."""
        spec = self.spec(name)
        assert spec is not None and spec.origin is not None
        file = Path(spec.origin)
        if file.is_file():
            status = file.stat()
            return read(str(file), status.st_mtime_ns, status.st_size, status.st_ino)
        return parse(spec.loader.get_data(spec.origin))  # type: ignore[union-attr]  # in a zip

    def origin(self, name: str, imported: Import) -> str:
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
            waiting += with_parents(name)
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
    return package == PACKAGE and (
        not rest or not ROOMS_WITHOUT_NUMBERS.isdisjoint(with_parents(rest)))


def is_users_own(file: Path) -> bool:
    """Return whether a module's file is neither Python's library nor an installed package's."""
    return not {"site-packages", "dist-packages"} & set(file.parts) and not any(
        file.is_relative_to(folder) for folder in _standard_library())


@cache
def _standard_library() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple({Path(paths[name]) for name in ("stdlib", "platstdlib")})
