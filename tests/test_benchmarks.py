"""The benchmarks' own arithmetic, a tiny run of them, and their report. No timing is asserted."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import passes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_cam  # noqa: E402
import bench_cam_erase  # noqa: E402
import bench_cam_seeds  # noqa: E402
import bench_cam_transform_mse  # noqa: E402
import bench_crop_and_zoom  # noqa: E402
import bench_focus_area  # noqa: E402
import bench_local_activations  # noqa: E402
import bench_local_level_loss  # noqa: E402
import bench_negative_cam_loss  # noqa: E402
import bench_stochastic_consistency  # noqa: E402
import harness  # noqa: E402
import maps  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import schema  # noqa: E402

from camkernels._op import OPS  # noqa: E402
from camkernels.reference import cam  # noqa: E402

CPU = torch.device("cpu")
ROW = {"id": "toy", "N": 3, "C": 4, "HW": [5, 6], "L": 7, "image": [11, 12], "threshold": 0.7}
PAIRS = [
    {"id": "toy", "N": 3, "C": 4, "HW": [5, 6], "HW_t": [4, 9], "L": 7, "transform": transform}
    for transform in ("HorizontalFlip", "Affine", "Scale")
]
SEEDS = [
    {"id": "own", "N": 3, "C": 4, "D": 5, "HW": [5, 6], "L": 7, "K": 12},
    {"id": "shared", "N": 3, "C": 4, "D": 4, "HW": [5, 6], "L": 7, "K": 12},
]
NEGATIVES = [
    {"id": "few", "N": 3, "C": 4, "HW": [5, 6], "L": 7, "k": 2},
    {"id": "all", "N": 3, "C": 4, "HW": [5, 6], "L": 7, "k": 7},
    {"id": "two positives", "N": 3, "C": 4, "HW": [5, 6], "L": 7, "k": 2, "positives": 2},
]
# Of every other benchmark.
LOCAL = {
    "id": "smoke toy",
    "N": 3,
    "C": 4,
    "HW": [5, 6],
    "L": 7,
    "n": 3,
    "bins": 16,
    "D": 2,
    "image": [8, 10],
    "size": [7, 9],
    "K": 2,
    "images_per_class": 2,
}
NEGATIVE_VARIANTS = [(row, variant) for row in NEGATIVES for variant in bench_negative_cam_loss.variants(row)]
SEED_VARIANTS = [(row, variant) for row in SEEDS for variant in bench_cam_seeds.VARIANTS]
PAIR_VARIANTS = [(row, variant) for row in PAIRS for variant in bench_cam_transform_mse.variants(row)]
BENCHES = tuple(importlib.import_module(path.stem) for path in sorted(BENCHMARKS.glob("bench_*.py")))
MAPS = (bench_cam_erase, bench_cam_seeds, bench_cam_transform_mse, bench_negative_cam_loss, bench_focus_area)
OTHERS = [
    (bench, LOCAL, variant) for bench in BENCHES if bench not in MAPS for variant in bench.OP.variants(LOCAL)
]


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
    assert measure.input_sets(1, cache_bytes=10**9) == measure.MOST_SETS


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


@pytest.mark.parametrize("row, variant", PAIR_VARIANTS)
def test_cost_of_cam_transform_mse_counts_its_tensors(row, variant):
    bench = bench_cam_transform_mse
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    read = measure.tensor_bytes([*inputs.args, *inputs.grads])  # the loss is as large as its gradient
    if variant == "affine":
        read += measure.tensor_bytes([inputs.options["transform"].matrix])
    product = 2 * 3 * 7 * 4 * (5 * 6 + 4 * 9 if row["transform"] == "Scale" else 5 * 6)
    assert bench.cost(row, variant, torch.float32, "forward") == measure.Cost(read, product)
    written = measure.tensor_bytes(inputs.args)
    assert bench.cost(row, variant, torch.float32, "backward") == measure.Cost(read + written, 2 * product)


@pytest.mark.parametrize("row, variant", SEED_VARIANTS)
def test_cost_of_cam_seeds_counts_its_tensors(row, variant):
    bench = bench_cam_seeds
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    features, weight, target, *seed_features = inputs.args
    outputs = bench.OP.reference(*inputs.args, **inputs.options)
    vectors, indices, _, cam = outputs
    noise = [] if inputs.options["noise"] is None else [inputs.options["noise"]]
    rows = 4 * 3 * 4  # the three classes asked for, of seven
    taken = [vectors] if seed_features else []
    moved = measure.tensor_bytes([features, target, *noise, *taken, *outputs])
    product = 2 * 3 * 5 * 6 * 4
    assert bench.cost(row, variant, torch.float32, "forward") == measure.Cost(moved + rows, product)
    (seeds_of,) = seed_features or [features]
    expected = measure.Cost(measure.tensor_bytes([vectors, indices, seeds_of]), vectors.numel())
    if variant == "cam":
        read = measure.tensor_bytes([features, target, cam, cam]) + rows  # the map, and its gradient
        written = measure.tensor_bytes([weight, *([features] if seed_features else [])])
        expected += measure.Cost(read + written, 3 * product // 2)
    assert bench.cost(row, variant, torch.float32, "backward") == expected


@pytest.mark.parametrize("row, variant", NEGATIVE_VARIANTS)
def test_cost_of_negative_cam_loss_counts_its_tensors(row, variant):
    bench = bench_negative_cam_loss
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    features, weight, bias, target, *logits = inputs.args
    every = measure.tensor_bytes([weight, bias])
    chosen = 6 if row["id"] == "all" else 2  # of each image; with three images, six classes of seven
    rows = every if variant == "pooled" or row["id"] == "all" else 6 * (4 + 1) * 4
    read = measure.tensor_bytes([features, target, *logits, *inputs.grads]) + rows  # the loss is as large
    product = 2 * 3 * chosen * 4 * 30
    pooling = 3 * 4 * 30 + 2 * 3 * 7 * 4 if variant == "pooled" else 0
    assert bench.cost(row, variant, torch.float32, "forward") == measure.Cost(read, product + pooling)
    rows = min(3 * chosen, 7) * 4 * 4
    read = measure.tensor_bytes([features, *inputs.grads]) + rows + bench.kept_bytes(row)
    written = measure.tensor_bytes([inputs.args[index] for index in inputs.differentiable])
    assert bench.cost(row, variant, torch.float32, "backward") == measure.Cost(read + written, 2 * product)


def made_by(bench, row, variant):
    """What the forward pass of a benchmark's function reads and makes, by name."""
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    with passes() as seen:
        bench.OP.fused(*inputs.args, **inputs.options)
    return seen[0].values


@pytest.mark.parametrize("row, variant", NEGATIVE_VARIANTS)
def test_kept_bytes_are_what_the_negatives_keep(row, variant):
    made = made_by(bench_negative_cam_loss, row, variant)
    assert bench_negative_cam_loss.kept_bytes(row) == measure.tensor_bytes(
        [made.chosen, made.counts, made.kept]
    )


@pytest.mark.parametrize("variant", maps.LAYOUTS)
def test_cost_of_focus_area_counts_its_tensors(variant):
    inputs = bench_focus_area.make(ROW, variant, torch.float32, torch.Generator().manual_seed(0))
    moved = measure.tensor_bytes([*inputs.args, *bench_focus_area.eager(*inputs.args)])
    assert inputs.args[0].is_contiguous(memory_format=maps.LAYOUTS[variant])
    assert bench_focus_area.cost(ROW, variant, torch.float32, "forward") == measure.Cost(moved, 3 * 4 * 30)


@pytest.mark.parametrize("bench, row, variant", OTHERS)
def test_cost_of_the_others_counts_its_tensors(bench, row, variant):
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    outputs = bench.OP.eager(*inputs.args, **inputs.options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    read, written = measure.tensor_bytes(inputs.args), measure.tensor_bytes(outputs)
    if bench is bench_crop_and_zoom:  # of the images, what lies in boxes half as wide and as high
        read -= measure.tensor_bytes(inputs.args[:1]) * 3 // 4
    if bench is bench_cam:  # of the weight, the three classes asked for
        read -= measure.tensor_bytes(inputs.args[1:2]) * 4 // 7
    assert bench.cost(row, variant, torch.float32, "forward").bytes == read + written
    if "forward+backward" in bench.OP.directions:
        read = measure.tensor_bytes(inputs.grads)
        if bench is bench_crop_and_zoom:
            read += measure.tensor_bytes(inputs.args[1:])  # the boxes
        elif bench is bench_local_activations:
            features, weight, _ = inputs.args
            read += measure.tensor_bytes([features, weight]) + bench.kept_bytes(row)
        elif bench in (bench_local_level_loss, bench_stochastic_consistency):
            read += measure.tensor_bytes(inputs.args)
        elif bench is bench_cam:
            map_bytes = measure.tensor_bytes(outputs) if variant == "normalized" else 0
            read += (
                measure.tensor_bytes(inputs.args)
                - measure.tensor_bytes(inputs.args[1:2]) * 4 // 7
                + map_bytes
            )
        else:
            read += measure.tensor_bytes(inputs.args[1:]) + bench.kept_bytes(row)
        written = measure.tensor_bytes([inputs.args[index] for index in inputs.differentiable])
        assert bench.cost(row, variant, torch.float32, "backward").bytes == read + written


def test_operations_of_local_activations():
    product = 2 * (3 * 5 * 6) * (7 + 1) * 4  # of one classifier of the three
    cost = bench_local_activations.cost
    assert cost(LOCAL, "contiguous", torch.float32, "forward").flops == 3 * product
    assert cost(LOCAL, "contiguous", torch.float32, "backward").flops == 2 * product


@pytest.mark.parametrize("bench, row, variant", [each for each in OTHERS if hasattr(each[0], "kept_bytes")])
def test_kept_bytes_of_the_others_are_what_the_ops_make(bench, row, variant):
    made = vars(made_by(bench, row, variant))
    op = next(op for op in OPS.values() if op.function == bench.OP.name)
    extra = made.keys() - {*op.forward.names, *op.outputs}
    tensors = [made[name] for name in extra if isinstance(made[name], torch.Tensor)]
    assert bench.kept_bytes(row) == measure.tensor_bytes(tensors)


@pytest.mark.parametrize("row, variant", PAIR_VARIANTS)
def test_kept_bytes_are_what_the_op_keeps(row, variant):
    kept = made_by(bench_cam_transform_mse, row, variant).kept
    assert bench_cam_transform_mse.kept_bytes(row) == measure.tensor_bytes([kept])


@pytest.mark.parametrize("row, variant", PAIR_VARIANTS)
@pytest.mark.parametrize("form", ["eager", "released"])
def test_forms_of_cam_transform_mse_are_its_definition(row, variant, form):
    inputs = bench_cam_transform_mse.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    inputs = inputs.double()
    truth = harness.Provider("reference", bench_cam_transform_mse.OP.reference)(inputs, "forward+backward")
    provider = harness.Provider(form, getattr(bench_cam_transform_mse, form))
    for found, true in zip(provider(inputs, "forward+backward"), truth, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "row, variant, form",
    [(row, variant, "eager") for row, variant in SEED_VARIANTS]
    + [(row, "first", "released") for row in SEEDS],
)
def test_forms_of_cam_seeds_are_its_definition(row, variant, form):
    inputs = bench_cam_seeds.make(row, variant, torch.float32, torch.Generator().manual_seed(0)).double()
    truth = harness.Provider("reference", bench_cam_seeds.OP.reference)(inputs, "forward+backward")
    found = harness.Provider(form, getattr(bench_cam_seeds, form))(inputs, "forward+backward")
    assert 0 < truth[2].min() < row["K"] < truth[2].max()  # seeds that repeat, and candidates left over
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "row, variant, form",
    [
        (row, variant, form)
        for row, variant in NEGATIVE_VARIANTS
        for form in ("eager", *bench_negative_cam_loss.others(row, variant))
    ],
)
def test_forms_of_negative_cam_loss_are_its_definition(row, variant, form):
    bench = bench_negative_cam_loss
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0)).double()
    truth = harness.Provider("reference", bench.OP.reference)(inputs, "forward+backward")
    found = harness.Provider(form, getattr(bench, form))(inputs, "forward+backward")
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bench, row, variant", OTHERS)
def test_forms_of_the_others_are_their_definition(bench, row, variant):
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0)).double()
    direction = bench.OP.directions[-1]
    truth = harness.Provider("reference", bench.OP.reference)(inputs, direction)
    for name, form in {"eager": bench.OP.eager, **bench.OP.others(row, variant)}.items():
        for found, true in zip(harness.Provider(name, form)(inputs, direction), truth, strict=True):
            torch.testing.assert_close(found, true)  # boxes are float32 whatever comes


def test_no_gradient_where_rounding_picks_the_winner():
    draw = torch.Generator().manual_seed(0)
    features, weight = torch.rand(2, 4, 5, 6, generator=draw), torch.rand(3, 5, 4, generator=draw)
    bias = torch.zeros(3, 5)
    assert all(where.float().mean() > 0.9 for where in bench_local_activations.clear(features, weight, bias))
    two_classes, two_classifiers = weight.clone(), weight.clone()
    two_classes[0, 1:3] = 2  # above all others
    activations, attention = bench_local_activations.clear(features, two_classes, bias)
    assert activations[:, 1:3].all()
    assert not attention.any()
    two_classifiers[:2, 1] = 2
    activations, attention = bench_local_activations.clear(features, two_classifiers, bias)
    assert not activations[:, 1].any()
    assert not attention.any()


def offered(bench, name):
    rows = harness.workload_rows(bench.OP.name, "all")
    pairs = ((row, variant) for row in rows for variant in bench.OP.variants(row))
    return {(row["id"], variant) for row, variant in pairs if name in bench.others(row, variant)}


def test_the_released_forms_are_offered_where_they_fit():
    assert offered(bench_cam_seeds, "released") == {("smoke", "first"), ("i2c-inception", "first")}
    flips = {("smoke-flip", "flip"), ("wider-flip", "flip"), ("pa100k-flip", "flip")}
    assert offered(bench_cam_transform_mse, "released") == {*flips, ("wider-scale", "nearest")}
    single = ("smoke", "smoke-all", "imagenet-r101", "acvc-r18")
    assert offered(bench_negative_cam_loss, "released") == {
        (row, variant) for row in single for variant in ("mse", "uniform")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_keys_about_the_cut_are_apart(dtype):
    row = {"id": "toy", "N": 256, "C": 256, "HW": [3, 3], "L": 2000, "k": 200}  # some gaps are narrow
    inputs = bench_negative_cam_loss.make(row, "pooled", dtype, torch.Generator().manual_seed(0)).double()
    features, weight, bias, target = inputs.args
    key = features.mean((2, 3)) @ weight.T + bias
    largest = key.scatter(1, target[:, None], -torch.inf).topk(201).values
    gap = (largest[:, -2] - largest[:, -1]) / key.abs().amax(1)
    assert gap.min() > 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("row", harness.workload_rows("fused_cam_seeds", "all"), ids=lambda row: row["id"])
def test_most_images_have_more_candidates_than_seeds(row):
    row = {**row, "N": 8, "C": 512, "D": 512}
    inputs = bench_cam_seeds.make(row, "random", torch.float32, torch.Generator().manual_seed(0))
    count = bench_cam_seeds.OP.reference(*inputs.args, **inputs.options)[2]
    assert (count > row["K"]).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pixel_is_left_about_the_threshold(dtype):
    draw = torch.Generator().manual_seed(0)
    features = torch.rand(2, 8, 5, 6, generator=draw).to(dtype)
    weight, target = torch.rand(3, 8, generator=draw), torch.tensor([0, 2])
    heat = cam(features.float(), weight, target)
    threshold = heat[1, 2, 3].item()
    maps.keep_off_threshold(features, weight, target, threshold)
    assert ((cam(features.double(), weight, target) - threshold).abs() > maps.BAND).all()


@pytest.mark.parametrize(
    "bench, row, variant",
    [(bench_cam_erase, ROW, variant) for variant in ("hard", "soft")]
    + [(bench_cam_seeds, *each) for each in SEED_VARIANTS]
    + [(bench_cam_transform_mse, *each) for each in PAIR_VARIANTS]
    + [(bench_negative_cam_loss, *each) for each in NEGATIVE_VARIANTS]
    + [(bench_focus_area, ROW, layout) for layout in maps.LAYOUTS]
    + OTHERS,
)
def test_a_wrong_result_is_refused(bench, row, variant):
    inputs = bench.make(row, variant, torch.float32, torch.Generator().manual_seed(0))
    eager = harness.Provider("eager", bench.OP.eager)
    direction = bench.OP.directions[-1]
    found = tuple(each.detach() for each in eager(inputs, direction))
    reference = harness.Provider("reference", bench.OP.reference)
    truth = tuple(each.detach() for each in reference(inputs.double(), direction))
    bench.OP.check(inputs, found, found, truth)
    for index, result in enumerate(found):
        wrong = list(found)
        wrong[index] = result + (1e-3 if result.is_floating_point() else 1)
        with pytest.raises(AssertionError):
            bench.OP.check(inputs, tuple(wrong), found, truth)


def run_alone(command):
    # A worker of xdist names itself in the environment, where pytest-benchmark would take this run for one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # One thread: those of tiny tensors wait for each other far longer than they work, beside other workers.
    alone["OMP_NUM_THREADS"] = "1"
    subprocess.run(command, check=True, cwd=BENCHMARKS.parent, env=alone)


def test_calls_on_tiny_tensors_have_a_table_to_themselves(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(BENCHMARKS / "bench_focus_area.py"),
        "--rows",
        "tiny",
    ]
    run_alone([*command, "--providers", "eager,camkernels", "--results", str(tmp_path / "results")])
    page = write_report(tmp_path)
    for variant in bench_focus_area.OP.variants(ROW):
        (line,) = (line for line in page.splitlines() if f"| `focus_area` | {variant} | forward |" in line)
        eager, ours, share = (float(cell.strip(" *")) for cell in line.split("|")[4:7])
        assert share == pytest.approx(ours / eager, abs=0.05)
    assert schema.TINY not in page


def test_a_tiny_run_gives_rows_that_the_report_reads(tmp_path):
    providers = "eager,camkernels,gathered,released,exact,skimage"
    left_out = ("smoke-multi-label", "smoke-all", "smoke-single", "smoke-many")
    command = [sys.executable, "-m", "pytest", "-q", str(BENCHMARKS), "--rows", "smoke", "--max-images", "2"]
    command += ["--seconds", "0", "--providers", providers, "--results", str(tmp_path / "results")]
    command += ["-k", " and ".join(f"not {each}" for each in (*left_out, "channels_last"))]
    run_alone(command)
    (path,) = (tmp_path / "results").glob("*.json")
    runs = json.loads(path.read_text())["runs"]
    assert runs.keys() == {bench.OP.name for bench in BENCHES}
    page = write_report(tmp_path)
    fields = {field.name for field in dataclasses.fields(schema.Row)}
    for bench in BENCHES:
        op = bench.OP
        wanted = {row["id"]: row for row in harness.workload_rows(op.name, "smoke")}
        wanted = {id: row for id, row in wanted.items() if id not in left_out}
        rows = runs[op.name]["rows"]
        assert {(row["id"], row["variant"], row["direction"], row["provider"]) for row in rows} == {
            (id, variant, direction, provider)
            for id, row in wanted.items()
            for variant in op.variants(row)
            if variant != "channels_last"
            for direction in op.directions
            for provider in ("eager", "camkernels", *op.others(row, variant))
        }
        for row in rows:
            full = wanted[row["id"]]["N"]
            assert set(row) == fields
            assert row["shape"]["N"] == 2
            assert row["full_images"] == full
            assert row["peak_extra_bytes"] >= row["result_bytes"] > 0
            assert f"| {row['id']} | 2 (of {full}) | {row['variant']} | {row['direction']} |" in page


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


def test_memory_allows_for_what_backward_may_keep():
    assert judged(peak_extra_bytes=140, kept_bytes=40)["memory"]
    assert not judged(peak_extra_bytes=150, kept_bytes=40)["memory"]


@pytest.mark.parametrize(
    "op, direction, row, wanted",
    [
        ("fused_cam_transform_mse", "forward+backward", "wider-flip", 1.3),
        ("fused_cam_transform_mse", "forward+backward", "coco-flip", 1.8),
        ("fused_cam_transform_mse", "forward+backward", "wider-scale", 2.5),
        ("fused_cam_seeds", "forward", "smoke", 2.0),
        ("fused_negative_cam_loss", "forward+backward", "imagenet-r101", 3.0),
        ("otsu_mask", "forward", "many-maps", 5.0),
    ],
)
def test_speed_up_wanted_on_the_cpu(op, direction, row, wanted):
    def met(speed_up: float, device: str = "cpu", **changes: object) -> bool | None:
        common = {"id": row, "direction": direction, **changes}
        rows = [synthetic_row("compile", **common, seconds=0.004)]
        rows += [synthetic_row("camkernels", **common, seconds=0.004 / speed_up)]
        measured = report.measurements(op, device, rows)
        verdicts = {verdict.target: verdict.met for verdict in report.judge(measured)}
        return verdicts.get("speed-up")

    assert met(wanted + 0.01) is True
    assert met(wanted - 0.01) is False
    assert met(wanted, device="cuda") is None
    (other,) = {*harness.DIRECTIONS} - {direction}
    assert met(wanted, direction=other) is None
    assert met(wanted, id="another row") is None


def test_three_times_is_wanted_where_a_fifth_of_the_classes_is_chosen():
    rows = harness.workload_rows("fused_negative_cam_loss", "all")
    wanted = report.SPEED_UP["fused_negative_cam_loss", "forward+backward"]
    assert wanted == {row["id"]: 3.0 for row in rows if row["k"] <= row["L"] / 5}


def test_every_row_with_a_wanted_speed_up_is_a_workload():
    targets = [(op, wanted) for (op, *_), wanted in [*report.SPEED_UP.items(), *report.SPEED_UP_OVER.items()]]
    for op, wanted in [*targets, *report.LESS_MEMORY.items()]:
        assert set(wanted) <= {row["id"] for row in harness.workload_rows(op, "all")}
    for _, direction, *_ in [*report.SPEED_UP, *report.SPEED_UP_OVER]:
        assert direction in harness.DIRECTIONS


def test_half_as_many_times_less_memory_is_wanted_as_there_are_classifiers():
    rows = harness.workload_rows("fused_local_activations", "all")
    wanted = report.LESS_MEMORY["fused_local_activations"]
    assert wanted == {row["id"]: row["n"] / 2 for row in rows if row["n"] == 16}

    def met(eager: int, ours: int) -> bool:
        common = {"id": "cub-448", "result_bytes": 100}
        rows = [synthetic_row("eager", **common, peak_extra_bytes=100 + eager)]
        rows += [synthetic_row("camkernels", **common, peak_extra_bytes=100 + ours)]
        verdicts = report.judge(report.measurements("fused_local_activations", "cpu", rows))
        return {verdict.target: verdict.met for verdict in verdicts}["less memory"]

    assert met(80, 10)
    assert not met(79, 10)


@pytest.mark.parametrize(("other", "wanted"), [("skimage", 20), ("exact", 5)])
def test_a_multiple_of_the_speed_of_other_exact_forms_is_wanted(other, wanted):
    def judged(seconds: float, device: str = "cpu", row: str = "many-maps") -> list[bool]:
        rows = [
            synthetic_row(other, id=row, seconds=seconds),
            synthetic_row("camkernels", id=row, seconds=1),
        ]
        beside = report.measurements_beside(other, "otsu_mask", device, rows)
        return [verdict.met for verdict in report.judge_beside(other, beside)]

    assert judged(wanted) == [True]
    assert judged(wanted - 1) == [False]
    assert judged(wanted - 1, device="cuda") == judged(wanted - 1, row="smoke") == []


@pytest.mark.parametrize("other", report.OTHERS)
def test_other_forms_are_no_rivals(other):
    rows = [synthetic_row("eager", seconds=0.004), synthetic_row(other, seconds=0.001)]
    rows += [synthetic_row("camkernels")]
    (measured,) = report.measurements("op", "cpu", rows)
    assert measured.speed_up == 2
    (measured,) = report.measurements_beside(other, "op", "cpu", rows)
    assert measured.speed_up == 0.5
    assert report.measurements_beside(other, "op", "cpu", [rows[0], rows[2]]) == []


def test_every_provider_beside_the_rivals_has_a_table():
    for bench in BENCHES:
        rows = harness.workload_rows(bench.OP.name, "all")
        names = {
            name
            for row in rows
            for variant in bench.OP.variants(row)
            for name in bench.OP.others(row, variant)
        }
        assert names <= report.OTHERS.keys()


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
    rows += [synthetic_row("released", seconds=0.02), synthetic_row("gathered", seconds=0.003)]
    for row in rows:
        del row["kept_bytes"]  # as in files of camkernels 0.1.0
    run = {"machine": machine, "rows": rows}
    content = {"schema": 1, "device": "cpu", "name": "A CPU", "runs": {"op": run}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu-a.json").write_text(json.dumps(content))
    notes = '[cpu-a]\n"op/toy" = "a cause"\n"near the floor: op/toy/hard" = "a better cause"\n'
    page = write_report(tmp_path, notes)
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| A CPU | `op` | **missed**: 0 of 1 | met: 1 of 1 | - | met: 2.00 x faster |" in page
    assert "| toy | hard | forward | 20.000 | 2.000 | 10.0 | 0.00 | 0.00 |" in page
    assert "| toy | hard | forward | 3.000 | 2.000 | 1.5 | 0.00 | 0.00 |" in page
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
