"""The README shows what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_library_example_is_the_file_that_is_run() -> None:
    code = (ROOT / "docs/example.py").read_text()
    code = code[code.index("import impactx\n"):].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", text)) | set(re.findall(r"python (jobs/\w+\.py)", text))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_make_target_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
