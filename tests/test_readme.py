"""What README.md shows runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PROGRAMS = re.findall(r"```python\n(import torch\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_shows_programs():
    assert len(PROGRAMS) == 5


@pytest.mark.parametrize("program", PROGRAMS, ids=["erase", "consistency", "seeds", "negatives", "attention"])
def test_program_runs(program):
    names = {}
    exec(program, names)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names.get("model", names.get("backbone")).parameters())
