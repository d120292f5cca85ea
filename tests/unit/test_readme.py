"""The README shows what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from impactx.explain.attribution import Explanations
from impactx.explain.maps.store import MapStore, StoreSpec
from impactx.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


def test_the_library_example_is_the_file_that_is_run() -> None:
    code = (ROOT / "docs/example.py").read_text()
    code = code[code.index("import impactx\n"):].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()


def test_the_pages_on_extensions_and_rooms_show_and_name_files_that_are_there() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    plugins = sorted((ROOT / "tests/extensions").glob("toy_*.py"))
    assert len(plugins) == 4
    assert not [file.name for file in plugins if f"```python\n{file.read_text().strip()}\n```" not in page]
    architecture = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)`", architecture))
    folders = [ROOT, ROOT / "platform/impactx", ROOT / "platform/impactx/experiment"]
    assert len(named) > 30
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", text)) | set(re.findall(r"python (jobs/\w+\.py)", text))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_make_target_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_maps_are_read_as_the_readme_says(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.search(r"Maps are plain Parquet:\n```python\n(.*?)```", text, re.DOTALL).group(1)  # type: ignore[union-attr]
    every = np.random.default_rng(0).normal(size=(5, 3, 4, 6)).astype(np.float32)
    store = MapStore.create(Storage(tmp_path / "results"), "maps/a", StoreSpec("a" * 32, 5, (3, 4, 6), 2, {}))
    for shard in range(3):
        rows = store.shard_indices(shard)
        store.write_shard(shard, rows % 3, Explanations(every[rows], rows * 1.0, rows * 0.0))
    store.storage.write_json("maps/a/result.json", {"images": 5})  # as a job leaves it
    names: dict = {}
    exec(code.replace("results/maps/<key>", f"{tmp_path}/results/maps/a"), names)
    np.testing.assert_array_equal(names["maps"], every[names["table"]["index"].to_numpy()])
