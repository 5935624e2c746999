"""The examples: what the digit scenes promise, and a short run of the training script from end to end."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
pytest.importorskip(
    "sklearn", reason="the examples need scikit-learn, matplotlib and rich (camkernels[examples])"
)
digit_scenes = importlib.import_module("digit_scenes")
findings = importlib.import_module("findings")
train_digit_scenes = importlib.import_module("train_digit_scenes")

SIZE = digit_scenes.SIZE
TINY = ["--train-scenes", "24", "--test-scenes", "12", "--epochs", "1", "--batch-size", "8", "--repeats", "2"]


@pytest.fixture(scope="module")
def scenes():
    return digit_scenes.digit_scenes(40, 20, seed=3)


def test_shapes_and_types(scenes):
    for part, count in zip(scenes, (40, 20), strict=True):
        assert part.images.shape == (count, 3, SIZE, SIZE)
        assert part.images.dtype == torch.uint8
        assert part.images.amin() < 40
        assert part.images.amax() > 215
        assert part.labels.shape == (count,)
        assert part.labels.dtype == torch.int64
        assert part.classes == tuple("0123456789")
        assert part.labels.bincount().tolist() == [count // 10] * 10


def test_the_seed_decides_everything(scenes):
    again = digit_scenes.digit_scenes(40, 20, seed=3)
    for one, two in zip(scenes, again, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert (one.boxes, one.sources) == (two.boxes, two.sources)
    other, _ = digit_scenes.digit_scenes(40, 20, seed=4)
    assert not torch.equal(scenes[0].images, other.images)


def test_three_to_five_digits_of_one_class_and_pieces_of_others(scenes):
    source_labels = digit_scenes.load_digits().target
    counts = set()
    for part in scenes:
        for label, boxes, sources in zip(part.labels.tolist(), part.boxes, part.sources, strict=True):
            instances, fragments = sources[: len(boxes)], sources[len(boxes) :]
            assert 3 <= len(boxes) <= 5
            assert len(set(instances)) == len(boxes)
            assert {int(source_labels[i]) for i in instances} == {label}
            assert len(fragments) > 0
            assert label not in {int(source_labels[i]) for i in fragments}
            counts.add(len(boxes))
    assert counts == {3, 4, 5}


def test_training_and_test_share_no_digit():
    train, test = digit_scenes.digit_scenes(400, 200, seed=0)
    used = [{i for sources in part.sources for i in sources} for part in (train, test)]
    assert used[0]
    assert used[1]
    assert not used[0] & used[1]


def test_boxes_lie_inside_and_apart(scenes):
    for part in scenes:
        for boxes in part.boxes:
            occupied = np.zeros((SIZE, SIZE), int)
            for left, top, right, bottom in boxes:
                assert 0 <= left < right <= SIZE
                assert 0 <= top < bottom <= SIZE
                occupied[top:bottom, left:right] += 1
            assert occupied.max() == 1


def test_boxes_are_tight_around_the_ink():
    digits = (digit_scenes.load_digits().images / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    for first in range(0, 40, 4):
        background = rng.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        scene = digit_scenes.draw_scene(background, digits[first : first + 4], digits[100:102], rng)
        outside = scene.ink.copy()
        for left, top, right, bottom in scene.boxes:
            inside = scene.ink[top:bottom, left:right] > 0
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            outside[top:bottom, left:right] = 0
        assert len(scene.boxes) == 4
        assert not outside.any()


def test_digits_find_room_in_a_crowd():
    digits = np.ones((14, 8, 8), np.float32)
    rng = np.random.default_rng(0)
    scene = digit_scenes.draw_scene(np.zeros((SIZE, SIZE, 3), np.uint8), digits, digits[:0], rng)
    assert len(scene.boxes) == 14


@pytest.fixture
def photos(tmp_path):
    """Two classes of five images of different sizes and modes: mostly dark, mostly light."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for name, low in (("dark", 0), ("light", 150)):
        (root / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(low, low + 100, size=(70 + 20 * i, 120, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert("L" if i == 1 else "RGB")
            image.save(root / name / f"{i}.{'JPG' if i == 2 else 'png'}")
        (root / name / "notes.txt").write_text("not an image")
    return root


def test_folder_of_images(photos):
    train, test = digit_scenes.image_folder(photos, seed=0)
    again, _ = digit_scenes.image_folder(photos, seed=0)
    assert train.images.shape == (8, 3, SIZE, SIZE)
    assert test.images.shape == (2, 3, SIZE, SIZE)
    assert train.classes == ("dark", "light")
    assert train.labels.bincount().tolist() == [4, 4]
    assert test.labels.bincount().tolist() == [1, 1]
    assert train.boxes is None
    assert torch.equal(train.images, again.images)
    brightness = train.images.double().mean((1, 2, 3))
    assert torch.equal(brightness > 125, train.labels == 1)


def run(capsys, *arguments: str) -> str:
    train_digit_scenes.main(arguments)
    return capsys.readouterr().out


def test_training_from_end_to_end(tmp_path, capsys):
    printed = run(capsys, *TINY, "--output", str(tmp_path / "one"))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(results) == {
        "runs",
        "erase_ms",
        "erase_shapes",
        "findings",
        "images",
        "classes",
        "parameters",
        "settings",
        "versions",
        "seconds",
        "cpu_seconds",
    }
    assert list(results["runs"]) == ["baseline", "pcl"]
    for title, measured in zip(("cross-entropy", "PCL"), results["runs"].values(), strict=True):
        assert measured["title"] == title
        assert title in printed
        assert measured["steps"] == 3
        assert measured["ms_per_step"] > 0
        for key in ("top1", "top1_peak_erased", "coverage_mean", "coverage_median", "digits_in_focus"):
            assert 0 <= measured[key] <= 1
    assert results["runs"]["baseline"]["erased_fraction"] is None
    assert 0 < results["runs"]["pcl"]["erased_fraction"] < 1
    assert results["erase_ms"]["reference"] > 0
    assert results["images"] == {"train": 24, "test": 12}
    assert results["settings"]["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__
    assert "top-1" in printed
    assert "paper's claim" in printed
    with Image.open(tmp_path / "one" / "scenes.png") as picture:
        assert picture.width <= 1600

    run(capsys, *TINY, "--output", str(tmp_path / "two"))
    again = json.loads((tmp_path / "two" / "results.json").read_text())
    for first, second in zip(results["runs"].values(), again["runs"].values(), strict=True):
        del first["ms_per_step"], second["ms_per_step"]
        assert first == second


def test_training_on_a_folder(photos, tmp_path, capsys):
    output = tmp_path / "demo"
    run(capsys, *TINY, "--data", str(photos), "--output", str(output), "--backend", "reference")
    results = json.loads((output / "results.json").read_text())
    assert results["classes"] == ["dark", "light"]
    assert results["images"] == {"train": 8, "test": 2}
    assert results["runs"]["pcl"]["digits_in_focus"] is None
    assert list(results["erase_ms"]) == ["reference"]
    assert (output / "scenes.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "none"], "--method: invalid choice: 'none'"),
        (["--epochs", "0"], "--epochs: 0 is not at least 1"),
        (["--batch-size", "1"], "--batch-size: 1 is not at least 2"),
        (["--threshold", "1"], "--threshold: 1.0 is not between 0 and 1"),
        (["--device", "nowhere"], "--device: 'nowhere' cannot be used here"),
        (["--backend", "cuda"], "--backend: "),
        (["--data", "no/such/folder"], "--data: no/such/folder is not a folder"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_digit_scenes.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_folders(photos, tmp_path):
    def refused(root: Path, message: str) -> None:
        with pytest.raises(SystemExit, match=re.escape(message)):
            train_digit_scenes.main(["--data", str(root)])

    refused(photos / "dark", f"{photos / 'dark'} has 0 class folders; at least 2 are needed")
    (photos / "empty").mkdir()
    refused(photos, f"{photos / 'empty'} has 0 images")
    for name in ("0.png", "1.png"):
        (photos / "empty" / name).write_text("no image")
    refused(photos, f"{photos / 'empty' / '0.png'} cannot be read as an image")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (0.1, "the claim shows here"),
        (-0.1, "the claim did NOT show here, the opposite did"),
        (0.0, "the claim did NOT show here, the change is within two standard errors"),
    ],
)
def test_sentences_follow_from_the_numbers(change, verdict):
    generator = torch.Generator().manual_seed(0)
    coverage = 0.4 + 0.05 * torch.randn(100, generator=generator)
    changes = change + 0.02 * torch.randn(100, generator=generator).sort().values * torch.tensor(
        [1.0, -1.0]
    ).repeat(50)
    right = torch.arange(100) % 4 != 0

    def evaluation(covered):
        return findings.Evaluation(right.long(), right, right, covered, None, None)

    before, after = evaluation(coverage), evaluation(coverage + changes)
    told = findings.sentences("PCL", before, after, 2.5, {"reference": 3.0, "cpu": 1.0})
    assert told[1].startswith("Focus-area coverage went from ")
    assert told[1].endswith(f": {verdict}.")
    assert "Top-1 went from 75.0 % to 75.0 % (+0.0 ± 0.0 points): the claim did NOT show here" in told[2]
    assert told[-2].endswith("a step of PCL took 2.5 times as long.")
    assert told[-1].endswith("3.0 times the speed.")
