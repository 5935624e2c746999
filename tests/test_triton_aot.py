"""Every Triton kernel compiles for every GPU generation it must serve, and fits there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("triton_aot")  # kernels are compiled once, not once in each worker

# What a block may have on sm_86, sm_89 and sm_120, the least of the GPUs served.
SHARED_BYTES = 99 * 1024
CAPABILITIES = (80, 90, 100)
# Kernels that spill at one of the sizes of triton_aot.CASES, or that want more shared memory than the least
# GPU has. A kernel that joins them, or that is mended, turns a test red.
SPILLING = {
    80: {"local_features_bwd_kernel"},
    90: {
        "affine_adjoint_kernel",
        "cam_transform_mse_fwd_kernel",
        "crop_and_zoom_kernel",
        "local_features_bwd_kernel",
        "local_level_loss_bwd_kernel",
    },
    100: {"local_features_bwd_kernel"},
}
LARGE = {80: set[str](), 90: {"cam_transform_mse_fwd_kernel"}, 100: set[str]()}


@pytest.fixture(scope="session")
def report() -> dict[str, Any]:
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(here / "triton_aot.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(report: dict[str, Any], capability: int) -> list[dict[str, Any]]:
    return [row for row in report["compiled"] if row["capability"] == capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_is_compiled(report, capability):
    assert {row["kernel"] for row in of(report, capability)} == set(report["kernels"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_which_kernels_spill(report, capability):
    assert {row["kernel"] for row in of(report, capability) if row["spills"]} == SPILLING[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_which_kernels_do_not_fit_in_shared_memory(report, capability):
    large = {row["kernel"] for row in of(report, capability) if row["shared_bytes"] > SHARED_BYTES}
    assert large == LARGE[capability]


@pytest.mark.parametrize("kernel", ["erase_kernel", "cam_erase_bwd_kernel"])
def test_image_stage_loads_whole_vectors(report, kernel):
    """224 pixels a row: 16 bytes a load, masked by erased sectors or not, where a tile has 4 values for each
    of the 128 threads."""
    rows = [row for row in report["compiled"] if row["kernel"] == kernel]
    whole = [row for row in rows if row["case"]["BLOCK_H"] * row["case"]["BLOCK_W"] >= 512]
    assert {row["widest_load"] for row in whole} == {4}


def test_otsu_rounds_every_operation_by_itself(report):
    """Without ``rn`` ptxas may fuse a product and a sum, and a division may be off by a bit."""
    used = {op for row in report["compiled"] if "otsu" in row["kernel"] for op in row["float_operations"]}
    assert used == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}


def test_a_shift_is_no_reason_to_compile_again(report):
    """Shifts may be random; one of these moves by exactly one cell, a number that Triton would bake in."""
    moved = [row["case"] for row in report["compiled"] if "offset_x" in row["case"]]
    assert {case[name] for case in moved for name in ("offset_x", "begin_x", "end_x", "offset_y")} == {"i32"}
