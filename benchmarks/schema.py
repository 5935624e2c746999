"""The one schema of all results: a file per device, in it a run per op (features of another dtype than
float32: ``<op>-<dtype>``; tiny tensors: ``<op>-tiny``), in it a row per measured call.

    {"schema": 1, "device": "cpu" | "cuda", "name": "AMD EPYC",
     "runs": {"fused_cam_erase": {"machine": {...}, "rows": [{...}, ...]}}}

A row has the keys of ``Row``. What follows from a row (ratio to the floor, speed-up) is not stored but
computed by ``report.py``.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
TINY = "-tiny"


@dataclass(frozen=True)
class Row:
    id: str  # of workloads.json
    variant: str
    direction: str  # "forward" or "forward+backward"
    dtype: str  # of the features
    shape: dict[str, Any]  # the row of workloads.json with the N that ran
    full_images: int  # the row's own N
    provider: str
    backend: str  # what answered: a backend of camkernels, or "torch"
    seconds: float
    seconds_low: float  # first and third quartile
    seconds_high: float
    rounds: int
    peak_extra_bytes: int | None  # None where it cannot be told: CUDA graphs keep their pool
    result_bytes: int  # outputs, and gradients where there are any
    launches: int | None  # device kernels, copies and fills; on the CPU dispatched operators
    host_seconds: float  # until the call returns; on the CPU of a call on tiny tensors
    floor_bytes: int
    floor_flops: int
    floor_seconds: float
    floor_bound: str  # "bytes" or "flops"
    copy_bytes_per_second: float  # measured between this row's rounds
    kept_bytes: int = 0  # what backward may keep besides inputs and outputs; not in files of camkernels 0.1.0


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: schema is {content.get('schema')!r}; this report reads {SCHEMA}")
    for run in content["runs"].values():
        run["rows"] = [asdict(Row(**row)) for row in run["rows"]]
    return content
