"""The emulator in which the CUDA bindings and kernels run without a GPU (see cuda_emulator/cuda_emulator.h).

The other files of this name call the public functions with ``use_backend("cuda")``, so that shapes, autograd
and the bindings between are those of a real call; here are the emulator's own mistakes, and the sanitizers.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulator import emulation
from cuda_emulator.comparison import CLUSTERS

pytest_plugins = ["cuda_emulator.fixtures"]

OPS = torch.ops.camkernels_emulator


def reversing(mistake, fixed):
    """What is wrong with a kernel that has that mistake; empty where nothing shows."""
    values = torch.arange(128, dtype=torch.float32)
    result = torch.full_like(values, torch.nan)
    try:
        OPS.reverse(values, result, mistake, fixed)
    except RuntimeError as error:
        return str(error)
    return "" if torch.equal(result, values.flip(0)) else "a wrong result"


@pytest.mark.parametrize(
    "mistake, cluster, message",
    [
        ("no_barrier", 1, "a wrong result"),
        ("no_cluster_barrier", 2, "a wrong result|has not started|has not taken"),
        ("diverging_barriers", 1, "threads diverge"),
        ("thread_leaves_early", 1, "has already left the kernel"),
        ("part_of_a_warp_shuffles", 1, "deadlock"),
        ("waits_without_arriving", 2, "waits at a cluster barrier at which it has not arrived"),
        ("arrives_twice", 2, "arrives at a cluster barrier again"),
        ("never_waits", 2, "leaves the kernel without a wait at the cluster barrier"),
        ("reads_between_arrive_and_wait", 2, "after it has arrived at the cluster barrier"),
    ],
)
@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "static"])
def test_the_emulator_notices(emulator, mistake, cluster, message, fixed):
    """Reversing an array through shared memory, with one mistake: some order of threads must give it away."""
    found = set()
    for seed in range(8):
        emulator.set(seed=seed, cluster=cluster, threads=128 // cluster)
        assert reversing("none", fixed) == ""
        found.add(reversing(mistake, fixed))
    assert found != {""}
    assert all(re.search(message, text) for text in found - {""}), found


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_static_shared_memory_belongs_to_a_block(emulator, cluster):
    values = torch.randint(1000, (16, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    truth = values.sum(1, dtype=torch.int32)
    nobody_wrote = torch.full_like(truth, -values.shape[1])  # -1 is what all bits set are

    def sums(mistake):
        found = torch.zeros_like(truth)
        OPS.block_sums(values, found, mistake)
        return found

    for seed in range(4):
        emulator.set(seed=seed, cluster=cluster)
        assert torch.equal(sums("none"), truth)
        assert not torch.equal(sums("no_barrier"), truth)
        assert torch.equal(sums("never_writes"), nobody_wrote)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_atomics(emulator, cluster):
    values = torch.randint(7, (8, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    truth = values.flatten().bincount(minlength=7).int()
    bits = values * 4 + 1
    for seed in range(4):
        emulator.set(seed=seed, cluster=cluster)
        right, wrong = torch.zeros_like(truth), torch.zeros_like(truth)
        OPS.histogram(values, right, "none")
        assert torch.equal(right, truth)
        OPS.histogram(values, wrong, "reads_before_the_atomic")
        assert (wrong < truth).all()
        counters = torch.tensor([0, -1, 2**30, 0, -1, 0, 0], dtype=torch.int32)
        OPS.tally(bits, counters)
        total, most, least, any_bits, all_bits, last, replaced = counters.tolist()
        assert (total, most, least) == (bits.sum(), bits.max(), bits.min())
        assert (any_bits, all_bits) == (0b11101, 0b00001)
        assert last in bits
        assert replaced + last == total


@pytest.mark.parametrize(
    "blocks, threads, cluster, shared, message",
    [
        (0, 32, 1, 0, "0 blocks; allowed are 1 to 2147483647"),
        (2**31, 32, 1, 0, "2147483648 blocks; allowed are 1 to 2147483647"),
        (1, 0, 1, 0, "0 threads in a block; allowed are 1 to 1024"),
        (1, 1056, 1, 0, "1056 threads in a block; allowed are 1 to 1024"),
        (1, 48, 1, 0, "whole warps and whole clusters"),
        (16, 32, 16, 0, "16 blocks in a cluster; allowed are 1 to 8"),
        (8, 32, 0, 0, "0 blocks in a cluster; allowed are 1 to 8"),
        (3, 32, 2, 0, "whole warps and whole clusters"),
        (1, 32, 1, 232449, "232449 bytes of shared memory; allowed are 0 to 232448"),
    ],
)
def test_launches_that_no_gpu_takes(emulator, blocks, threads, cluster, shared, message):
    emulator.set(threads=1024, cluster=8)
    OPS.launch(8, 232448)
    emulator.set(threads=threads, cluster=cluster)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OPS.launch(blocks, shared)
    assert not emulator.launches()


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The environment of a process that loads the emulator with sanitizers in it."""
    if emulation.SANITIZE in os.environ:
        pytest.skip("this is the run under sanitizers")
    runtimes = emulation.sanitizer_runtimes()
    if not runtimes:
        pytest.skip("the C++ compiler has no address sanitizer")
    return os.environ | {
        emulation.SANITIZE: str(emulation.built(tmp_path_factory.getbasetemp(), sanitize=True)),
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep what they allocate until they end; and a CUDA driver, which torch would start,
        # wants addresses that the sanitizer keeps for itself.
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # tensors are small: torch's threads would only wait for each other
    }


@pytest.mark.parametrize("part", ["", "_cam", "_seeds", "_transforms"])
def test_under_sanitizers(sanitized, part):
    """Memory errors and undefined behaviour in bindings and kernels, on a part of the cases."""
    file = str(Path(__file__).with_name(f"test_cuda_emulator{part}.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env=sanitized, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_sanitizers_work(sanitized):
    """An access past the end of a shared array ends the process."""
    script = (
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from cuda_emulator.emulation import SANITIZE, Emulator\n"
        "Emulator(os.environ[SANITIZE]).set()\n"
        "values = torch.zeros(64)\n"
        "torch.ops.camkernels_emulator.reverse(values, values, 'beyond_the_end', False)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], env=sanitized, capture_output=True, text=True)
    assert "heap-buffer-overflow" in result.stderr
