"""``--method dla``: its scenes, what its scales see, its loss, its numbers, a short run from end to end."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
pytest.importorskip(
    "torchmetrics", reason="the examples need scikit-learn, torchmetrics and more (camkernels[examples])"
)
digit_scenes = importlib.import_module("digit_scenes")
dla = importlib.import_module("dla")
network = importlib.import_module("network")
training = importlib.import_module("training")
train_digit_scenes = importlib.import_module("train_digit_scenes")

SIZE = digit_scenes.SIZE
SHOWS = "the claim shows here"
OPPOSITE = "the claim did NOT show here, the opposite did"
WITHIN = "the claim did NOT show here, the change is within two standard errors"
WHOLE = [0.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def scenes():
    return digit_scenes.fine_grained_scenes(80, 40, seed=3)


def test_scenes_have_one_small_digit_in_bold_or_thin_strokes(scenes):
    source_labels = digit_scenes.load_digits().target
    names = tuple(f"{digit} {stroke}" for stroke in ("bold", "thin") for digit in range(10))
    for part, count in zip(scenes, (80, 40), strict=True):
        assert part.images.shape == (count, 3, 2 * SIZE, 2 * SIZE)
        assert part.classes == names
        assert part.labels.bincount().tolist() == [count // 20] * 20
        truth = dla.true_boxes(part)
        assert truth.shape == (count, 4)
        assert ((truth >= 0) & (truth <= 1)).all()
        longest = (truth[:, 2:] - truth[:, :2]).amax(1)
        assert 0.2 < longest.min() < longest.max() < 0.6
        for label, written, sources in zip(part.labels.tolist(), part.written, part.sources, strict=True):
            assert written == (label,)
            assert source_labels[sources[0]] == label % 10
            assert len(sources) > 1  # clutter
    pictures = digit_scenes.fine_grained_pictures(40, seed=3)
    assert pictures.classes == names
    assert all(len(sources) == 1 for sources in pictures.sources)
    # A digit stays on one side in all its strokes.
    train, test, of_pictures = ({i for row in part.sources for i in row} for part in (*scenes, pictures))
    assert not test & (train | of_pictures)


def test_a_digit_has_more_ink_in_bold_strokes():
    given = digit_scenes._digits()
    count = 30
    few = given._replace(
        pixels=given.pixels[:count], labels=given.labels[:count], sources=given.sources[:count]
    )
    drawn = digit_scenes._in_strokes(few)
    bold, thin = drawn.pixels[:count], drawn.pixels[count:]
    assert (bold >= thin).all()
    assert (bold.sum((1, 2)) > 1.15 * thin.sum((1, 2))).all()
    assert (drawn.labels[count:] == drawn.labels[:count] + 10).all()
    assert (drawn.sources[count:] == drawn.sources[:count]).all()


def test_what_a_scale_sees(scenes):
    """The whole scene at half its resolution, then the attended box of it at its full one."""
    part = scenes[1]
    first = dla.View(part, dla.whole(part.images), torch.device("cpu")).first(5)
    seen = first.seen()
    assert seen.images.shape == (5, 3, SIZE, SIZE)
    assert seen.images.dtype == torch.uint8
    halved = F.avg_pool2d(part.images[:5].float(), 2)
    torch.testing.assert_close(seen.images.float(), halved, atol=0.5, rtol=0)  # rounded
    assert torch.equal(seen.labels, part.labels[:5])

    mask = torch.zeros(5, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 4:8] = True
    boxes = first.attended(mask)
    assert boxes.tolist() == [[0.5, 0.25, 1.0, 0.75]] * 5
    assert torch.equal(first.closer(mask).boxes, dla.squared(boxes))
    second = replace(first, boxes=boxes)
    assert torch.equal(second.seen().images, part.images[:5, :, 48:144, 96:])
    mask = torch.zeros(5, 8, 8, dtype=torch.bool)
    mask[:, 0:4, 2:4] = True
    assert second.attended(mask).tolist() == [[0.625, 0.25, 0.75, 0.5]] * 5


def test_boxes_in_boxes():
    outer = torch.tensor([[0.5, 0.25, 1.0, 0.75], WHOLE])
    inner = torch.tensor([[0.5, 0.0, 1.0, 0.5], [0.25, 0.5, 0.75, 1.0]])
    whole = dla.inside(outer, inner)
    assert whole.tolist() == [[0.75, 0.25, 1.0, 0.5], [0.25, 0.5, 0.75, 1.0]]
    assert torch.equal(dla.within(outer, whole), inner)
    assert dla.within(outer[:1], torch.tensor([[0.0, 0.0, 0.75, 1.0]])).tolist() == [[0.0, 0.0, 0.5, 1.0]]
    boxes = torch.tensor(
        [[0.25, 0.25, 0.5, 0.75], [0.0, 0.5, 0.25, 0.6], [0.0, 0.0, 1.0, 0.5], [0.8, 0.2, 1.0, 0.4]]
    )
    margin = dla.MARGIN
    expected = [
        [0.125 - margin / 2, 0.25 - margin / 2, 0.625 + margin / 2, 0.75 + margin / 2],
        [0.0, 0.425 - margin / 4, 0.25 * (1 + 2 * margin), 0.675 + margin / 4],
        WHOLE,
        [1 - 0.2 * (1 + 2 * margin), 0.2 - margin / 5, 1.0, 0.4 + margin / 5],
    ]
    torch.testing.assert_close(dla.squared(boxes), torch.tensor(expected))
    assert dla.in_pixels(inner[:1]) == [(SIZE // 2, 0, SIZE, SIZE // 2)]


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return network.Network(4, dla.LAST_WIDTH, last_stride=1).eval()


@pytest.mark.parametrize(("local", "of_object"), [(1.0, 1.0), (0.5, 0.0), (0.0, 2.0)])
def test_the_loss_and_the_predictions(untrained, local, of_object):
    """Eq. 1-6 and §4.4.3 with a loop over images."""
    classifiers, classifier = dla.LocalClassifiers(3, 4), torch.nn.Linear(dla.LAST_WIDTH, 4)
    torch.nn.init.normal_(classifiers.bias)
    method = dla.ClassifierActivations(
        "", classifiers, classifier, local_factor=local, object_factor=of_object
    )
    images, target = torch.randn(3, 3, 48, 48), torch.tensor([2, 0, 3])
    told = method.predict(untrained, images)
    features = untrained.activations(images).last  # [3, C, 6, 6]
    losses = []
    for i in range(3):
        pixels = features[i].flatten(1).T  # [36, C]
        volume = torch.stack([pixels @ w.T + b for w, b in zip(*classifiers.parameters(), strict=True)])
        activations = volume.amax(0)  # [36, 5]
        attention = activations[:, :4].amax(1)
        torch.testing.assert_close(told.attention[i].flatten(), attention)
        mask = told.mask[i].flatten()
        assert 0 < mask.sum() < 36
        assert attention[mask].min() > attention[~mask].max()
        log_p, w = activations.log_softmax(1), mask.float().mean()
        of_pixels = -((1 - w) * log_p[mask, target[i]].sum() + w * log_p[~mask, 4].sum()) / 36
        logits = classifier((pixels * mask[:, None]).amax(0))
        losses.append(local * of_pixels - of_object * logits.log_softmax(0)[target[i]])
        averaged = []
        for factor, given, expected in (
            (local, told.local, activations[:, :4].mean(0)),
            (of_object, told.of_object, logits),
        ):
            assert (given is None) == (factor == 0)
            if given is not None:
                torch.testing.assert_close(given[i], expected.softmax(0))
                averaged.append(given[i])
        torch.testing.assert_close(told.averaged()[i], sum(averaged) / len(averaged))
    torch.testing.assert_close(method.loss(untrained, images, target), torch.stack(losses).mean())


def test_the_baseline_pools_the_whole_image(untrained):
    method = dla.MaxPooling("", torch.nn.Linear(dla.LAST_WIDTH, 4))
    images, target = torch.randn(2, 3, 48, 48), torch.tensor([2, 0])
    logits = method.classifier(untrained.activations(images).last.amax((2, 3)))
    torch.testing.assert_close(method.loss(untrained, images, target), F.cross_entropy(logits, target))
    told = method.predict(untrained, images)
    torch.testing.assert_close(told.averaged(), logits.softmax(1))
    assert told.local is None


def says(right: torch.Tensor, confidence: float = 0.9) -> torch.Tensor:
    """[N, 2] probabilities for images that are all of class 1."""
    of_one = torch.where(right, confidence, 1 - confidence)
    return torch.stack([1 - of_one, of_one], 1)


def evaluation(*scales, boxes=None):
    count = len(scales[0].of_object if scales[0].local is None else scales[0].local)
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).expand(count, 4)
    boxes = None if boxes is None else torch.tensor([boxes]).expand(count, 4)
    return dla.DlaEvaluation(torch.ones(count, dtype=torch.int64), scales, boxes, truth)


def test_summary():
    """The first scale is right of two images of four, the second of three; where they disagree the surer one
    is heard."""
    first = dla.Predictions(
        says(torch.tensor([True, False, False, False]), 0.6), says(torch.tensor([1, 1, 0, 0]) > 0)
    )
    second = dla.Predictions(
        says(torch.tensor([False, True, False, True]), 0.95), says(torch.tensor([1, 1, 0, 1]) > 0, 0.7)
    )
    assert evaluation(first, second, boxes=[0.0, 0.0, 0.5, 1.0]).summary() == {
        "local": 0.5,
        "object": 0.75,
        "averaged": 0.5,  # the local classifiers are surer
        "local_over_scales": 0.5,
        "object_over_scales": 0.5,
        "averaged_over_scales": 0.75,
        "iou": 0.5,
    }
    assert evaluation(first).summary()["averaged"] == 0.5
    alone = evaluation(dla.Predictions(None, first.of_object)).summary()
    assert alone["local"] is None
    assert alone["iou"] is None
    assert alone["object"] == alone["averaged"] == 0.5


@pytest.mark.parametrize(
    ("change", "verdict", "opposite"),
    [(10, SHOWS, OPPOSITE), (-10, OPPOSITE, SHOWS), (0, WITHIN, WITHIN)],
)
def test_sentences_follow_from_the_numbers(change, verdict, opposite):
    """Half of 100 images are right; the second scale's local classifiers have ``change`` more or fewer, and
    are surer than all others."""
    number = torch.arange(100)
    before, after = number < 50, says(number < 50 + change, 0.99)
    first = dla.Predictions(says(before, 0.55), says(before, 0.55))
    second = dla.Predictions(after, says(before, 0.6))
    evaluations = {
        "baseline": evaluation(dla.Predictions(None, first.of_object)),
        "longer": evaluation(dla.Predictions(None, first.of_object)),
        "scale_1": evaluation(first, boxes=WHOLE),
        "scale_2": evaluation(first, second, boxes=WHOLE),
        "local_only": evaluation(dla.Predictions(after, None), boxes=WHOLE),
        "object_only": evaluation(dla.Predictions(None, first.of_object), boxes=WHOLE),
    }
    options = train_digit_scenes.parse(["--method", "dla"])
    told = dla.DlaExperiment(options).sentences(evaluations, {"baseline": 10.0, "scale_1": 12.5})
    same = "from 50.0 % to 50.0 % (+0.0 ± 0 points): the claim did NOT show here, the change is within"
    changed = f"from 50.0 % to {50 + change:.1f} % ({change:+.1f} ± "
    for sentence, start, ending in (
        (told[1], f"Scale 1 against max-pooling: {same}", ""),
        (told[2], f"All scales against max-pooling trained for as long as they: {changed}", verdict),
        (
            told[3],
            "All scales, an average of 2 networks, against scale 2, one that trained for as long: "
            f"from {50 + change:.1f} % to {50 + change:.1f} %",
            "errors",
        ),
        (
            told[4],
            f"Scale 1 alone comes to 50.0 % and all scales to {50 + change:.1f} %, after 2 times its",
            "max-pooling went from 50.0 % to 50.0 %",
        ),
        (told[5], f"Scale 1, averaged against the object's: {same}", ""),
        (told[6], f"Scale 2, averaged against the object's: {changed}", verdict),
        (
            told[7],
            f"Scale 1 with both losses against the local loss only: from {50 + change:.1f} %",
            opposite,
        ),
        (told[8], f"Scale 1 with both losses against the object loss only: {same}", ""),
    ):
        assert sentence.startswith(start)
        assert ending in sentence
    assert "mean IoU of 0.25; the whole image would have 0.25. The paper has 0.54" in told[9]
    assert "over 100 test images" in told[10]
    assert told[-1].endswith("took 1.25 times as long as the baseline's.")


TINY = ["--train-scenes", "24", "--test-scenes", "12", "--epochs", "1", "--batch-size", "8", "--repeats", "1"]
TINY_DLA = [*TINY, "--method", "dla", "--pictures", "20", "--picture-epochs", "1", "--classifiers", "3"]


def test_from_end_to_end(tmp_path, capsys):
    """Three scales, so that one is neither the first nor the last."""
    train_digit_scenes.main([*TINY_DLA, "--scales", "3", "--local", "0.5", "--output", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())  # lines are broken where the screen ends
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["runs"]
    assert list(runs) == ["baseline", "longer", "scale_1", "scale_2", "scale_3", "local_only", "object_only"]
    untold = {name: ["local", "iou"] for name in ("baseline", "longer")}
    untold |= {"local_only": ["object"], "object_only": ["local"]}
    for name, measured in runs.items():
        assert measured["steps"] == (6 if name == "longer" else 3)
        assert measured["ms_per_step"] > 0
        for key in ("local", "object", "averaged", "averaged_over_scales", "iou"):
            assert (measured[key] is None) == (key in untold.get(name, []))
            assert measured[key] is None or 0 <= measured[key] <= 1
    for kind in ("local", "object", "averaged"):
        assert runs["scale_1"][kind] == runs["scale_1"][f"{kind}_over_scales"]
    assert results["op"] == "fused_local_activations"
    assert results["op_ms"]["reference"] > 0
    assert len(results["classes"]) == 20
    assert any("local loss had the weight 0.5" in sentence for sentence in results["findings"])
    for words in ("Accuracy on test images", "The paper's claims", "All scales, an average of 3 networks"):
        assert words in printed
    with Image.open(tmp_path / "scenes.png") as picture:
        assert picture.width <= 2000


def test_later_scales_learn_from_what_earlier_ones_attend_to(scenes):
    options = train_digit_scenes.parse(["--method", "dla"])
    experiment = dla.DlaExperiment(options)
    part = digit_scenes.Scenes(
        scenes[1].images[:6], scenes[1].labels[:6], scenes[1].classes, scenes[1].boxes[:6]
    )
    view = dla.View(part, dla.whole(part.images), options.device)
    experiment.train_views, experiment.test_views = [view], [view]
    seen = view.seen()
    standardise = training.Standardise(seen.images, options.device)
    torch.manual_seed(0)
    trained = experiment.network(len(part.classes))
    methods = experiment.methods(part)
    first, second = methods["scale_1"], methods["scale_2"]
    torch.nn.init.normal_(first.local.bias)
    stage = experiment.stage(first, seen)
    assert stage.scenes is seen
    assert experiment.start(first, trained) is trained
    experiment.trained(trained, stage, standardise)
    other = experiment.network(len(part.classes))
    assert experiment.start(second, other) is trained  # on from the first scale, its classifiers too
    assert torch.equal(second.local.bias, first.local.bias)
    assert experiment.start(methods["local_only"], other) is other
    mask = dla.predict(trained, first, seen, standardise).mask
    closer = view.closer(mask).seen().images
    assert torch.equal(experiment.stage(second, seen).scenes.images, closer)
    evaluated = experiment.evaluate(trained, first, seen, standardise)
    assert torch.equal(evaluated.boxes, dla.attention_boxes(mask))
    of_second = experiment.evaluate(trained, second, seen, standardise)
    told = dla.predict(trained, second, view.closer(mask).seen(), standardise)
    assert torch.equal(of_second.scales[0].mask, mask)
    assert torch.equal(of_second.scales[1].mask, told.mask)
    for name in ("baseline", "longer", "local_only", "object_only"):
        assert experiment.stage(methods[name], seen).scenes is seen
        assert len(experiment.evaluate(trained, methods[name], seen, standardise).scales) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "."], "--data: a folder has no boxes"),
        (["--scales", "1"], "--scales: 1 is not at least 2"),
        (["--classifiers", "0"], "--classifiers: 0 is not at least 1"),
        (["--pictures", "19"], "--pictures: 19 is not at least 20"),
        (["--local", "0"], "--local: 0.0 is not above 0"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_digit_scenes.main(["--method", "dla", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert train_digit_scenes.parse(["--method", "dla"]).output.name == "demo-dla"
