"""Plugins: files of a user's own and installed packages; everything that can be wrong is one message."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from impactx import plugins
from impactx.configuration import load_settings
from impactx.plugins import PluginError, RuntimeEnvironment, load, runtime_environment
from impactx.settings import ExplainSettings
from impactx.settings.extensions import KINDS, MapMetricSettings, map_metric
from impactx.settings.registry import PLUGINS_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
HEAD = """
from __future__ import annotations
from typing import Any, Literal
from pydantic import Field
from impactx.settings.extensions import MapMetricSettings, map_metric
"""
METRIC = HEAD + """
@map_metric
class Toy(MapMetricSettings):
    metric: Literal["toy_of_mine"] = "toy_of_mine"
    factor: float = 2.0
    def of(self, value): return self.factor * value
"""


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """What a test registers and imports is gone after it; it runs in a folder of its own."""
    for kind in KINDS:
        kind.classes()
        monkeypatch.setattr(kind, "_classes", dict(kind._classes))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_imported_code", {})
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf8")
    return name


def test_a_file_beside_helpers_of_its_own(tmp_path):
    write("folder/helper_of_mine/__init__.py", "from helper_of_mine.inner import FACTOR\n")
    write("folder/helper_of_mine/inner.py", "FACTOR = 3.0\n")
    write("folder/metric_of_mine.py", METRIC.replace("2.0", "FACTOR").replace(
        "from pydantic", "from helper_of_mine import FACTOR\nfrom pydantic"))
    plugin, = load(["folder/metric_of_mine.py"])
    assert (plugin.module, plugin.file) == ("metric_of_mine", tmp_path / "folder" / "metric_of_mine.py")
    assert plugin.extensions == (("metric of maps", "toy_of_mine"),)
    toy = map_metric.parse({"metric": "toy_of_mine"})
    assert toy.of(2) == 6.0 and pickle.loads(pickle.dumps(toy)) == toy
    assert (plugin,) == load(["folder/metric_of_mine.py"]) == load([str(plugin.file), str(plugin.file)])


@pytest.mark.parametrize(("name", "text", "message"), [
    ("absent.py", None, "'absent.py': no such file"),
    ("folder.py/inside.py", "", "'folder.py': a plugin is one Python file"),
    ("plugin.txt", METRIC, "a plugin is one Python file"),
    ("my-plugin.py", METRIC, "no module can be called 'my-plugin'; rename"),
    ("plugin_a.py", "x = 1\ny = (\n", "plugin_a.py, line 2: '\\(' was never closed"),
    ("plugin_b.py", "x = 1\0", "plugin_b.py.*: .*null bytes"),
    ("plugin_c.py", METRIC + "\nx = {}['a']\n", "plugin_c.py, line 13: KeyError: 'a'"),
    ("plugin_d.py", "import no_such_module_of_mine\n", "line 1: ModuleNotFoundError: No module named"),
    ("plugin_e.py", "import json\njson.loads('{')\n", "line 2: JSONDecodeError: "),
    ("plugin_f.py", "import sys\nsys.exit(0)\n", "line 2: the file ends the program"),
    ("plugin_g.py", "import broken_of_mine\n", "broken_of_mine.py, line 1: "),
    ("plugin_h.py", "x = 1\n", "plugin_h.py registers nothing: put one of the decorators"),
    ("plugin_i.py", "", "registers nothing"),
    ("plugin_j.py", METRIC + METRIC.removeprefix(HEAD).replace("Toy", "Other"),
     "plugin_j.Other: the metric of maps 'toy_of_mine' is plugin_j.Toy already: choose another name"),
    ("plugin_k.py", METRIC.replace(' = "toy_of_mine"', ""), "plugin_k.Toy: the metric of maps needs a name"),
    ("json.py", METRIC, "the module 'json' exists already .*; rename the file"),
    ("sys.py", METRIC, "the module 'sys' exists already"),
    ("pydantic.py", METRIC, "the module 'pydantic' exists already"),
    ("antigravity.py", METRIC, "the module 'antigravity' exists already"),
    ("plugin_l.py", METRIC.replace("float = 2.0", "Any = object()"),
     "the metric of maps 'toy_of_mine': the default of factor is no plain data"),
    ("plugin_m.py", METRIC.replace("float = 2.0", "Any = {1, 2}"), "the default of factor, {1, 2}, is no plain"),
    ("plugin_n.py", METRIC.replace("float = 2.0", "float = float('nan')"), "factor is no plain data: ValueError"),
    ("plugin_o.py", METRIC.replace("float = 2.0", "Any = len"), "the default of factor is no plain data"),
    ("plugin_p.py", METRIC.replace("float = 2.0", "int = Field(0, ge=1)"), "the default of factor is no plain"),
    ("plugin_q.py", METRIC.replace("float = 2.0", "Any = Field(default_factory=lambda: 1j)"),
     "the default of factor(, 1j,)? is no plain"),
])
def test_every_mistake_is_one_message(name, text, message):
    write("broken_of_mine.py", "def f(:\n")
    if text is not None:
        write(name, text)
    with pytest.raises(PluginError, match=message) as caught:
        load([name.partition("/")[0]])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("plugins: ")


@pytest.mark.parametrize("field", [
    "factor: int", "factor: int = Field(ge=1)", "factor: tuple[int, ...] = (1, 2)", "factor: float = 1",
    "factor: frozenset[int] = frozenset([1])", "factor: list[str] = []", "factor: float | None = None",
    "factor: dict[str, int] = Field(default_factory=dict)", "factor: Literal['a', 'b'] = 'b'"])
def test_good_defaults(field):
    load([write("good_of_mine.py", METRIC.replace("factor: float = 2.0", field))])
    assert "toy_of_mine" in map_metric.names()


def test_a_name_of_a_built_in_extension_is_taken():
    @map_metric
    class BuiltIn(MapMetricSettings):
        metric: str = "toy_of_mine"

    with pytest.raises(PluginError, match="late_of_mine.Toy: the metric of maps 'toy_of_mine' is .*BuiltIn already"):
        load([write("late_of_mine.py", METRIC)])


def test_two_files_of_one_name():
    load([write("a/twice_of_mine.py", METRIC)])
    with pytest.raises(PluginError, match="'b/twice_of_mine.py': the module 'twice_of_mine' exists already"):
        load([write("b/twice_of_mine.py", METRIC)])


def test_changed_code_is_not_what_was_imported(tmp_path):
    path = write("edited_of_mine.py", METRIC)
    load([path])
    write(path, METRIC + "# a comment\n")
    load([path])
    write(path, METRIC.replace("self.factor * value", "self.factor + value"))
    with pytest.raises(PluginError, match="its code has changed since this process imported it"):
        load([path])


class Point:
    def __init__(self, name, module):
        self.name, self.module = name, module


def test_a_plugin_of_an_installed_package(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    write("site-packages/package_of_mine/__init__.py", "")
    write("site-packages/package_of_mine/metrics.py", METRIC.replace(
        "from pydantic", "from package_of_mine.helper import x\nfrom pydantic"))
    write("site-packages/package_of_mine/helper.py", "x = 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    points = [Point("mine", "package_of_mine.metrics")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "impactx.plugins" else [])
    plugin, = load()
    assert plugin.file is None and plugin.extensions == (("metric of maps", "toy_of_mine"),)
    with runtime_environment([plugin]) as environment:
        assert environment.variables == {PLUGINS_VARIABLE: "package_of_mine.metrics"}
        assert environment.modules == (), "it is installed on the nodes, too"
    points.append(Point("other", "package_of_mine.nothing"))
    with pytest.raises(PluginError, match="plugin other of an installed package .*: ModuleNotFoundError"):
        load()


def test_nothing_is_imported_without_plugins():
    assert load() == ()
    with runtime_environment(()) as environment:
        assert environment == RuntimeEnvironment()


def test_what_travels_and_what_does_not(tmp_path):
    write("f/main_of_mine.py", METRIC.replace("from pydantic", "import package_of_mine.deep.one\n"
                                              "import alone_of_mine, json, numpy\nfrom pydantic"))
    write("f/package_of_mine/__init__.py", "")
    write("f/package_of_mine/deep/one.py", "from package_of_mine import two\n")  # deep has no __init__
    write("f/package_of_mine/two.py", "")
    write("f/package_of_mine/three.py", "raise RuntimeError")
    write("f/alone_of_mine.py", "")
    write("f/unused_of_mine.py", "")
    write("f/random.py", "raise RuntimeError('hides Python\\'s own')")
    write("f/data.bin", "many")
    with runtime_environment(load(["f/main_of_mine.py"])) as environment:
        folder = environment.folder
        files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        assert files == {"main_of_mine.py", "alone_of_mine.py", "package_of_mine/__init__.py",
                         "package_of_mine/deep/one.py", "package_of_mine/two.py", "package_of_mine/PACKAGE"}
        assert [module.name for module in environment.modules] == [
            "alone_of_mine.py", "main_of_mine.py", "package_of_mine"]
        # A fresh process finds the plugin by the variable alone.
        program = "from impactx.settings.extensions import map_metric\nprint(map_metric.parse({'metric': 'toy_of_mine'}).of(4))"
        paths = os.pathsep.join([str(ROOT / "platform"), str(folder)])
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/",
                              env={**os.environ, "PYTHONPATH": paths, **environment.variables})
        assert done.stdout.strip() == "8.0", done.stderr
    assert not folder.exists()


def test_ray_takes_files_and_packages_as_they_lie_in_the_folder(tmp_path):
    """A folder of py_modules is a package of its name; a file is a module of its name; equal folders are one."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    for name in ("first_of_two", "second_of_two"):
        write(f"f/{name}/__init__.py", "")
    write("f/names_of_mine.py", METRIC.replace("from pydantic", "import first_of_two, second_of_two\nfrom pydantic"))
    with runtime_environment(load(["f/names_of_mine.py"])) as environment:
        assert [module.name for module in environment.modules] == [
            "first_of_two", "names_of_mine.py", "second_of_two"]
        addresses = {packaging.get_uri_for_directory(str(folder), include_gitignore=True)
                     for folder in environment.modules if folder.is_dir()}
    assert len(addresses) == 2


def test_settings_load_the_plugins_first(tmp_path):
    path = write("settings_of_mine.py", METRIC)
    found = load_settings("demo", [f"plugins=[{path}]"], CONFIGS)
    assert found.plugins == [path] and "toy_of_mine" in map_metric.names()
    assert load_settings("demo", [f"plugins=[{path}]"], CONFIGS, ExplainSettings).plugins == [path]
    with pytest.raises(PluginError, match="no such file"):
        load_settings("demo", ["plugins=[none.py]", "training.epochs=wrong"], CONFIGS)
    with pytest.raises(ValueError, match="plugins"):
        load_settings("demo", ["plugins=7"], CONFIGS)


def test_the_key_of_a_job_does_not_depend_on_the_files_place():
    from impactx.run.job import job_key

    write("a/place_of_mine.py", METRIC)
    plain = load_settings("demo", [], CONFIGS)
    assert job_key(plain) == job_key(load_settings("demo", ["plugins=[a/place_of_mine.py]"], CONFIGS))


@pytest.mark.parametrize("job", ["full_grid", "explain"])
def test_help_describes_the_plugins_of_the_command_line(job):
    path = write("help_of_mine.py", METRIC)
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"]
    done = subprocess.run([*command, f"plugins=[{path}]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "metric of maps toy_of_mine" in done.stdout and "metric, factor" in done.stdout
    done = subprocess.run([*command, "plugins=[none.py]"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: plugins: 'none.py': no such file")
    assert json.dumps(done.stderr).count("\\n") == 1
