"""Extensions in files of the user's own, and in installed packages.

A plugin is a Python file that registers attributions, approaches, data sources or metrics of maps
(docs/extending.md). An experiment names it by its path, `plugins=[my_file.py]`; a package that is
installed brings its own by an entry point in the group "impactx.plugins". Everything that can be
wrong with one is found here, before anything starts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter

from impactx.code import code_fingerprint, imported_files
from impactx.settings.base import Settings
from impactx.settings.extensions import KINDS
from impactx.settings.registry import PLUGINS_VARIABLE, RegistrationError

GROUP = "impactx.plugins"  # of entry points
_imported_code: dict[str, str] = {}  # the digest of each plugin's code when it was imported


class PluginError(ValueError):
    """A plugin cannot be used; the message names its file, the reason and the remedy."""


@dataclass(frozen=True)
class Plugin:
    """A module that registers extensions.

    Attributes:
        module: The name by which it is imported.
        extensions: What it registers: (kind, name), such as ("attribution", "occlusion").
        file: The user's file; None for an installed package.
        roots: The module and those that define its extensions.
        code: The digest of the code that these reach.
    """

    module: str
    extensions: tuple[tuple[str, str], ...]
    file: Path | None
    roots: tuple[str, ...]
    code: str


@dataclass(frozen=True)
class RuntimeEnvironment:
    """What a process of a cluster needs to import the plugins.

    Attributes:
        variables: Variables of the environment.
        folder: A folder with the plugins' files and the user's modules that they import, which may
            stand in PYTHONPATH; None without any.
        modules: The files and folders in it, for `py_modules` of Ray's runtime environment.
    """

    variables: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    modules: tuple[Path, ...] = ()


def load(paths: Sequence[str] = ()) -> tuple[Plugin, ...]:
    """Import the plugins of some files and of all installed packages, and check them.

    The folder of each file is put at the end of Python's search path, so that modules beside it can
    be imported. Loading a file again does nothing.

    Args:
        paths: Files, relative to the working directory.

    Returns:
        The plugins, those of installed packages first.

    Raises:
        PluginError: One of them cannot be used.
    """
    installed = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    if not installed and not paths:
        return ()
    for kind in KINDS:  # first, so that a name that is taken is an error of the plugin
        kind.classes()
    plugins = [_from_package(point.name, point.module) for point in installed]
    plugins += [_from_file(path) for path in dict.fromkeys(paths)]
    return tuple(plugins)


def _from_package(name: str, module: str) -> Plugin:
    where = f"the plugin {name} of an installed package ({module})"
    _imported(where, module)
    package = module.partition(".")[0]
    return _checked(where, module, lambda home: home.partition(".")[0] == package, None)


def _from_file(path: str) -> Plugin:
    file = Path(path).expanduser().resolve()
    if not file.exists():
        raise PluginError(f"plugins: {path!r}: no such file (looked in {Path.cwd()})")
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"plugins: {path!r}: a plugin is one Python file, my_plugin.py")
    module = file.stem
    if not module.isidentifier():
        raise PluginError(f"plugins: {path!r}: no module can be called {module!r}; rename the file "
                          "to letters, digits and _")
    try:
        compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise PluginError(f"plugins: {path}{line}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise PluginError(f"plugins: {path!r} cannot be read: {error}") from error
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    importlib.invalidate_caches()
    other = _place(module)
    if other != str(file):
        raise PluginError(f"plugins: {path!r}: the module {module!r} exists already ({other}); "
                          "rename the file")
    where = f"plugins: {path}"
    _imported(where, module, file)
    helpers = imported_files([module])
    return _checked(where, module, helpers.__contains__, file)


def _place(module: str) -> str:
    """Return the file that the import of a top-level module would read, or the kind of module."""
    loaded = sys.modules.get(module)
    spec = importlib.util.find_spec(module) if loaded is None else None
    origin = getattr(loaded, "__file__", None) if spec is None else spec.origin
    file = Path(origin or "built-in")
    return str(file.resolve()) if file.exists() else str(file)


def _imported(where: str, module: str, file: Path | None = None) -> None:
    """Import a module; any error is one message with the line of the plugin's file."""
    try:
        importlib.import_module(module)
    except RegistrationError as error:
        raise PluginError(f"{where}: {error}") from error
    except SyntaxError as error:  # of a module that it imports
        raise PluginError(f"{where}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except SystemExit as error:
        raise PluginError(f"{where}{_line(error, file)}: the file ends the program (SystemExit) "
                          "when it is imported; a plugin only defines classes") from error
    except Exception as error:
        raise PluginError(f"{where}{_line(error, file)}: {type(error).__name__}: {error}"
                          ) from error


def _line(error: BaseException, file: Path | None) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if file is not None and frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def _checked(where: str, module: str, belongs: Callable[[str], bool], file: Path | None) -> Plugin:
    """Return an imported plugin.

    Args:
        where: How messages begin.
        module: The plugin's name.
        belongs: Whether a module of this name is the plugin's, so that what it registers is, too.
        file: The plugin's file, if it is one.
    """
    classes = {(kind.kind, name): extension for kind in KINDS
               for name, extension in kind.classes().items() if belongs(extension.__module__)}
    if not classes:
        raise PluginError(f"{where} registers nothing: put one of the decorators @attribution, "
                          "@approach, @source and @map_metric above a class (docs/extending.md)")
    for (kind, name), extension in classes.items():
        check_defaults(f"{where}: the {kind} {name!r}", extension)
    roots = tuple(sorted({module, *(extension.__module__ for extension in classes.values())}))
    code = code_fingerprint(roots).digest
    if _imported_code.setdefault(module, code) != code:
        raise PluginError(f"{where}: its code has changed since this process imported it, and keys "
                          "would name code that does not run: start the process again")
    return Plugin(module, tuple(sorted(classes)), file, roots, code)


def check_defaults(where: str, extension: type[Settings]) -> None:
    """Prove that the defaults of an extension's settings are plain data.

    Settings travel to other processes, into keys and onto disk as JSON: a default must come back
    from there as an equal value.

    Args:
        where: How the message begins.
        extension: The class.

    Raises:
        PluginError: A default does not; the message names its field.
    """
    for name, info in extension.model_fields.items():
        if info.is_required():
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        try:
            # mypy accepts no annotation that is made at run time.
            adapter = TypeAdapter[Any](Annotated[info.annotation, info])  # type: ignore[arg-type]
            plain = json.dumps(adapter.dump_python(default, mode="json"), allow_nan=False)
            same = bool(adapter.validate_python(json.loads(plain)) == default)
        except Exception as error:  # whatever the types of somebody's settings raise
            raise PluginError(f"{where}: the default of {name} is no plain data: "
                              f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        if not same:
            raise PluginError(f"{where}: the default of {name}, {default!r}, is no plain data: "
                              f"written as JSON and read again it is another value")


@contextlib.contextmanager
def runtime_environment(plugins: Sequence[Plugin]) -> Iterator[RuntimeEnvironment]:
    """Copy what the plugins need to a folder, which is deleted at the end.

    Copied are the plugins' files and the user's modules that these import, and nothing that lies
    beside them: a folder of somebody's may hold data, and modules that would hide Python's own.
    Workers that start late, when a file has been edited already, still import what the job began
    with. Installed packages do not travel.

    Args:
        plugins: The loaded plugins.

    Yields:
        What the processes of a cluster need. The folder must be there until all of them have
        started, if it stands in their PYTHONPATH; Ray reads `modules` when it connects.
    """
    if not plugins:
        yield RuntimeEnvironment()
        return
    variables = {PLUGINS_VARIABLE: ",".join(plugin.module for plugin in plugins)}
    files = imported_files([plugin.module for plugin in plugins if plugin.file is not None])
    with tempfile.TemporaryDirectory(prefix="impactx-plugins-") as created:
        folder = Path(created)
        for name, file in files.items():
            parts = name.split(".")
            target = folder.joinpath(*parts[:-1], file.name)
            if file.stem == "__init__":
                target = folder.joinpath(*parts, file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        modules = tuple(sorted(folder.iterdir()))
        for package in modules:
            # Ray identifies a folder by its content alone: two packages with the same files would
            # be one, under the name of the first.
            if package.is_dir():
                (package / "PACKAGE").write_text(package.name, encoding="utf8")
        yield RuntimeEnvironment(variables, folder, modules)
