"""Where a run was made, and the writing of its file."""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from schema import SCHEMA, Row, load

import camkernels


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(device: str, name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"cpu-{words}" if device == "cpu" else words


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made; no host name, no path."""
    information: dict[str, Any] = {
        "device": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "camkernels": camkernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device.type == "cuda":
        information["cuda"] = torch.version.cuda or torch.version.hip
    return information


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with ``+`` where tracked files of the package differ from it."""
    if "CAMKERNELS_COMMIT" in os.environ:  # for a copy of the tree without its history
        return os.environ["CAMKERNELS_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", "camkernels", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(
    folder: Path, device: torch.device, run: str, information: dict[str, Any], rows: Sequence[Row]
) -> Path:
    """Put a run into the device's file, in place of the one of the same name before."""
    name = device_name(device)
    path = folder / f"{slug(device.type, name)}.json"
    kept = load(path)["runs"] if path.exists() else {}
    runs = {**kept, run: {"machine": information, "rows": [asdict(row) for row in rows]}}
    content = {"schema": SCHEMA, "device": device.type, "name": name, "runs": dict(sorted(runs.items()))}
    folder.mkdir(parents=True, exist_ok=True)
    # All at once: a run that is cut off while it writes must not take the runs before it along.
    written = path.with_suffix(".part")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(path)
    return path
