"""The examples: what the digit scenes promise, and a short run of the training script from end to end."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
pytest.importorskip(
    "torchmetrics", reason="the examples need scikit-learn, torchmetrics and more (camkernels[examples])"
)
digit_scenes = importlib.import_module("digit_scenes")
findings = importlib.import_module("findings")
hnc = importlib.import_module("hnc")
i2c = importlib.import_module("i2c")
pcl = importlib.import_module("pcl")
processes = importlib.import_module("processes")
training = importlib.import_module("training")
vac = importlib.import_module("vac")
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


@pytest.fixture(scope="module")
def multi_label():
    return digit_scenes.multi_label_scenes(40, 20, seed=3)


def test_several_classes_each_with_its_own_digits(multi_label):
    source_labels = digit_scenes.load_digits().target
    counts, repeats = set(), set()
    for part, images in zip(multi_label, (40, 20), strict=True):
        assert part.images.shape == (images, 3, SIZE, SIZE)
        assert part.labels.shape == (images, 10)
        assert part.labels.dtype == torch.int64
        assert part.classes == tuple("0123456789")
        for labels, boxes, written, sources in zip(
            part.labels, part.boxes, part.written, part.sources, strict=True
        ):
            instances, fragments = sources[: len(boxes)], sources[len(boxes) :]
            assert labels.nonzero().flatten().tolist() == sorted(set(written))
            assert tuple(int(source_labels[i]) for i in instances) == written
            assert len(set(instances)) == len(boxes)
            assert len(fragments) > 0
            assert not {int(source_labels[i]) for i in fragments} & set(written)
            counts.add(len(set(written)))
            repeats |= {written.count(label) for label in written}
    assert counts == {2, 3, 4}
    assert repeats == {1, 2}


def test_the_seed_decides_several_classes(multi_label):
    again = digit_scenes.multi_label_scenes(40, 20, seed=3)
    for one, two in zip(multi_label, again, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert (one.boxes, one.written, one.sources) == (two.boxes, two.written, two.sources)


def test_some_digits_are_mirrored(monkeypatch):
    drawn, given = [], digit_scenes.load_digits().images / 16
    draw = digit_scenes.draw_scene

    def spy(background, instances, *rest):
        drawn.extend(instances)
        return draw(background, instances, *rest)

    monkeypatch.setattr(digit_scenes, "draw_scene", spy)
    train, _ = digit_scenes.multi_label_scenes(20, 0, seed=0)
    used = [
        i for boxes, sources in zip(train.boxes, train.sources, strict=True) for i in sources[: len(boxes)]
    ]
    mirrored = [bool((digit == given[i][:, ::-1]).all()) for digit, i in zip(drawn, used, strict=True)]
    straight = [bool((digit == given[i]).all()) for digit, i in zip(drawn, used, strict=True)]
    assert all(a != b for a, b in zip(mirrored, straight, strict=True))
    assert 0.3 < sum(mirrored) / len(mirrored) < 0.7


def test_crops_hold_their_digit(multi_label):
    train, _ = multi_label
    crops = digit_scenes.digit_crops(train, 32)
    assert crops.images.shape == (sum(map(len, train.boxes)), 3, 32, 32)
    assert crops.labels.tolist() == [label for written in train.written for label in written]
    # Where the box lies well inside, the piece around its middle is the crop.
    number = 0
    for image, boxes in zip(train.images, train.boxes, strict=True):
        for left, top, right, bottom in boxes:
            x, y = (left + right) // 2 - 16, (top + bottom) // 2 - 16
            if 0 <= x <= SIZE - 32 and 0 <= y <= SIZE - 32:
                assert torch.equal(crops.images[number], image[:, y : y + 32, x : x + 32])
            number += 1


def test_one_large_digit_among_pieces_of_others():
    source_labels = digit_scenes.load_digits().target
    parts = digit_scenes.object_scenes(200, 50, 50, seed=3)
    used = [{i for sources in part.sources for i in sources} for part in parts]
    assert not used[0] & used[1]
    assert not used[0] & used[2]
    assert not used[1] & used[2]
    for part, images in zip(parts, (200, 50, 50), strict=True):
        assert part.images.shape == (images, 3, SIZE, SIZE)
        assert part.labels.bincount().tolist() == [images // 10] * 10
        truth = i2c.object_boxes(part)
        assert truth.shape == (images, 4)
        longest = (truth[:, 2:] - truth[:, :2]).amax(1)
        assert longest.min() >= 20
        assert longest.max() >= 40
        for label, boxes, sources in zip(part.labels.tolist(), part.boxes, part.sources, strict=True):
            assert len(boxes) == 1
            assert 3 <= len(sources) <= 5
            assert source_labels[sources[0]] == label
            assert label not in {int(source_labels[i]) for i in sources[1:]}


def test_pictures_of_digits_alone_are_of_training_digits():
    pictures = digit_scenes.object_pictures(60, seed=3)
    train, held_out, test = digit_scenes.object_scenes(400, 200, 200, seed=3)
    assert pictures.images.shape == (60, 3, 56, 56)
    assert pictures.labels.bincount().tolist() == [6] * 10
    assert all(len(sources) == 1 for sources in pictures.sources)
    used = {i for sources in pictures.sources for i in sources}
    assert used & {i for sources in train.sources for i in sources}
    for part in (held_out, test):
        assert not used & {i for sources in part.sources for i in sources}


@pytest.mark.parametrize("compose", [digit_scenes.digit_scenes, digit_scenes.multi_label_scenes])
def test_training_and_test_share_no_digit(compose):
    train, test = compose(400, 200, seed=0)
    used = [{i for sources in part.sources for i in sources} for part in (train, test)]
    assert used[0]
    assert used[1]
    assert not used[0] & used[1]


def test_boxes_lie_inside_and_apart(scenes, multi_label):
    for part in (*scenes, *multi_label):
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
        "op",
        "op_ms",
        "op_shapes",
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
    assert results["op"] == "fused_cam_erase"
    assert results["op_ms"]["reference"] > 0
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
    assert list(results["op_ms"]) == ["reference"]
    assert (output / "scenes.png").stat().st_size > 0


def test_vac_from_end_to_end(tmp_path, capsys):
    printed = run(capsys, *TINY, "--method", "vac", "--consistency", "0.5", "--output", str(tmp_path / "one"))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert list(results["runs"]) == ["baseline", "flipped", "vac_flip", "vac_flip_scale"]
    for measured in results["runs"].values():
        assert measured["title"] in printed
        assert measured["steps"] == 3
        assert measured["ms_per_step"] > 0
        for key in ("map", "macro_f1"):
            assert 0 <= measured[key] <= 1
        for name in ("flip", "scale"):
            assert measured[f"{name}_inconsistency"] > 0
            assert measured[f"{name}_inconsistency_of_variance"] > 0
    assert results["op"] == "fused_cam_transform_mse"
    assert results["op_ms"]["reference"] > 0
    assert results["settings"]["consistency"] == 0.5
    assert "mAP" in printed
    assert "inconsistency" in printed
    assert "paper's claims" in printed
    with Image.open(tmp_path / "one" / "scenes.png") as picture:
        assert picture.width <= 1700


I2C_KEYS = (
    "classification_top1",
    "classification_top5",
    "localization_top1",
    "localization_top5",
    "localization_gt_known",
    "box_threshold",
)
TINY_I2C = [*TINY, "--method", "i2c", "--held-out-scenes", "10", "--pictures", "20", "--plain-epochs", "1"]


def test_i2c_from_end_to_end(tmp_path, capsys):
    printed = run(capsys, *TINY_I2C, "--output", str(tmp_path / "one"))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert list(results["runs"]) == ["baseline", "sc", "sc_gc"]
    for title, measured in zip(("CE", "CE + SC", "CE + SC + GC"), results["runs"].values(), strict=True):
        assert measured["title"] == title
        assert title in printed
        assert measured["steps"] == 3
        assert measured["ms_per_step"] > 0
        for key in I2C_KEYS:
            assert 0 <= measured[key] <= 1
        assert measured["localization_top1"] >= measured["localization_top5"]
        assert measured["localization_top5"] >= measured["localization_gt_known"]
    assert results["op"] == "fused_cam_seeds"
    assert results["op_ms"]["reference"] > 0
    assert results["settings"]["stochastic"] == 0.008
    assert results["versions"]["processes"] == 1
    assert "GT-known" in printed
    assert "paper's claims" in printed
    with Image.open(tmp_path / "one" / "scenes.png") as picture:
        assert picture.width <= 1600

    run(capsys, *TINY_I2C, "--output", str(tmp_path / "two"))
    again = json.loads((tmp_path / "two" / "results.json").read_text())
    for first, second in zip(results["runs"].values(), again["runs"].values(), strict=True):
        del first["ms_per_step"], second["ms_per_step"]
        assert first == second


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_i2c_on_two_processes(tmp_path):
    """What torchrun starts: one set of tables and files, by the first process."""
    script = Path(train_digit_scenes.__file__)
    output = tmp_path / "demo"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), *TINY_I2C, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        # Threads that spin while they wait would take the cores from the other process.
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Errors on test images") == 1
    assert "2 processes" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert list(results["runs"]) == ["baseline", "sc", "sc_gc"]
    for measured in results["runs"].values():
        assert measured["steps"] == 3
        for key in I2C_KEYS:
            assert 0 <= measured[key] <= 1
    assert results["versions"]["processes"] == 2
    assert (output / "scenes.png").stat().st_size > 0


HNC_KEYS = ("score", "score_fgsm_2", "score_fgsm_4", "positive_share")


def test_hnc_from_end_to_end(tmp_path, capsys):
    """Two experiments: what each measured goes to a folder of its own."""
    options = ["--method", "hnc", "--digit-epochs", "1", "--negatives", "2", "--homogeneity", "0.5"]
    printed = run(capsys, *TINY, *options, "--output", str(tmp_path))
    names = {
        "single-label": [f"{x}{ending}" for ending in ("", "_20", "_40") for x in ("baseline", "hnc")],
        "multi-label": ["baseline", "hnc"],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for folder, expected in names.items():
        results = json.loads((tmp_path / folder / "results.json").read_text())
        assert list(results["runs"]) == expected
        for name, measured in results["runs"].items():
            assert measured["steps"] == 3
            assert measured["ms_per_step"] > 0
            for key in HNC_KEYS:
                attacked = "fgsm" in key
                if attacked and "_" in name:
                    assert measured[key] is None
                else:
                    assert 0 <= measured[key] <= 1
            share = measured["negative_peak"] / measured["positive_peak"]
            assert measured["peak_share"] == pytest.approx(share, rel=1e-5)
        for name in expected[1::2]:  # one start, one order of batches: only the loss differs
            assert results["runs"][name]["final_loss"] > results["runs"][f"baseline{name[3:]}"]["final_loss"]
        assert results["op"] == "fused_negative_cam_loss"
        assert results["op_ms"]["reference"] > 0
        assert results["settings"]["homogeneity"] == 0.5
        assert any("2 negatives and the weight 0.5" in sentence for sentence in results["findings"])
        with Image.open(tmp_path / folder / "scenes.png") as picture:
            assert picture.width <= 1700
    for words in (
        "top-1",
        "mAP",
        "FGSM, 4/255",
        "40 % random labels",
        "peak of negative CAMs",
        "paper's claims",
    ):
        assert words in printed


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return hnc.Network(10).eval()


@pytest.mark.parametrize("target", ["one class", "several"])
def test_fgsm(untrained, target):
    """Every value moves by the given grey levels, stays within 0 and 255, and the loss rises."""
    scenes, _ = (digit_scenes.digit_scenes if target == "one class" else digit_scenes.multi_label_scenes)(
        10, 0, seed=3
    )
    pixels = scenes.images.clone()
    pixels[0, :, :4] = 0
    pixels[0, :, 4:8] = 255
    standardise = training.Standardise(pixels, torch.device("cpu"))
    losses = [hnc.classification_loss(untrained(standardise(pixels)), scenes.labels)]
    clamped = torch.zeros((), dtype=torch.bool)
    for level, images in zip(
        (2, 4), hnc.fgsm(untrained, pixels, scenes.labels, standardise, (2, 4)), strict=True
    ):
        assert images.shape == pixels.shape
        assert images.amin() == 0
        assert images.amax() == 255
        moved = (images - pixels).abs()
        assert moved.amax() == level
        free = (pixels >= level) & (pixels <= 255 - level)
        assert (moved[free] == level).double().mean() > 0.99  # but where the gradient is 0
        clamped = clamped | (moved[~free] < level).any()
        losses.append(hnc.classification_loss(untrained(standardise(images)), scenes.labels))
    assert clamped
    assert losses[0] < losses[1] < losses[2]
    assert all(parameter.grad is None for parameter in untrained.parameters())


def test_fgsm_goes_up_the_gradient(untrained):
    """One value moved by hand tells which way is up."""
    scenes, _ = digit_scenes.digit_scenes(2, 0, seed=3)
    standardise = training.Standardise(scenes.images, torch.device("cpu"))
    (attacked,) = hnc.fgsm(untrained, scenes.images, scenes.labels, standardise, [1])
    network = untrained.double()
    place = (1, 2, 40, 50)

    def loss(change):
        values = scenes.images.double()
        values[place] += change
        standard = (values / 255 - standardise.mean) / standardise.deviation
        return hnc.classification_loss(network(standard), scenes.labels)

    rise = loss(0.01) - loss(-0.01)
    assert abs(rise) > 0
    assert attacked[place] - scenes.images[place] == rise.sign()


def test_random_labels():
    labels = torch.arange(10).repeat(200)
    given = labels.clone()
    changed = hnc.randomised(labels, 40, 10, seed=0)
    assert torch.equal(labels, given)
    # 800 are drawn anew, a tenth of them the true class: 720, with a deviation of 8.5.
    wrong = changed != labels
    assert 680 < wrong.sum() < 760
    counts = changed[wrong].bincount(minlength=10)
    assert counts.min() > 40
    assert counts.max() < 110
    assert torch.equal(hnc.randomised(labels, 40, 10, seed=0), changed)
    assert not torch.equal(hnc.randomised(labels, 40, 10, seed=1), changed)
    assert 330 < (hnc.randomised(labels, 20, 10, seed=0) != labels).sum() < 390


def test_hnc_and_its_baseline_learn_the_same_random_labels(scenes):
    train, _ = scenes
    experiment = hnc.SingleLabelHnc(train_digit_scenes.parse(["--method", "hnc"]))
    methods = experiment.methods(train)
    labels = {name: experiment.stage(method, train).scenes.labels for name, method in methods.items()}
    assert torch.equal(labels["baseline"], train.labels)
    assert torch.equal(labels["hnc"], train.labels)
    for percentage, least in ((20, 3), (40, 8)):
        noisy = labels[f"baseline_{percentage}"]
        assert torch.equal(noisy, labels[f"hnc_{percentage}"])
        assert least <= (noisy != train.labels).sum() <= percentage * 40 / 100
    assert [method.criterion is None for method in methods.values()] == [True, False] * 3
    for method in list(methods.values())[1::2]:
        assert method.criterion.weight == experiment.options.homogeneity


@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize("several", [False, True])
def test_the_loss_of_hnc(untrained, kind, several):
    """Cross-entropy, plus half the loss of the two likeliest classes that are not there, map by map."""
    images = torch.randn(3, 3, SIZE, SIZE)
    target = torch.tensor([3, 0, 7])
    if several:
        target = torch.nn.functional.one_hot(target, 10)
        target[0, 5] = 1
    options = ["--method", "hnc", "--negatives", "2", "--homogeneity", "0.5", "--kind", kind]
    experiment = (hnc.MultiLabelHnc if several else hnc.SingleLabelHnc)(train_digit_scenes.parse(options))
    methods = experiment.methods(digit_scenes.Scenes(images, target, tuple("0123456789")))
    logits = untrained(images)
    if several:
        probability = logits.sigmoid()
        plain = -torch.where(target > 0, probability, 1 - probability).log().mean()
    else:
        plain = -logits.softmax(1)[range(3), target].log().mean()
    torch.testing.assert_close(methods["baseline"].loss(untrained, images, target), plain)

    features, classifier = untrained.activations(images).last, untrained.classifier
    total = 0
    for image in range(3):
        present = target[image].nonzero().flatten().tolist() if several else [target[image].item()]
        likeliest = [k for k in logits[image].argsort(descending=True).tolist() if k not in present][:2]
        for k in likeliest:
            raw = (features[image] * classifier.weight[k][:, None, None]).sum(0) + classifier.bias[k]
            if kind == "mse":
                total += raw.square().mean() / (2 * 3)
            else:
                total += -(36 * raw.flatten().softmax(0)).log().mean() / 3
    torch.testing.assert_close(methods["hnc"].loss(untrained, images, target), plain + 0.5 * total)


def test_what_hnc_measures(untrained, scenes):
    """The evaluation of a network against maps made class by class."""
    _, test = scenes
    standardise = training.Standardise(test.images, torch.device("cpu"))
    experiment = hnc.SingleLabelHnc(train_digit_scenes.parse(["--method", "hnc", "--negatives", "9"]))
    method = experiment.methods(test)["hnc"]
    evaluation = experiment.evaluate(untrained, method, test, standardise)
    with torch.no_grad():
        features, classifier = untrained.activations(standardise(test.images)).last, untrained.classifier
        maps = torch.einsum("nchw,lc->nlhw", features, classifier.weight) + classifier.bias[:, None, None]
        logits = untrained(standardise(test.images))
    torch.testing.assert_close(evaluation.peaks, maps.amax((2, 3)))
    torch.testing.assert_close(evaluation.logits, logits)
    others = torch.arange(10) != test.labels[:, None]
    assert evaluation.positive_share == pytest.approx((maps[others] > 0).double().mean().item(), abs=1e-3)
    images = hnc.fgsm(untrained, test.images, test.labels, standardise, (2, 4))
    with torch.no_grad():
        for level, attacked in zip((2, 4), images, strict=True):
            torch.testing.assert_close(evaluation.attacked[level], untrained(standardise(attacked)))
    assert method.criterion.positive_share is None  # that of training is another


def test_paired_batches():
    """Class 2 has an odd number of images, class 3 more than the others, class 4 one only."""
    labels = torch.tensor([0] * 8 + [1] * 8 + [2] * 9 + [3] * 12 + [4])[torch.randperm(38)]
    batches = training.paired_batches(labels, 17, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [16, 16, 4]
    order = torch.cat(list(batches))
    assert len(order.unique()) == 36
    classes = labels[order].view(-1, 2)
    assert torch.equal(classes[:, 0], classes[:, 1])
    assert classes[:, 0].bincount().tolist() == [4, 4, 4, 6]
    for first in range(0, 16, 4):  # as long as all have some left, each comes once a turn
        assert sorted(classes[first : first + 4, 0].tolist()) == [0, 1, 2, 3]
    again = training.paired_batches(labels, 17, torch.Generator().manual_seed(0))
    assert torch.equal(order, torch.cat(list(again)))
    other = training.paired_batches(labels, 17, torch.Generator().manual_seed(1))
    assert not torch.equal(order, torch.cat(list(other)))


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (5, 1, [[0, 1, 2, 3, 4]]),
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (7, 2, [[0, 1], [2, 3]]),
        (9, 3, [[0, 1], [2, 3], [4, 5]]),
        (3, 2, [[], []]),
    ],
)
def test_processes_share_batches_evenly_and_keep_pairs(length, size, expected, monkeypatch):
    shares = []
    for rank in range(size):
        monkeypatch.setattr(processes, "world", lambda rank=rank: processes.World(rank, size))
        shares.append(processes.own_share(torch.arange(length)).tolist())
    assert shares == expected


def test_each_method_has_a_folder_of_its_own():
    methods = ("pcl", "vac", "i2c", "hnc")
    folders = [train_digit_scenes.parse(["--method", method]).output.name for method in methods]
    assert folders == ["demo", "demo-vac", "demo-i2c", "demo-hnc"]


@pytest.mark.parametrize(("preset", "power"), [("paper", 2), ("official", 1)])
def test_the_loss_of_i2c(preset, power):
    """Eq. 6 with seeds of one draw: cross-entropy, 0.25 SC, 0.5 GC; distances squared or plain."""
    torch.manual_seed(0)
    weights = ["--stochastic", "0.25", "--global", "0.5", "--preset", preset]
    options = train_digit_scenes.parse(["--method", "i2c", "--seeds", "4", "--threshold", "0.6", *weights])
    experiment = i2c.I2cExperiment(options)
    network = experiment.network(10).eval()
    images, target = torch.randn(4, 3, SIZE, SIZE), torch.tensor([3, 3, 7, 7])
    features = network.activations(images).last
    assert features.shape == (4, i2c.LAST_WIDTH, 12, 12)
    scenes = digit_scenes.Scenes(images, target, tuple("0123456789"))
    methods = experiment.methods(scenes)
    centres = methods["sc_gc"].global_.centres.clone()

    torch.manual_seed(1)
    vectors = i2c.fused_cam_seeds(features, network.classifier.weight, target, 4, threshold=0.6).vectors
    cross_entropy = torch.nn.functional.cross_entropy(network(images), target)
    stochastic = (vectors[0::2] - vectors[1::2]).norm(dim=2).pow(power).mean()
    means = vectors.view(2, 8, -1).mean(1)
    global_ = (means - centres[[3, 7]]).norm(dim=1).pow(power).mean()
    expected = {
        "baseline": cross_entropy,
        "sc": cross_entropy + 0.25 * stochastic,
        "sc_gc": cross_entropy + 0.25 * stochastic + 0.5 * global_,
    }
    for name, method in methods.items():
        torch.manual_seed(1)
        torch.testing.assert_close(method.loss(network, images, target), expected[name])


def test_the_loss_of_vac():
    """Cross-entropy over all versions, plus eq. 5 and 7; without a factor, the cross-entropy alone."""
    torch.manual_seed(0)
    network = vac.Network(10).eval()
    images, target = torch.randn(2, 3, SIZE, SIZE), torch.randint(2, (2, 10))
    ratio = torch.full((10,), 0.3)
    versions = [images, images.flip(-1), vac.SCALE(images)]
    cross_entropy = torch.stack(
        [vac.WeightedBCEWithLogits(ratio)(network(version), target) for version in versions]
    ).mean()
    of_flip, of_scale = (
        vac.fused_cam_transform_mse(
            network.activations(images).last,
            network.activations(version).last,
            network.classifier.weight,
            transform,
        )
        for version, transform in zip(versions[1:], (vac.FLIP, vac.SCALE), strict=True)
    )
    transforms = [vac.FLIP, vac.SCALE]
    alone = vac.MultiLabel("", ratio, transforms).loss(network, images, target)
    both = vac.MultiLabel("", ratio, transforms, factor=0.5).loss(network, images, target)
    torch.testing.assert_close(alone, cross_entropy)
    torch.testing.assert_close(both, cross_entropy + 0.5 * (of_flip + of_scale))


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
        (["--method", "vac", "--consistency", "0"], "--consistency: 0.0 is not above 0"),
        (["--method", "vac", "--threshold", "0.5"], "unrecognized arguments: --threshold"),
        (["--consistency", "1"], "unrecognized arguments: --consistency"),
        (["--method", "vac", "--data", "."], "--data: a folder gives each image one class"),
        (["--method", "i2c", "--data", "."], "--data: a folder has no boxes"),
        (["--method", "i2c", "--seeds", "0"], "--seeds: 0 is not at least 1"),
        (["--method", "i2c", "--pictures", "19"], "--pictures: 19 is not at least 20"),
        (["--method", "i2c", "--decay", "1"], "--decay: 1.0 is not between 0 and 1"),
        (["--method", "i2c", "--stochastic", "-1"], "--stochastic: -1.0 is not above 0"),
        (["--method", "i2c", "--train-scenes", "19"], "--train-scenes: 19 is not at least 20"),
        (["--method", "hnc", "--data", "."], "--data: digits are cut from the scenes"),
        (["--method", "hnc", "--negatives", "0"], "--negatives: 0 is not at least 1"),
        (["--method", "hnc", "--homogeneity", "0"], "--homogeneity: 0.0 is not above 0"),
        (["--method", "hnc", "--kind", "kl"], "--kind: invalid choice: 'kl'"),
        (["--global", "1"], "unrecognized arguments: --global"),
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


VERDICTS = [
    (0.1, "the claim shows here"),
    (-0.1, "the claim did NOT show here, the opposite did"),
    (0.0, "the claim did NOT show here, the change is within two standard errors"),
]


def around(change: float) -> torch.Tensor:
    """100 numbers with that mean, somewhat spread."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(50, generator=generator)
    return change + torch.cat([noise, -noise])


@pytest.mark.parametrize(("change", "verdict"), VERDICTS)
def test_sentences_of_pcl_follow_from_the_numbers(change, verdict):
    coverage = 0.4 + around(0)
    right = torch.arange(100) % 4 != 0

    def evaluation(covered):
        return pcl.PclEvaluation(right.long(), right, right, covered, None, None)

    evaluations = {"baseline": evaluation(coverage), "pcl": evaluation(coverage + around(change))}
    told = pcl.PclExperiment(None).sentences(evaluations, {"baseline": 2.0, "pcl": 5.0})
    assert told[1].startswith("Focus-area coverage went from ")
    assert told[1].endswith(f": {verdict}.")
    assert "Top-1 went from 75.0 % to 75.0 % (+0.0 ± 0.0 points): the claim did NOT show here" in told[2]
    assert told[-1].endswith("a step of PCL took 2.5 times as long.")


@pytest.mark.parametrize(("change", "verdict"), VERDICTS)
def test_sentences_of_vac_follow_from_the_numbers(change, verdict):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(2, (100, 3), generator=generator)
    noise = torch.randn(100, 3, generator=generator)

    def evaluation(sharpness, inconsistency):
        logits = noise + sharpness * (2 * target - 1)
        return vac.VacEvaluation(
            logits.sigmoid(), target, {"flip": inconsistency, "scale": inconsistency}, variance=2.0
        )

    before = 0.5 + around(0)
    sharpness = {0.1: 2.0, 0.0: 1.0, -0.1: 0.0}[change]
    evaluations = {
        "baseline": evaluation(1.0, before),
        "flipped": evaluation(1.0, before),
        "vac_flip": evaluation(sharpness, before),
        "vac_flip_scale": evaluation(1.0, before - around(change)),
    }
    step_ms = {"baseline": 10.0, "flipped": 20.0, "vac_flip": 21.0, "vac_flip_scale": 30.0}
    options = train_digit_scenes.parse(["--method", "vac", "--consistency", "0.25"])
    told = vac.VacExperiment(options).sentences(evaluations, step_ms)
    assert told[1].startswith("mAP, VAC with flip against the baseline: from ")
    assert told[1].endswith(f": {verdict}.")
    assert told[2].startswith("mAP, VAC with flip against training on flipped images: from ")
    assert told[2].endswith(f": {verdict}.")
    assert told[3].endswith("the claim did NOT show here, the change is within two standard errors.")
    assert told[4].startswith(
        "Inconsistency under flip, VAC with flip and scale against the baseline: from 0.50 to"
    )
    assert told[4].endswith(f": {verdict}.")
    assert "took 2.0, 2.1, 3.0 times as long" in told[-2]
    assert told[-1] == "Lambda was 0.25; the paper's is 1."


def localised(right: torch.Tensor, classified: torch.Tensor) -> "i2c.I2cEvaluation":
    """Boxes and classes that are right where asked for."""
    truth = torch.tensor([[0, 0, 8, 8]]).expand(len(right), 4)
    boxes = torch.where(right[:, None], truth, torch.tensor([40, 40, 48, 48]))
    target = torch.zeros(len(right), dtype=torch.int64)
    logits = torch.stack([classified.float(), torch.full((len(right),), 0.5)], 1)
    return i2c.I2cEvaluation(logits, torch.zeros(len(right), 2, 2), target, boxes, truth, threshold=0.35)


def test_summary_of_i2c():
    right, classified = torch.tensor([True, True, True, False]), torch.tensor([True, False, False, False])
    assert localised(right, classified).summary() == {
        "classification_top1": 0.75,
        "classification_top5": 0,
        "localization_top1": 0.75,
        "localization_top5": 0.25,
        "localization_gt_known": 0.25,
        "box_threshold": 0.35,
    }


@pytest.mark.parametrize(("change", "verdict"), VERDICTS)
def test_sentences_of_i2c_follow_from_the_numbers(change, verdict):
    """SC localises as many more or fewer images as ``change`` says; GC on top changes nothing."""
    number = torch.arange(100)
    before, after = number < 50, number < 50 + round(100 * change)
    all_classified = torch.ones(100, dtype=torch.bool)
    evaluations = {
        "baseline": localised(before, all_classified),
        "sc": localised(after, all_classified),
        "sc_gc": localised(after, all_classified),
    }
    options = train_digit_scenes.parse(["--method", "i2c"])
    step_ms = {"baseline": 10.0, "sc": 11.0, "sc_gc": 12.0}
    told = i2c.I2cExperiment(options).sentences(evaluations, step_ms)
    to = f"{50 - 100 * change:.1f} % ({0 - 100 * change:+.1f} ± "
    assert told[1].startswith(f"CE + SC against CE: GT-known error from 50.0 % to {to}")
    assert told[1].count(verdict) == 2
    assert told[2].startswith("CE + SC + GC against CE: GT-known error from 50.0 %")
    assert told[3].count("the claim did NOT show here, the change is within two standard errors") == 2
    assert "300 held-out scenes: 0.35, 0.35, 0.35" in told[-3]
    assert told[-2] == "Weights were 0.008 and 0.001, distances plain, as in the released code."
    assert "took 1.10 and 1.20 times as long" in told[-1]


def test_the_error_of_resampled_images():
    """Of a mean it is near the standard error in closed form."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    error = findings.resampled_error(lambda images: values[images].mean().item(), 400)
    assert error == pytest.approx(values.std().item() / 20, rel=0.2)
    assert findings.resampled_error(lambda images: 3.0, 400) == 0


def hnc_evaluation(right, negative):
    """Images of class 0 of three, classified ``right`` or not, under the stronger attack never; a positive
    peak of 4."""
    logits = torch.stack([right.float(), torch.full((len(right),), 0.5), torch.zeros(len(right))], 1)
    peaks = torch.stack([torch.full((len(right),), 4.0), negative + 1, negative - 1], 1)
    target = torch.zeros(len(right), dtype=torch.int64)
    return hnc.HncEvaluation(target, logits, peaks, 0.25, {2: logits, 4: logits.roll(1, 1)})


def test_summary_of_hnc():
    right = torch.tensor([True, True, True, False])
    measured = hnc_evaluation(right, torch.tensor([1.0, 2.0, 3.0, 4.0])).summary()
    assert measured == {
        "score": 0.75,
        "score_fgsm_2": 0.75,
        "score_fgsm_4": 0,
        "negative_peak": 2.5,
        "positive_peak": 4.0,
        "peak_share": 0.625,
        "positive_share": 0.25,
    }


def test_summary_of_hnc_with_several_classes():
    """Images have different numbers of classes, and each image counts the same."""
    logits = torch.tensor([[0.9, 0.8, 0.1], [0.8, 0.7, 0.2], [0.7, 0.1, 0.3], [0.2, 0.3, 0.4]])
    target = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0]])
    peaks = torch.tensor([[6.0, 1, 3], [5, 2, 4], [3, 0, 2], [1, 3, 1]])
    measured = hnc.HncEvaluation(target, logits, peaks, 0.25, {}).summary()
    assert measured["negative_peak"] == (2 + 5 + 1 + 1) / 4
    assert measured["positive_peak"] == (6 + 3 + 3 + 3) / 4
    assert measured["peak_share"] == pytest.approx(9 / 15)
    # Label 0 ranks its two images first and third, label 1 its two second and third, label 2 its one third.
    assert measured["score"] == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2 + 1 / 3) / 3)
    assert measured["score_fgsm_2"] is None


@pytest.mark.parametrize(("change", "verdict"), VERDICTS)
def test_sentences_of_hnc_follow_from_the_numbers(change, verdict):
    """Scores rise and peaks fall by as much as ``change`` says, after 40 % random labels the other way round,
    after 20 % not at all."""
    number, peaks = torch.arange(100), 2 + around(0)
    right, other, opposite = (number < 50 + round(100 * x) for x in (0, change, -change))
    before, after = hnc_evaluation(right, peaks), hnc_evaluation(other, peaks - around(change))
    evaluations = {
        "baseline": before,
        "hnc": after,
        "baseline_20": before,
        "hnc_20": before,
        "baseline_40": before,
        "hnc_40": hnc_evaluation(opposite, peaks),
    }
    experiment = hnc.SingleLabelHnc(train_digit_scenes.parse(["--method", "hnc", "--homogeneity", "0.25"]))
    step_ms = dict.fromkeys(evaluations, 10.0) | {"hnc": 11.0}
    told = experiment.sentences(evaluations, step_ms)
    to = f"{50 + 100 * change:.1f} % ({0 + 100 * change:+.1f} ± "
    assert told[1].startswith(
        f"Mean peak of negative CAMs: from 2.00 to {2 - change:.2f} ({0 - change:+.2f} ± "
    )
    assert told[1].endswith(f": {verdict}.")
    assert told[2].startswith(
        "Mean peak of positive CAMs: from 4.00 to 4.00. The negative ones in % of it: from 50.0 to "
    )
    assert told[2].endswith(f", {'beyond' if change else 'within'} two standard errors).")
    for sentence, start in zip(told[3:5], ("top-1", "top-1 under FGSM of 2/255"), strict=True):
        assert sentence.startswith(f"{start}: from 50.0 % to {to}")
        assert sentence.endswith(f": {verdict}.")
    assert told[5].startswith("top-1 under FGSM of 4/255: from 0.0 % to 0.0 %")
    assert told[6].startswith("top-1 after 20 % random labels: from 50.0 % to 50.0 %")
    assert told[6].endswith("the claim did NOT show here, the change is within two standard errors.")
    assert told[7].startswith("top-1 after 40 % random labels: ")
    against = {0.1: VERDICTS[1][1], -0.1: VERDICTS[0][1], 0.0: VERDICTS[2][1]}[change]
    assert told[7].endswith(f": {against}.")
    assert told[8].startswith("Guessing would come to 33.3 %")
    assert "the weight 0.25" in told[-2]
    assert told[-1].endswith("a step with HNC took 1.10 times as long as one without.")


def test_chance_of_several_labels_is_how_common_they_are():
    """Of the labels that some image has."""
    target = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert hnc.chance(target, 3) == (2 / 4 + 1 / 4) / 2
    assert hnc.chance(torch.tensor([0, 2]), 4) == 0.25


def test_summary_of_vac():
    """Average precision by hand: label 0 ranks its two images first and third, label 1 ranks its one second;
    nobody has label 2."""
    probability = torch.tensor([[0.9, 0.8, 0.1], [0.8, 0.7, 0.2], [0.7, 0.1, 0.3], [0.2, 0.3, 0.4]])
    target = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    inconsistency = {"flip": torch.tensor([1.0, 2, 3, 4]), "scale": torch.full((4,), 0.5)}
    summary = vac.VacEvaluation(probability, target, inconsistency, variance=10.0).summary()
    assert summary["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    # F1 at 0.5: label 0 is told three times, twice rightly; label 1 twice, once rightly; label 2 never.
    assert summary["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    assert summary["flip_inconsistency"] == 2.5
    assert summary["scale_inconsistency_of_variance"] == pytest.approx(0.05)


def test_the_sentence_on_speed():
    told = train_digit_scenes.op_sentence("fused_cam_erase", {"reference": 3.0, "cpu": 1.0})
    assert told.startswith("One fused_cam_erase took 3.00 ms in eager PyTorch and 1.00 ms on the cpu backend")
    assert told.endswith("3.0 times the speed.")
    alone = train_digit_scenes.op_sentence("fused_cam_erase", {"reference": 3.0})
    assert alone.endswith("no fused backend was measured here.")
