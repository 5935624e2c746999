"""Options of the benchmarks, and the case that each of them measures."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import measure
import pytest
import results
import schema
import torch

RESULTS = pytest.StashKey[dict[str, list[schema.Row]]]()
PROVIDERS = (
    "eager",
    "compile",
    "compile-max-autotune",
    "camkernels",
    "gathered",
    "released",
    "exact",
    "skimage",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("camkernels benchmarks")
    group.addoption(
        "--rows",
        choices=("smoke", "all", "tiny"),
        default="smoke",
        help="which rows of workloads.json; tiny: tensors so small that only the calls take time",
    )
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the features"
    )
    group.addoption("--providers", default=",".join(PROVIDERS), help="comma-separated; default: all")
    group.addoption(
        "--seconds", type=float, default=None, help="of timed rounds, per row, variant and direction"
    )
    group.addoption("--max-images", type=int, default=None, help="run no row with a larger batch")
    group.addoption(
        "--results", type=Path, default=None, help="folder for <device>.json; default: not written"
    )
    group.addoption(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="on the CPU, keep freed memory in the process (as jemalloc or tcmalloc do) or give it back",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        op = metafunc.module.OP
        selection = metafunc.config.getoption("rows")
        rows = harness.workload_rows(op.name, "all" if selection == "tiny" else selection)
        pairs = [(op, row, variant) for row in rows for variant in op.variants(row)]
        if selection == "tiny":
            pairs = [(op, op.tiny(variant), variant) for variant in dict.fromkeys(v for *_, v in pairs)]
        names = [f"{row['id']}-{variant}" for _, row, variant in pairs]
        metafunc.parametrize("case", pairs, ids=names, indirect=True, scope="session")
        metafunc.parametrize("direction", op.directions)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = time.perf_counter if config.getoption("device") == "cpu" else measure.DeviceInstant
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer, disable_gc=True))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> harness.Session:
    option = request.config.getoption
    device = torch.device(option("device"), 0) if option("device") == "cuda" else torch.device("cpu")
    freed = measure.FreedMemory(keep=device.type == "cpu" and option("allocator") == "keep")
    default_seconds = 2.5 if device.type == "cpu" else 0.5
    session = harness.Session(
        device=device,
        dtype=getattr(torch, option("dtype")),
        wanted=set(option("providers").split(",")),
        seconds=default_seconds if option("seconds") is None else option("seconds"),
        max_images=option("max_images"),
        freed=freed,
    )
    request.config.stash[RESULTS] = session.results
    return session


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, session: harness.Session) -> Iterator[harness.Case]:
    op, row, variant = request.param
    case = harness.Case(session, op, row, variant)
    yield case
    case.release()
    save(request.config, session, op.name)  # now, for a run may be cut off


def save(config: pytest.Config, session: harness.Session, op: str) -> None:
    folder, rows = config.getoption("results"), session.results.get(op)
    if folder is None or not rows:
        return
    information = {
        **results.machine(session.device),
        "last_level_cache_bytes": measure.last_level_cache(session.device),
        "matrix_flops_per_second": session.matrix_rate,
        "freed_memory_kept": session.freed.kept,
    }
    suffix = "" if session.dtype == torch.float32 else f"-{config.getoption('dtype')}"
    if config.getoption("rows") == "tiny":
        suffix += schema.TINY
    results.save(folder, session.device, op + suffix, information, rows)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for op, rows in config.stash.get(RESULTS, {}).items():
        terminalreporter.section(op)
        for row in rows:
            allowed = (row.result_bytes + row.kept_bytes) / 2**20
            peak = "-" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 2**20:.1f}"
            terminalreporter.write_line(
                f"{row.id:17} {row.variant:13} {row.direction:17} {row.provider:21} {row.backend:10} "
                f"N {row.shape['N']:4} {row.seconds * 1e3:9.3f} ms "
                f"{row.seconds / row.floor_seconds:6.2f} x floor "
                f"peak {peak:>8} of {allowed:.1f} MiB  launches {row.launches or '-':>4} "
                f"host {row.host_seconds * 1e6:7.1f} us  copy {row.copy_bytes_per_second / 1e9:.1f} GB/s"
            )
