"""Predictions, calibration and temperatures against scikit-learn, a grid, and numbers made by hand."""

import json
import math

import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from tiny import NAMES, cache, head, prompt

from mergetune import FeatureCache, Head, LinearMap, Residual, Stack, accuracy, classifier, interpolate, load_solution
from mergetune.evaluation import Classifier, fit_temperature, predict_features, temperature_of, with_temperature
from mergetune.solutions import write_notes

MANY = tuple(f"class {c}" for c in range(7))


def fixed(scale: float = 6.0, classes: int = 7) -> Classifier:
    weights = scale * torch.randn(classes, 8, generator=torch.Generator().manual_seed(3))
    return Classifier(lambda names: weights)


def probabilities(classify, features, temperature: float = 1.0) -> torch.Tensor:
    return (classify.logits(features.classnames, features.tensor()).double() / temperature).softmax(1)


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 2048])
def test_predictions_are_those_of_scikit_learn(batch_size):
    features = cache(100, classes=MANY)
    found = predict_features(fixed(), features, temperature=2.0, batch_size=batch_size)
    p, labels = probabilities(fixed(), features, 2.0), features.labels.numpy()
    every = range(len(MANY))
    assert found.nll == pytest.approx(log_loss(labels, p.numpy(), labels=every), rel=1e-6)
    assert found.top5 == pytest.approx(100 * top_k_accuracy_score(labels, p.numpy(), k=5, labels=every))
    top = p.topk(5)
    assert torch.equal(found.classes, top.indices) and torch.equal(found.predicted, p.argmax(1))
    assert torch.allclose(found.probabilities.double(), top.values, atol=1e-6)
    assert torch.allclose(found.true_probabilities.double(), p.gather(1, features.labels[:, None])[:, 0], atol=1e-6)


@pytest.mark.parametrize("solution", [prompt(), head(), head(bias=False)], ids=["prompt", "bias", "head"])
def test_the_report_is_that_of_accuracy(clip, solution):
    features, classify = cache(60), classifier(clip, solution)
    found = predict_features(classify, features)
    assert found.report == accuracy(classify, features) and found.top5 is None  # of 3 classes
    assert found.classes.shape == (60, 3) and found.probabilities.sum(1).allclose(torch.ones(60))


def test_of_equal_logits_the_first_class_is_the_answer():
    features = FeatureCache.from_tensors(torch.eye(4)[:1], [2], MANY[:4])
    found = predict_features(Classifier(lambda names: torch.tensor([[0.0], [1], [1], [1]]).expand(4, 4)), features)
    assert found.classes.tolist() == [[1, 2, 3, 0]]


def test_ece_by_hand():
    """Four images: confidence .9 three times (right, right, wrong) and .62 once (wrong)."""
    x = torch.tensor([[0.8, 0.6]]).expand(4, 2)
    features = FeatureCache.from_tensors(x, [0, 0, 1, 1], ["cat", "dog"])
    logits = [math.log(9), math.log(9), math.log(9), math.log(0.62 / 0.38)]
    rows = iter(logits)
    classify = Classifier(lambda names: torch.eye(2), lambda x: torch.tensor([[next(rows), 0.0] for _ in x]))
    found = predict_features(classify, features)
    assert found.ece == pytest.approx(100 * (3 / 4 * abs(2 / 3 - 0.9) + 1 / 4 * 0.62), abs=1e-4)
    bins = found.reliability
    assert bins.images == (0,) * 9 + (1,) + (0,) * 3 + (3, 0)  # of 15 bins
    assert bins.accuracy[13] == pytest.approx(200 / 3) and bins.confidence[13] == pytest.approx(90, abs=1e-4)
    assert bins.accuracy[0] is None and json.loads(json.dumps(found.calibration()))["reliability"]["images"][13] == 3


def test_wrong_answers_stand_with_the_most_confident_first():
    features = cache(100, classes=MANY)
    found, p = predict_features(fixed(), features), probabilities(fixed(), features)
    wrong = found.wrong()
    assert set(wrong.tolist()) == set((p.argmax(1) != features.labels).nonzero()[:, 0].tolist())
    confidence = p.max(1).values[wrong]
    assert (confidence[:-1] >= confidence[1:] - 1e-6).all()


# -- temperatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 6.0, 60.0])
def test_the_temperature_is_the_best_of_a_grid(scale):
    features = cache(200, classes=MANY)
    features = FeatureCache.from_tensors(  # half of the labels are what the classifier answers
        features.tensor(), torch.where(torch.arange(200) % 2 == 0, features.labels, answers(scale, features)), MANY
    )
    found = fit_temperature(fixed(scale), features)

    def nll(t: float) -> float:
        return predict_features(fixed(scale), features, temperature=t).nll

    grid = [found * math.exp(step / 100) for step in range(-300, 301)]
    assert nll(found) <= min(map(nll, grid)) + 1e-12
    assert fit_temperature(fixed(scale), features, batch_size=13) == pytest.approx(found, rel=1e-5)
    assert fit_temperature(fixed(scale), features) == found


def answers(scale, features):
    return fixed(scale).logits(MANY, features.tensor()).argmax(1)


def test_a_temperature_that_nothing_determines_is_refused():
    features = cache(50, classes=MANY)
    right = FeatureCache.from_tensors(features.tensor(), answers(1.0, features), MANY)
    with pytest.raises(ValueError, match="all are answered correctly"):
        fit_temperature(fixed(1.0), right)
    with pytest.raises(ValueError, match="no better than chance"):
        fit_temperature(Classifier(lambda names: -fixed(1.0)(names)), right)


@pytest.mark.parametrize(
    "solution",
    [
        prompt(),
        head(),
        prompt().per_class(NAMES),
        LinearMap(torch.eye(8)),
        Stack(prompt(), Residual(torch.ones(3, 8), NAMES)),
    ],
    ids=["prompt", "head", "per class", "map", "stack"],
)
def test_a_temperature_is_saved_with_the_solution_and_is_no_part_of_what_it_computes(clip, solution, tmp_path):
    assert temperature_of(solution) == 1.0 and temperature_of("a photo of a {}.") == 1.0
    warm = with_temperature(solution, 2.5)
    assert temperature_of(warm) == 2.5 and temperature_of(solution) == 1.0
    solution.save(tmp_path)
    tensors = (tmp_path / "solution.safetensors").read_bytes()
    write_notes(tmp_path, warm.notes)
    again = load_solution(tmp_path)
    assert temperature_of(again) == 2.5 and again.notes == {**solution.notes, "temperature": 2.5}
    assert (tmp_path / "solution.safetensors").read_bytes() == tensors
    texts = ([item for item in s.whole_identity if isinstance(item, str)] for s in (solution, warm, again))
    assert len({tuple(found) for found in texts}) == 1
    assert temperature_of(interpolate(solution, warm, 0.5)) == 1.0


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "2", None])
def test_a_wrong_temperature_is_refused(value):
    with pytest.raises(ValueError, match="t must be a finite number above 0"):
        with_temperature(head(), value)
    with pytest.raises(ValueError, match="notes must be a finite number above 0"):
        temperature_of(Head(torch.eye(2), ("cat", "dog"), notes={"temperature": value}))


def test_a_temperature_changes_no_answer(clip):
    features, classify = cache(60), classifier(clip, head())
    assert torch.equal(
        predict_features(classify, features).classes, predict_features(classify, features, temperature=9.0).classes
    )
    assert accuracy(classifier(clip, with_temperature(head(), 9.0)), features) == accuracy(classify, features)
