"""What tools/gpu.sh makes of its steps, with stand-ins for the commands that need a GPU."""

import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "gpu.sh"
BENCHES = sorted((SCRIPT.parent.parent / "benchmarks").glob("bench_*.py"))
STAND_INS = {
    # Notes the limit and the command, and fails where it is told to.
    "timeout": 'echo "$5 ${@:6}" >>"$CALLS"; echo "said by $*"; case "$*" in *"$FAILS"*) exit 3;; esac',
    "python": "echo 9.0",  # asked for the device's capability
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def run(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def run(
        *part: str, fails: str = "nothing"
    ) -> tuple[subprocess.CompletedProcess[str], Path, list[list[str]]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = os.environ | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "CALLS": str(calls),
            "FAILS": fails,
        }
        folder = tmp_path / "results"
        done = subprocess.run([SCRIPT, folder, *part], env=environment, capture_output=True, text=True)
        return done, folder, [line.split() for line in calls.read_text().splitlines()]

    return run


@pytest.mark.parametrize("part, count", [((), 8), (("compile",), 2 + len(BENCHES))])
def test_every_step_has_its_share_of_nine_minutes(run, part, count):
    done, folder, calls = run(*part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    steps = [line.split()[0] for line in (folder / "steps.txt").read_text().splitlines()]
    assert len(steps) == len(calls) == count
    assert all((folder / f"{step}.log").read_text().startswith("said by") for step in steps)
    # Nothing took any time, so that a limit is the time from the start.
    limits = [int(limit) for limit, *_ in calls]
    assert limits[0] > 60
    assert limits[-1] < 9 * 60
    # No step is to end before the one that it follows; a second may have passed all the same.
    assert all(later > earlier - 2 for earlier, later in pairwise(limits))


def test_each_benchmark_and_sanitizer_runs(run):
    commands = [" ".join(command) for _, *command in run()[2]]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert sum(f"compute-sanitizer --tool {tool}" in command for command in commands) == 1
    assert sum("pytest benchmarks " in command for command in commands) == 1
    commands = [" ".join(command) for _, *command in run("compile")[2]]
    for bench in BENCHES:
        assert sum(f"benchmarks/{bench.name} " in command for command in commands) == 1


def test_a_failing_step_is_named_and_stops_none(run):
    done, folder, calls = run(fails="synccheck")
    assert done.returncode == 1
    assert f"failed: synccheck; the logs are in {folder}" in done.stdout
    assert len(calls) == 8


def test_an_unknown_part_is_refused(run):
    done, _, calls = run("comple")
    assert done.returncode == 2
    assert "usage: tools/gpu.sh RESULTS [compile]" in done.stderr
    assert calls == []
