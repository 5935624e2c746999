"""use_backend as a setter and in ``with`` blocks: nested, in threads and tasks, and compiled."""

import asyncio
import threading

import pytest
import torch
from test_backend import python

from camkernels import _backend, fused_cam, use_backend


def in_thread(function):
    """What ``function`` returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_setter_and_context_manager():
    start = _backend.setting()
    use_backend("reference")
    assert _backend.setting() == "reference"
    with use_backend("cpu"):
        assert _backend.setting() == "cpu"
        with use_backend("auto"):
            assert _backend.setting() == "auto"
        assert _backend.setting() == "cpu"
    assert _backend.setting() == "reference"
    use_backend(start)


def test_an_error_inside_restores_too():
    start = _backend.setting()
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert _backend.setting() == start


def test_a_context_manager_entered_twice():
    chosen = use_backend("reference")
    with chosen:
        assert _backend.setting() == "reference"
    assert _backend.setting() == "auto"
    with chosen:
        assert _backend.setting() == "reference"
    assert _backend.setting() == "auto"


@pytest.mark.parametrize("between", ["cpu", "reference"])
def test_an_object_entered_later_gives_back_what_held_when_it_was_entered(between):
    chosen = use_backend("reference")
    use_backend(between)  # of the same name too: it is another choice
    with chosen:
        assert _backend.setting() == "reference"
    assert _backend.setting() == between


def test_a_refused_name_changes_nothing():
    with pytest.raises(ValueError, match="name is 'cdua'"):
        use_backend("cdua")
    assert _backend.setting() == "auto"


def test_a_choice_inside_a_block_ends_with_it():
    with use_backend("cpu"):
        use_backend("reference")
        assert _backend.setting() == "reference"
    assert _backend.setting() == "auto"


def test_one_object_nested_in_itself():
    chosen = use_backend("reference")
    use_backend("cpu")
    with chosen:
        with chosen, use_backend("auto"):
            with chosen:
                assert _backend.setting() == "reference"
            assert _backend.setting() == "auto"
        assert _backend.setting() == "reference"
    assert _backend.setting() == "cpu"


def test_leaving_what_was_not_entered():
    chosen = use_backend("reference")
    with pytest.raises(RuntimeError, match=r"in no block of use_backend\('reference'\)"):
        chosen.__exit__(None, None, None)


def test_a_thread_follows_the_main_thread_until_it_chooses():
    seen = []
    chosen, go_on = threading.Event(), threading.Event()

    def work():
        seen.append(_backend.setting())
        use_backend("cpu")
        chosen.set()
        go_on.wait(60)
        seen.append(_backend.setting())

    with use_backend("reference"):  # as for the threads of autograd, of DataParallel
        thread = threading.Thread(target=work)
        thread.start()
        assert chosen.wait(60)
        assert _backend.setting() == "reference"
    use_backend("reference")
    go_on.set()
    thread.join()
    assert seen == ["reference", "cpu"]
    assert _backend.setting() == "reference"
    assert in_thread(_backend.setting) == "reference"


@pytest.mark.parametrize("main_thread", [False, True])
def test_blocks_of_two_threads_do_not_meet(main_thread):
    """The first thread enters, the second enters, the first leaves, the second leaves."""
    turns = [threading.Event() for _ in range(3)]
    seen = {}

    def first():
        with use_backend("reference"):
            turns[0].set()
            turns[1].wait(60)
            seen["first"] = _backend.setting()
        seen["first after"] = _backend.setting()
        turns[2].set()

    def second():
        turns[0].wait(60)
        with use_backend("cpu"):
            turns[1].set()
            turns[2].wait(60)
            seen["second"] = _backend.setting()
        seen["second after"] = _backend.setting()

    threads = [threading.Thread(target=work) for work in ((second,) if main_thread else (first, second))]
    for thread in threads:
        thread.start()
    if main_thread:
        first()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "first after": "auto", "second": "cpu", "second after": "auto"}
    assert _backend.setting() == in_thread(_backend.setting) == "auto"


def test_one_object_in_many_threads_at_once():
    chosen = use_backend("reference")
    use_backend("auto")
    all_inside = threading.Barrier(4)

    def work(own):
        use_backend(own)
        all_inside.wait(60)
        with chosen:
            all_inside.wait(60)
            inside = _backend.setting()
            all_inside.wait(60)
        return own, inside, _backend.setting()

    found = []
    threads = [
        threading.Thread(target=lambda own=own: found.append(work(own))) for own in ("cpu", "auto", "cpu")
    ]
    for thread in threads:
        thread.start()
    found.append(work("auto"))
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(inside == "reference" and own == after for own, inside, after in found)


def test_an_object_of_the_main_thread_entered_in_another():
    chosen = use_backend("cpu")

    def work():
        use_backend("reference")
        with chosen:
            inside = _backend.setting()
        return inside, _backend.setting()

    assert in_thread(work) == ("cpu", "reference")
    assert _backend.setting() == "cpu"  # made here, it still holds here


def test_tasks_that_take_turns_leave_what_was_there():
    """The first task enters, the second enters, the first leaves, the second leaves."""
    use_backend("reference")

    async def first(inside, other_inside):
        with use_backend("cpu"):
            inside.set()
            await other_inside.wait()

    async def second(other_inside, inside):
        await other_inside.wait()
        with use_backend("auto"):
            inside.set()
            await asyncio.sleep(0.01)
            return _backend.setting()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        return (await asyncio.gather(first(*events), second(*events)))[1]

    assert asyncio.run(both()) == "auto"
    assert _backend.setting() == "reference"


def test_a_package_imported_by_another_thread():
    code = """
import threading
def run(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
run(lambda: __import__("camkernels").use_backend("cpu"))
from camkernels import _backend, use_backend
print(_backend.setting())
use_backend("reference")
run(lambda: print(_backend.setting()))
with use_backend("cpu"):
    pass
print(_backend.setting())
"""
    result = python(code, CAMKERNELS_BACKEND=None)
    assert result.stdout.split() == ["auto", "reference", "reference"], result.stderr


FEATURES, WEIGHT = torch.rand(1, 2, 3, 3), torch.rand(4, 2)


class Recorder:
    """Compiles nothing; keeps the backends that each graph asks for, and those of each run."""

    def __init__(self):
        torch.compiler.reset()
        self.compiled, self.ran = [], []

    def __call__(self, graph, inputs):
        asked = [n.args[-1] for n in graph.graph.nodes if "cam_fwd" in str(n.target)] or ["reference"]
        self.compiled.append(asked)

        def run(*arguments):
            self.ran.append(asked)
            return graph(*arguments)

        return run


def test_compiled_code_follows_the_choice_in_every_thread():
    record = Recorder()
    compiled = torch.compile(lambda: fused_cam(FEATURES, WEIGHT), fullgraph=True, backend=record)

    def step(expected, graphs):
        for _ in range(2):
            compiled()
            assert record.ran[-1] == [expected]
        assert len(record.compiled) == graphs
        return True

    step("auto", 1)
    with use_backend("reference"):
        step("reference", 2)
        assert in_thread(lambda: step("reference", 2))  # it follows the main thread
    step("auto", 2)

    def choose():
        step("auto", 2)
        with use_backend("cpu"):
            step("cpu", 3)
        step("auto", 3)
        use_backend("reference")  # one more graph: it is this thread's choice, not the main thread's
        return step("reference", 4)

    assert in_thread(choose)
    step("auto", 4)


def test_a_block_inside_compiled_code():
    def function():
        with use_backend("cpu"):
            inside = fused_cam(FEATURES, WEIGHT)
        return inside, fused_cam(FEATURES, WEIGHT)

    record = Recorder()
    compiled = torch.compile(function, fullgraph=True, backend=record)
    for _ in range(3):
        compiled()
    assert record.compiled == [["cpu", "auto"]]
    assert _backend.setting() == "auto"
    with use_backend("reference"):
        compiled()
        assert _backend.setting() == "reference"
    assert record.compiled[1:] == [["cpu"]]
    use_backend("cpu")
    compiled()
    assert record.ran[-1] == ["cpu", "cpu"]
    assert _backend.setting() == "cpu"


def test_a_block_inside_compiled_code_that_cannot_serve(monkeypatch):
    """It says so as without torch.compile, and can be mended."""

    def function(name):
        with use_backend(name):
            return fused_cam(FEATURES, WEIGHT)

    monkeypatch.setattr(_backend, "extension_error", lambda: "not built")
    _backend.clear_caches()
    compiled = torch.compile(function, backend=Recorder())
    with pytest.raises(RuntimeError, match="use_backend: backend 'cpu' cannot serve here: not built"):
        compiled("cpu")
    assert _backend.setting() == "auto"
    monkeypatch.undo()
    compiled("cpu")
    assert _backend.setting() == "auto"
