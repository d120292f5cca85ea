"""The fingerprint of code: which edits change it, for whom, and which do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from impactx.code import CodeFingerprint, code_fingerprint, explain_difference, imported_files

PACKAGE = Path(__file__).resolve().parents[2] / "platform" / "impactx"

TOY = {
    "mine/__init__.py": '''
        """Hands on names of its modules."""
        from mine.decoder import Decoder, rows as height
        from mine.loss import mse
        __all__ = ["Decoder", "height", "mse"]
        __version__ = "1"
    ''',
    "mine/loss.py": '''
        """Losses."""
        from __future__ import annotations
        import logging
        import numpy as np
        from typing import TYPE_CHECKING
        from mine.scale import FACTOR
        if TYPE_CHECKING:
            from mine.decoder import Decoder
        log = logging.getLogger("mine")

        def mse(a: np.ndarray, b: np.ndarray, weight: float = 1.0) -> float:
            """The mean squared error."""
            if a.shape != b.shape:
                raise ValueError(f"shapes {a.shape} and {b.shape} differ")
            assert weight > 0, "a weight is positive"
            log.info("loss of %d values", len(a))
            # one sum, as in the paper
            total: float = ((a - b) ** 2).sum()
            return weight * FACTOR * total

        def other(decoder: Decoder) -> int:
            return 2
    ''',
    "mine/scale.py": "FACTOR = 0.5\n",
    "mine/decoder.py": '''
        from .kernel import add
        def rows(n): return add(n, 1)
        class Decoder:
            size: int = 8
            def forward(self, x):
                from mine import late
                return late.twice(x) * self.size
    ''',
    "mine/kernel.py": '''
        from numba import njit
        @njit(cache=True)
        def add(a, b):
            return a + b
    ''',
    "mine/late.py": "def twice(x): return 2 * x\n",
    "mine/trainer.py": '''
        from mine import mse as loss
        import mine.effects
        def train(a, b): return loss(a, b)
    ''',
    "mine/effects.py": "import sys\nsys.setrecursionlimit(3000)\n",
    "mine/handing.py": '''
        import mine as package
        def take(): return package.height(3)
        def give(f): return f(package)
    ''',
}
ROOTS = ("mine.trainer", "mine.loss", "mine.decoder", "mine.handing")
LOSS_USERS = {"mine.trainer", "mine.loss", "mine.handing"}  # the last hands the whole package on
DECODER_USERS = {"mine.decoder", "mine.handing"}


def dedent(text: str) -> str:
    import textwrap

    return textwrap.dedent(text).lstrip("\n")


@pytest.fixture
def toy(tmp_path) -> Path:
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(dedent(text))
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf8")
    assert old in text, f"{file.name} does not hold {old!r}: the test's edit would do nothing"
    file.write_text(text.replace(old, new), encoding="utf8")


def digests(folder: Path, roots=ROOTS) -> dict[str, str]:
    return {root: code_fingerprint([root], [str(folder)]).digest for root in roots}


@pytest.mark.parametrize(("file", "old", "new", "changed"), [
    ("loss", "** 2", "** 4", LOSS_USERS),
    ("loss", "a - b", "a + b", LOSS_USERS),
    ("loss", "weight: float = 1.0", "weight: float = 2.0", LOSS_USERS),
    ("loss", "1.0", "1", LOSS_USERS),
    ("loss", "return 2", "return 3", LOSS_USERS),
    ("loss", "ValueError(", "TypeError(", LOSS_USERS),
    ("loss", "weight > 0", "weight >= 0", LOSS_USERS),
    ("loss", "import numpy as np", "import jax.numpy as np\nzeros = np.zeros", LOSS_USERS),
    ("loss", 'log.info("loss of %d values", len(a))', 'log.info("loss of %d values", shuffle(a))',
     LOSS_USERS),
    ("scale", "0.5", "0.25", LOSS_USERS),
    ("kernel", "a + b", "a - b", DECODER_USERS),
    ("kernel", "cache=True", "cache=True, fastmath=True", DECODER_USERS),
    ("kernel", "from numba import njit", "from mine.scale import FACTOR as njit", DECODER_USERS),
    ("late", "2 * x", "3 * x", DECODER_USERS),
    ("decoder", "size: int = 8", "size: float = 8", DECODER_USERS),
    ("decoder", "size: int = 8", "size: int = 9", DECODER_USERS),
    ("effects", "3000", "4000", {"mine.trainer"}),
    ("trainer", "from mine import mse as loss", "from mine.loss import other as loss",
     {"mine.trainer"}),
    ("trainer", "from mine import mse as loss", "from mine import Decoder as loss",
     {"mine.trainer"}),
    ("__init__", "from mine.loss import mse", "from mine.loss import other as mse",
     {"mine.trainer", "mine.handing"}),
    ("__init__", '__version__ = "1"', "import sys\nsys.x = 1", set(ROOTS)),
    ("__init__", '__version__ = "1"', "import mine.effects", set(ROOTS)),
    ("loss", '"""Losses."""', '"""The losses."""', set()),
    ("loss", '"""The mean squared error."""', "pass", set()),
    ("loss", "# one sum, as in the paper", "", set()),
    ("loss", "f\"shapes {a.shape} and {b.shape} differ\"", '"other %s" % str(a.shape)', set()),
    ("loss", '"a weight is positive"', '"above 0"', set()),
    ("loss", '"loss of %d values", len(a)', 'f"{len(a)} values"', set()),
    ("loss", 'log.info("loss of %d values", len(a))', "import warnings; warnings.warn('here')",
     set()),
    ("loss", "from mine.decoder import Decoder", "from mine.trainer import train", set()),
    ("loss", "decoder: Decoder) -> int", "decoder: object) -> float", set()),
    ("loss", "total: float = ", "total = ", set()),
    ("loss", "((a - b) ** 2).sum()", "(\n    (a - b)  **2\n    ).sum()", set()),
    ("__init__", '__version__ = "1"', '__version__ = "2"', set()),
    ("__init__", "from mine.loss import mse", "from mine.loss import mse, other",
     {"mine.handing"}),
    ("__init__", '"Decoder", "height", "mse"', '"mse"', set()),
    ("trainer", "from mine import mse as loss", "from mine.loss import mse as loss", set()),
    ("decoder", "from .kernel import add", "from mine.kernel import add", set()),
    ("kernel", "from numba import njit", "from numba import njit, prange", set()),
])
def test_an_edit_changes_those_who_reach_it_and_no_others(toy, file, old, new, changed):
    before = digests(toy)
    edit(toy / "mine" / f"{file}.py", old, new)
    after = digests(toy)
    assert {root for root in ROOTS if before[root] != after[root]} == changed


def test_a_package_hands_a_name_on_without_its_other_modules(toy):
    modules = {root: set(code_fingerprint([root], [str(toy)]).modules) for root in ROOTS}
    assert modules["mine.trainer"] == {"mine.trainer", "mine.effects", "mine.loss", "mine.scale"}
    assert modules["mine.decoder"] == {"mine.decoder", "mine.kernel", "mine.late"}
    assert modules["mine.loss"] == {"mine.loss", "mine.scale"}


def test_a_moved_module_changes_nothing(toy):
    before = digests(toy)
    old = code_fingerprint(["mine.trainer"], [str(toy)])
    inner = toy / "mine" / "losses"
    inner.mkdir()
    (inner / "__init__.py").write_text('"""Losses, each in a file."""\n')
    (toy / "mine" / "loss.py").rename(inner / "squares.py")
    edit(toy / "mine" / "__init__.py", "mine.loss ", "mine.losses.squares ")
    assert digests(toy, ("mine.trainer", "mine.handing", "mine.losses.squares")) == {
        "mine.trainer": before["mine.trainer"], "mine.handing": before["mine.handing"],
        "mine.losses.squares": before["mine.loss"]}
    new = code_fingerprint(["mine.trainer"], [str(toy)])
    assert "mine.losses.squares" in new.modules and explain_difference(old, new) == ""


@pytest.mark.parametrize(("first", "second", "same"), [
    ("def f(x: int): return x", "def f(x: str): return x", True),
    ("@validate\ndef f(x: int): return x", "@validate\ndef f(x: str): return x", False),
    ("@property\ndef f(x) -> int: return x", "@property\ndef f(x) -> str: return x", True),
    ("x: int = 1", "x = 1", True),
    ("class A:\n x: int", "class A:\n x: str", False),
    ("class A:\n def f(self):\n  x: int = 1", "class A:\n def f(self):\n  x: str = 1", True),
    ("class A:\n x: int = Field(1, description='a', ge=0)",
     "class A:\n x: int = Field(1, description='b', ge=0)", True),
    ("class A:\n x: int = Field(1, ge=0)", "class A:\n x: int = Field(1, ge=1)", False),
    ("raise Stop('a')", "raise Stop('b' + str(c))", True),
    ("raise Stop(value)", "raise Stop(other)", False),
    ("x = 'a'", "x = b'a'", False),
    ("x = True", "x = 1", False),
    ("f(a, b)", "f(a)(b)", False),
    ("f(a, [b])", "f(a, b)", False),
    ("f('a', 'b')", "f('a;b')", False),
    ("if a:\n b()\nc()", "if a:\n b()\n c()", False),
    ("try:\n import fast\nexcept ImportError:\n fast = None\nfast.f()",
     "try:\n import slow as fast\nexcept ImportError:\n fast = None\nfast.f()", False),
    ("import a\nimport b\na.f(); b.f()", "import b\nimport a\na.f(); b.f()", True),
    ("import a.b\na.b.f()", "import a.b\na.b.g()", False),
    ("if TYPE_CHECKING:\n x = 1\nelse:\n x = 2", "if TYPE_CHECKING:\n x = 3\nelse:\n x = 2", True),
    ("if TYPE_CHECKING:\n x = 1\nelse:\n x = 2", "if TYPE_CHECKING:\n x = 1\nelse:\n x = 3", False),
    ("log.info('a')", "log.info('b %s', c)", True),
    ("log.info('a')\nf()", "f()", True),
    ("log.info('a %d', draw())", "log.info('a')", False),
    ("print('a')", "print('a', len(x), ', '.join(y))", True),
    ("x.info('a')", "x.info('b')", False),
    ("def f():\n 'a'\n 'b'\n ...", "def f(): pass", True),
    ("x = (1 +\n  2)  # three", "x = 1 + 2", True),
    ("x = f'{a:.3f}'", "x = f'{a:.4f}'", False),
    ("lambda a, /, b, *, c=1: a", "lambda a, b, *, c=1: a", False),
])
def test_what_of_a_module_counts(tmp_path, first, second, same):
    for name, text in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy_module.py").write_text(text + "\n")
        compile(text, name, "exec")
    one, two = (code_fingerprint(["toy_module"], [str(tmp_path / name)]).digest for name in "ab")
    assert (one == two) == same


def test_what_cannot_be_parsed_counts_by_its_bytes(tmp_path):
    from importlib.machinery import EXTENSION_SUFFIXES

    (tmp_path / "root.py").write_text("import compiled, broken\ncompiled.f(broken)\n")
    compiled, broken = tmp_path / f"compiled{EXTENSION_SUFFIXES[0]}", tmp_path / "broken.py"
    seen = set()
    for number, (content, text) in enumerate([(b"\0a", "x = ("), (b"\0b", "x = ("), (b"\0a", "y = (")], 1):
        compiled.write_bytes(content)
        broken.write_text(text)
        seen.add(code_fingerprint(["root"], [str(tmp_path)]).digest)
        assert len(seen) == number
    assert set(code_fingerprint(["root"], [str(tmp_path)]).modules) == {"root", "compiled", "broken"}


def test_an_expression_that_is_nested_too_deep_counts_by_its_bytes(tmp_path):
    (tmp_path / "deep.py").write_text("x = " + " + ".join(["1"] * 900))
    assert set(code_fingerprint(["deep"], [str(tmp_path)]).modules) == {"deep"}


def test_circles_packages_without_init_and_names_that_do_not_exist(tmp_path):
    (tmp_path / "space" / "deep").mkdir(parents=True)
    (tmp_path / "space" / "deep" / "one.py").write_text(
        "from space.deep.two import g\nfrom .nowhere import h\nfrom .... import k\ndef f(): return g() + h + k\n")
    (tmp_path / "space" / "deep" / "two.py").write_text(
        "from space.deep import one\nfrom space.deep.two import g as same\ndef g(): return one.f(same)\n")
    found = code_fingerprint(["space.deep.one"], [str(tmp_path)])
    assert set(found.modules) == {"space.deep.one", "space.deep.two"}
    with pytest.raises(ModuleNotFoundError, match="space.deep.three"):
        code_fingerprint(["space.deep.three"], [str(tmp_path)])
    assert set(imported_files(["space.deep.one"], [str(tmp_path)])) == {"space.deep.one", "space.deep.two"}


def test_libraries_do_not_count_unless_they_are_a_root(tmp_path):
    site = tmp_path / "site-packages"
    (site / "library").mkdir(parents=True)
    (site / "library" / "__init__.py").write_text("from library.inner import f\n")
    (site / "library" / "inner.py").write_text("import json\ndef f(): return json\n")
    (tmp_path / "user.py").write_text("import library, json\nlibrary.f(json)\n")
    path = [str(tmp_path), str(site)]
    assert set(code_fingerprint(["user"], path).modules) == {"user"}
    (tmp_path / "user.py").write_text("from library import f\nf()\n")
    assert set(code_fingerprint(["user", "library.inner"], path).modules) == {"user", "library.inner"}


def test_files_that_an_import_needs(toy):
    files = imported_files(["mine.decoder"], [str(toy)])
    assert {name: file.relative_to(toy).as_posix() for name, file in files.items()} == {
        "mine": "mine/__init__.py", "mine.decoder": "mine/decoder.py", "mine.kernel": "mine/kernel.py",
        "mine.late": "mine/late.py", "mine.loss": "mine/loss.py", "mine.scale": "mine/scale.py"}


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("a1 b2 c3", "a1 b2 c3", "the code differs: the same modules import other names"),
    ("a1 b2 c3 moved4", "a9 b2 d5 elsewhere4",
     "the code differs: a changed, d is new, c is no longer used"),
    ("a1 b1 c1 d1 e1 f1", "a2 b2 c2 d2 e2 f2", "the code differs: a, b, c, d and 2 more changed"),
    ("", "a1 b2", "the code differs: a and b are new"),
])
def test_the_reason_is_one_sentence(old, new, sentence):
    one, two = (CodeFingerprint(text + digest, {part[:-1]: part[-1] for part in text.split()})
                for text, digest in ((old, "1"), (new, "2")))
    assert explain_difference(one, two) == sentence
    assert explain_difference(one, one) == ""


def test_the_reason_names_the_module_that_was_edited(toy):
    before = code_fingerprint(["mine.trainer"], [str(toy)])
    edit(toy / "mine" / "scale.py", "0.5", "0.25")
    after = code_fingerprint(["mine.trainer"], [str(toy)])
    assert explain_difference(before, after) == "the code differs: mine.scale changed"
    edit(toy / "mine" / "trainer.py", "import mse as loss", "import Decoder as loss")
    assert explain_difference(after, code_fingerprint(["mine.trainer"], [str(toy)])) == (
        "the code differs: mine.trainer changed, mine.decoder, mine.kernel and mine.late are new, "
        "mine.loss and mine.scale are no longer used")


# The real package, on a copy of it.

@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder / "impactx", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def package(original, tmp_path) -> Path:
    shutil.copytree(original / "impactx", tmp_path / "impactx")
    return tmp_path


def file_with(folder: Path, text: str) -> Path:
    """The one file of the package that holds a definition, wherever it has been moved to."""
    found = [file for file in sorted((folder / "impactx").rglob("*.py"))
             if f"\n{text}" in file.read_text(encoding="utf8")]
    assert len(found) == 1, (text, found)
    return found[0]


def module_with(folder: Path, text: str) -> str:
    parts = file_with(folder, text).relative_to(folder).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


# What a step's function would import, by a definition in it.
A, MAPS, STAGE_2, MORF, LOSS = (
    "class Classifier(", "def partition_shap(", "class ImpactxNetwork(",
    "def most_relevant_first(", "def impactx_loss(")
STEPS = (A, MAPS, STAGE_2, MORF, LOSS)


def real(folder: Path) -> dict[str, str]:
    return {step: code_fingerprint([module_with(folder, step)], [str(folder)]).digest for step in STEPS}


@pytest.mark.parametrize(("within", "old", "new", "changed"), [
    ("class Decoder(", "nn.ReLU()", "nn.GELU()", {STAGE_2, LOSS}),
    ("class LeNet5Trunk(", "84", "85", {A, STAGE_2, LOSS}),
    ("def impactx_loss(", "weight * mse", "weight / mse", {STAGE_2, LOSS}),
    ("def _copy_boxes(", "= image[z, r, c]", "= -image[z, r, c]", {MAPS}),  # compiled by Numba
    ("def most_relevant_first(", "stable", "quicksort", {MORF}),
    ("class Batch:", "class Batch:", "SIZE = 3\n\n\nclass Batch:", {STAGE_2, LOSS}),
    ("class Decoder(", "\nclass Decoder", "\n# a comment\nclass Decoder", set()),
    ("def impactx_loss(", "stage 2 needs a map for every image", "no maps", set()),
    ("def write_report(", "def write_report(", "NEW = 1\ndef write_report(", set()),
    ("def expand_range(", "def expand_range(", "NEW = 1\ndef expand_range(", set()),
    ("class RayExecutor", "class RayExecutor", "NEW = 1\nclass RayExecutor", set()),
    ("def package_versions(", "def machine(", "NEW = 1\ndef machine(", set()),
    ("__version__", '__version__ = "', '__version__ = "9.', set()),
])
def test_edits_of_the_package(package, within, old, new, changed):
    before = real(package)
    edit(file_with(package, within), old, new)
    after = real(package)
    assert {step for step in STEPS if before[step] != after[step]} == changed


def test_a_module_of_the_package_moves(package):
    before, file, module = real(package), file_with(package, "class Decoder("), module_with(package, "class Decoder(")
    (package / "impactx" / "parts").mkdir()
    (package / "impactx" / "parts" / "__init__.py").write_text("")
    file.rename(package / "impactx" / "parts" / "drawing.py")
    for other in (package / "impactx").rglob("*.py"):
        text = other.read_text(encoding="utf8")
        other.write_text(text.replace(module, "impactx.parts.drawing"), encoding="utf8")
    assert real(package) == before
    assert "impactx.parts.drawing" in code_fingerprint(
        [module_with(package, STAGE_2)], [str(package)]).modules


def test_a_uses_no_decoder_and_no_settings(original):
    modules = code_fingerprint([module_with(original, A)], [str(original)]).modules
    assert module_with(original, "class LeNet5Trunk(") in modules
    assert module_with(original, "class Decoder(") not in modules
    assert not [name for name in modules if name.startswith(("impactx.settings", "impactx.cluster"))]


def test_the_whole_package_is_fast_and_imports_nothing():
    program = f"""
import json, sys, time
from pathlib import Path
from impactx.code import code_fingerprint
package = Path({str(PACKAGE)!r})
roots = [".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
         for file in package.rglob("*.py")]
seconds = []
for _ in range(3):
    start = time.process_time()
    modules = code_fingerprint(roots).modules
    seconds.append(time.process_time() - start)
print(json.dumps([seconds, len(modules), [m for m in sys.modules if m.partition(".")[0] in (
    "torch", "numpy", "pydantic", "impactx")]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"})
    seconds, count, loaded = json.loads(done.stdout)
    assert count > 50 and sorted(loaded) == ["impactx", "impactx.code", "impactx.code.imports", "impactx.code.syntax"]
    assert seconds[0] < 2 and min(seconds[1:]) < seconds[0] / 2, seconds


def test_an_edit_is_seen_by_a_process_that_read_the_file_before(toy):
    path = [str(toy)]
    before = code_fingerprint(["mine.scale"], path).digest
    for text in ("FACTOR = 0.6\n", "FACTOR = 0.7\n", "FACTOR = 0.5\n"):
        time.sleep(0.01)  # a file system's clock ticks
        (toy / "mine" / "scale.py").write_text(text)
        assert (code_fingerprint(["mine.scale"], path).digest == before) == ("0.5" in text)
