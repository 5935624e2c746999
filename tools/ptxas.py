"""Reads what ``nvcc -Xptxas -v`` prints about each kernel."""

import re
import shutil
import subprocess

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def demangle(names: list[str]) -> list[str]:
    """Readable names; the mangled ones where c++filt is not installed."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    result = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def parse(text: str) -> list[dict[str, str | int]]:
    """A row per kernel and architecture: kernel, arch, registers, stack, spill_stores, spill_loads, shared.

    ``stack``, spills and ``shared`` (static shared memory) are in bytes.
    """
    rows: list[dict[str, str | int]] = []
    row: dict[str, str | int] | None = None
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            row = {"kernel": found[1], "arch": found[2], "registers": 0}
            row |= {"stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}
            rows.append(row)
        elif row is None:
            continue
        elif found := _FRAME.search(line):
            row |= {"stack": int(found[1]), "spill_stores": int(found[2]), "spill_loads": int(found[3])}
        elif found := _REGISTERS.search(line):
            row["registers"] = int(found[1])
            shared = _SHARED.search(line)
            row["shared"] = int(shared[1]) if shared else 0
            row = None
    for row, name in zip(rows, demangle([str(row["kernel"]) for row in rows]), strict=True):
        row["kernel"] = name
    return rows
