"""The fingerprint of the code that computes a number.

A number is reused only if the code that computed it is still the same. The code that counts are the
modules that a step's function imports, directly or not, in this package and in the user's own
modules. Of each module its normalised syntax tree counts, so that a changed comment, message or
type annotation, and a module that is moved, keep every number. No module is imported for this.

What the fingerprint cannot see: files of data, variables of the environment, installed libraries
(`impactx.version` records their versions), and modules that are imported by a computed name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from impactx.code.imports import PACKAGE, Graph, is_users_own
from impactx.code.syntax import digest_of, with_parents

__all__ = ["CodeFingerprint", "code_fingerprint", "explain_difference", "imported_files",
           "is_users_own"]


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
    graph = Graph(roots, path)
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
        parts.add(digest_of(json.dumps([trees[name], inside])))
        modules[name] = digest_of(json.dumps([trees[name], [use[:2] for use in inside]]))[:16]
    return CodeFingerprint(digest_of(json.dumps(sorted(parts))), dict(sorted(modules.items())))


def imported_files(roots: Iterable[str], path: Sequence[str] | None = None) -> dict[str, Path]:
    """Return the file of every module of the user's that must be there to import some modules.

    Other than for the fingerprint, every import statement counts, and this package does not.

    Args:
        roots: Dotted names of the modules to begin with.
        path: As for `code_fingerprint`.
    """
    graph = Graph(roots, path)
    waiting, files = list(graph.roots), dict[str, Path]()
    while waiting:
        name = waiting.pop()
        if name in files or name.partition(".")[0] == PACKAGE or not graph.counts(name):
            continue
        files[name] = Path(str(graph.spec(name).origin))  # type: ignore[union-attr]
        for imported in graph.source(name).imports:
            origin = graph.origin(name, imported)
            waiting += [*with_parents(origin), *imported.whole, f"{origin}.{imported.attribute}"]
        waiting += with_parents(name)
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
