"""The benchmarks' own arithmetic, a tiny run of them, and their report. No timing is asserted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_cam_erase  # noqa: E402
import harness  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import schema  # noqa: E402

CPU = torch.device("cpu")
ROW = {"id": "toy", "N": 3, "C": 4, "HW": [5, 6], "L": 7, "image": [11, 12], "threshold": 0.7}


def test_floor_is_the_longer_of_bytes_and_flops():
    assert measure.floor(measure.Cost(100, 10), bandwidth=50, flop_rate=10) == measure.Floor(2.0, "bytes")
    assert measure.floor(measure.Cost(100, 50), bandwidth=50, flop_rate=10) == measure.Floor(5.0, "flops")
    assert measure.Cost(1, 2) + measure.Cost(3, 4) == measure.Cost(4, 6)


def test_peak_of_a_running_sum():
    assert measure.peak_of([]) == 0
    assert measure.peak_of([-5, 3]) == 0
    assert measure.peak_of([4, 8, -8, 2, -6]) == 12


def test_input_sets_exceed_the_cache():
    for set_bytes in (1, 7, 10, 35, 1000):
        sets = measure.input_sets(set_bytes, cache_bytes=35)
        assert sets >= 2
        assert (sets - 1) * set_bytes > 35


def test_images_that_fit():
    assert measure.images_that_fit(256, bytes_per_image=10, memory=10**9) == 256
    assert measure.images_that_fit(256, bytes_per_image=10, memory=2 * 16 * 10 * 100) == 64
    assert measure.images_that_fit(256, bytes_per_image=10, memory=0) == 1


def test_peak_memory_of_a_known_call():
    size = 1 << 20

    def call() -> torch.Tensor:
        kept = torch.empty(size, dtype=torch.uint8)
        torch.empty(2 * size, dtype=torch.uint8)
        torch.empty(size, dtype=torch.uint8)
        return kept

    events = measure.trace(call, CPU)
    assert measure.peak_extra_bytes(call, CPU, events) == 3 * size
    assert measure.launches(events, CPU) == 3


def test_times_of_turns():
    assert harness.turns_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3) == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]


@pytest.mark.parametrize("variant", ["hard", "soft"])
def test_cost_of_cam_erase_counts_its_tensors(variant):
    inputs = bench_cam_erase.make(ROW, variant, torch.float32, torch.Generator().manual_seed(0))
    features, weight, target, images = inputs.args
    maps = 4 * 3 * 5 * 6
    rows = 4 * 3 * 4  # the three classes asked for, of seven
    read = measure.tensor_bytes([features, target, images]) + rows
    forward = bench_cam_erase.cost(ROW, variant, torch.float32, "forward")
    assert forward == measure.Cost(read + measure.tensor_bytes([images]) + maps, 2 * 3 * 5 * 6 * 4)
    read = measure.tensor_bytes([features, target, *inputs.grads]) + rows + maps
    if variant == "soft":
        read += measure.tensor_bytes([images])
    written = measure.tensor_bytes([features, weight, images])
    backward = bench_cam_erase.cost(ROW, variant, torch.float32, "backward")
    assert backward == measure.Cost(read + written, 3 * 3 * 5 * 6 * 4)


@pytest.mark.parametrize("variant", ["hard", "soft"])
@pytest.mark.parametrize("index", range(5))
def test_a_wrong_result_is_refused(variant, index):
    inputs = bench_cam_erase.make(ROW, variant, torch.float32, torch.Generator().manual_seed(0))
    eager = harness.Provider("eager", bench_cam_erase.OP.reference)
    found = tuple(each.detach() for each in eager(inputs, "forward+backward"))
    truth = tuple(each.detach() for each in eager(inputs.double(), "forward+backward"))
    bench_cam_erase.check(inputs, found, found, truth)
    wrong = list(found)
    wrong[index] = wrong[index] + 1e-3
    with pytest.raises(AssertionError):
        bench_cam_erase.check(inputs, tuple(wrong), found, truth)


def run_toy(folder: Path) -> Path:
    command = [sys.executable, "-m", "pytest", "-q", str(BENCHMARKS / "bench_cam_erase.py")]
    command += ["--rows", "smoke", "--max-images", "2", "--seconds", "0", "--providers", "eager,camkernels"]
    # A worker of xdist names itself in the environment, where pytest-benchmark would take this run for one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run([*command, "--results", str(folder)], check=True, cwd=BENCHMARKS.parent, env=alone)
    (path,) = folder.glob("*.json")
    return path


def test_a_tiny_run_gives_rows_that_the_report_reads(tmp_path):
    content = json.loads(run_toy(tmp_path / "results").read_text())
    rows = content["runs"]["fused_cam_erase"]["rows"]
    fields = {field.name for field in dataclasses.fields(schema.Row)}
    assert all(set(row) == fields for row in rows)
    assert {(row["variant"], row["direction"], row["provider"]) for row in rows} == {
        (variant, direction, provider)
        for variant in ("hard", "soft")
        for direction in harness.DIRECTIONS
        for provider in ("eager", "camkernels")
    }
    for row in rows:
        assert row["shape"]["N"] == 2
        assert row["full_images"] == 32
        assert row["peak_extra_bytes"] >= row["result_bytes"] > 0
    page = write_report(tmp_path)
    assert all(f"| {row['id']} | 2 (of 32) | {row['variant']} | {row['direction']} |" in page for row in rows)


def synthetic_row(provider: str, **changes: object) -> dict[str, object]:
    row = schema.Row(
        id="toy",
        variant="hard",
        direction="forward",
        dtype="float32",
        shape={"N": 8},
        full_images=8,
        provider=provider,
        backend="torch",
        seconds=0.002,
        seconds_low=0.0019,
        seconds_high=0.0021,
        rounds=9,
        peak_extra_bytes=100,
        result_bytes=100,
        launches=1,
        host_seconds=1e-5,
        floor_bytes=1000,
        floor_flops=10,
        floor_seconds=0.001,
        floor_bound="bytes",
        copy_bytes_per_second=1e6,
    )
    return {**dataclasses.asdict(row), **changes}


def judged(device: str = "cpu", **changes: object) -> dict[str, bool]:
    others = [synthetic_row(name, seconds=0.004) for name in ("eager", "compile")]
    measured = report.measurements("op", device, [*others, synthetic_row("camkernels", **changes)])
    return {verdict.target: verdict.met for verdict in report.judge(measured)}


def test_targets_are_judged_from_the_numbers():
    everything = dict.fromkeys(("near the floor", "faster", "geometric mean", "memory"), True)
    assert judged(seconds=0.0013) == everything
    assert judged(seconds=0.0014) == {**everything, "near the floor": False}
    assert judged(seconds=0.003) == {**everything, "near the floor": False, "geometric mean": False}
    assert judged(seconds=0.001, peak_extra_bytes=106) == {**everything, "memory": False}
    no_floor = {target: met for target, met in everything.items() if target != "near the floor"}
    assert judged(seconds=0.002, floor_bound="flops") == no_floor
    assert judged("cuda", seconds=0.0012) == {**everything, "host time": False}
    assert judged("cuda", seconds=0.0013, host_seconds=9e-6) == {
        **everything,
        "near the floor": False,
        "host time": True,
    }


def test_on_a_gpu_max_autotune_is_the_one_to_beat():
    rows = [synthetic_row("eager"), synthetic_row("compile-max-autotune", seconds=0.001)]
    measured = report.measurements("op", "cuda", [*rows, synthetic_row("camkernels", seconds=0.0011)])
    verdicts = {verdict.target: verdict for verdict in report.judge(measured)}
    assert not verdicts["faster"].met
    assert verdicts["faster"].measured == "0.91 x faster than compile-max-autotune"


def write_report(folder: Path, notes: str = "") -> str:
    readme, causes = folder / "README.md", folder / "notes.toml"
    if not readme.exists():
        readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    causes.write_text(notes)
    report.write(folder / "results", readme, causes)
    return readme.read_text()


def test_report_of_a_synthetic_file(tmp_path):
    machine = {
        "torch": "2", "triton": None, "python": "3", "threads": 2, "last_level_cache_bytes": 1 << 25,
        "camkernels": "0", "commit": "abc", "date": "2026-01-01", "matrix_flops_per_second": 1e12,
    }  # fmt: skip
    rows = [synthetic_row("eager", seconds=0.004), synthetic_row("camkernels")]
    run = {"machine": machine, "rows": rows}
    content = {"schema": 1, "device": "cpu", "name": "A CPU", "runs": {"op": run}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu-a.json").write_text(json.dumps(content))
    notes = '[cpu-a]\n"op/toy" = "a cause"\n"near the floor: op/toy/hard" = "a better cause"\n'
    page = write_report(tmp_path, notes)
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| A CPU | `op` | **missed**: 0 of 1 | met: 1 of 1 | met: 2.00 x faster |" in page
    assert "| A CPU | `op/toy/hard/forward` | near the floor | 2.00 x floor | a better cause |" in page
    picture = (tmp_path / "results" / "cpu-a-op.png").read_bytes()
    assert write_report(tmp_path, notes) == page
    assert (tmp_path / "results" / "cpu-a-op.png").read_bytes() == picture


def test_report_without_results_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    assert "No results have been written yet." in write_report(tmp_path)


def test_every_workload_has_an_id_of_its_own():
    for op, rows in json.loads(harness.WORKLOADS.read_text()).items():
        if op != "comment":
            assert len({row["id"] for row in rows}) == len(rows) > 0


def test_results_of_one_op_leave_the_others(tmp_path):
    row = schema.Row(**synthetic_row("camkernels"))  # type: ignore[arg-type]
    path = results.save(tmp_path, CPU, "one", {}, [row])
    assert results.save(tmp_path, CPU, "two", {}, [row, row]) == path
    runs = schema.load(path)["runs"]
    assert [len(runs[op]["rows"]) for op in ("one", "two")] == [1, 2]


def test_machine_information_names_no_path():
    assert "/" not in json.dumps(results.machine(CPU))
