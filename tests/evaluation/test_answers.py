"""Confusion matrices, scores per class, wrong answers and their figures, against scikit-learn and by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import classification_report, f1_score

from mergetune import FeatureCache, confusion, plot_confusion, plot_wrong_answers, predict_features, wrong_answers
from mergetune.evaluation import Classifier, most_confident, save_wrong_answers

NAMES = ("cat", "dog", "=car", "dog", "never")


@pytest.fixture
def predictions():
    """Answers 0 0 1 1 1 2 3 to images of the classes 0 1 1 1 3 2 2; class 4 has no image and no answer."""
    answers, labels = [0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 3, 2, 2]
    sharp = torch.tensor([9.0, 1, 9, 9, 2, 9, 3])[:, None]
    features = FeatureCache.from_tensors(
        torch.eye(5)[answers], labels, NAMES, files=[f"{row} é.png" for row in range(7)]
    )
    rows = iter(sharp)
    classify = Classifier(lambda names: torch.eye(5), lambda x: x * torch.stack([next(rows) for _ in x]))
    return predict_features(classify, features)


def read(file):
    return list(csv.reader(file.read_text(encoding="utf-8").splitlines()))


def test_confusion_and_scores_are_those_of_scikit_learn(predictions):
    found = confusion(predictions)
    assert found.counts.tolist() == [[1, 0, 0, 0, 0], [1, 2, 0, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5]
    assert found.names == ("cat", "dog (1)", "=car", "dog (3)", "never")
    y = predictions.labels.numpy(), predictions.predicted.numpy()
    expected = classification_report(*y, labels=range(4), output_dict=True, zero_division=0)
    for c, score in enumerate(found.scores[:4]):
        theirs = expected[str(c)]
        assert score.images == theirs["support"] and score.recall == pytest.approx(100 * theirs["recall"])
        assert score.precision == pytest.approx(100 * theirs["precision"])
        assert score.f1 == pytest.approx(100 * theirs["f1-score"])
    never = found.scores[4]
    assert (never.images, never.precision, never.recall, never.f1) == (0, None, None, None)
    assert found.macro_f1 == pytest.approx(100 * f1_score(*y, labels=range(4), average="macro"))
    assert [(m.true, m.predicted, m.images, round(m.share, 1)) for m in found.mistakes] == [
        ("dog (1)", "cat", 1, 33.3), ("=car", "dog (3)", 1, 50.0), ("dog (3)", "dog (1)", 1, 100.0)
    ]  # fmt: skip
    told = json.loads(json.dumps(found.to_json(mistakes=1)))
    assert told["classes"][4]["f1"] is None and len(told["mistakes"]) == 1


def test_the_most_frequent_mistakes_come_first():
    x = torch.eye(3)[[1, 2, 2, 2, 0, 1]]
    features = FeatureCache.from_tensors(x, [0, 0, 0, 1, 0, 1], ("a", "b", "c"))
    found = confusion(predict_features(Classifier(lambda names: torch.eye(3)), features)).mistakes
    assert [(m.true, m.predicted, m.images, m.share) for m in found] == [
        ("a", "c", 2, 50), ("a", "b", 1, 25), ("b", "c", 1, 50)
    ]  # fmt: skip


def test_tables_are_written(predictions, tmp_path):
    found = confusion(predictions)
    found.save(tmp_path / "matrix.csv")
    header, *rows = read(tmp_path / "matrix.csv")
    assert header == ["true class", *found.names] and [row[0] for row in rows] == list(found.names)
    assert np.array_equal(np.array([row[1:] for row in rows], dtype=int), found.counts)
    found.save_scores(tmp_path / "scores.csv")
    header, *rows = read(tmp_path / "scores.csv")
    assert header[:5] == ["name", "images", "precision", "recall", "f1"]
    assert rows[1] == ["dog (1)", "3", "66.6667", "66.6667", "66.6667", "cat", "1"]
    assert rows[4] == ["never", "0", "", "", "", "", "0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matrix.csv", "scores.csv"]


def test_wrong_answers_by_hand(predictions, tmp_path):
    found = list(wrong_answers(predictions))
    p = [float((s * torch.eye(5)[0]).softmax(0)[0]) for s in (3.0, 2.0, 1.0)]
    assert [(w.file, w.true, w.predicted) for w in found] == [
        ("6 é.png", "=car", "dog (3)"), ("4 é.png", "dog (3)", "dog (1)"), ("1 é.png", "dog (1)", "cat")
    ]  # fmt: skip
    assert [w.probability for w in found] == pytest.approx(p)
    assert [w.true_probability for w in found] == pytest.approx([(1 - x) / 4 for x in p])
    assert [w.second for w in found] == ["cat", "cat", "dog (1)"] and most_confident(predictions, 1) == found[:1]
    save_wrong_answers(predictions, tmp_path / "wrong.csv")
    header, *rows = read(tmp_path / "wrong.csv")
    assert header[:4] == ["file", "true", "predicted", "probability"]
    assert [row[0] for row in rows] == [wrong.file for wrong in found]
    assert [float(row[3]) for row in rows] == pytest.approx(p, rel=1e-5)


def test_without_file_names_wrong_answers_name_the_row():
    features = FeatureCache.from_tensors(torch.eye(2), [0, 0], ("cat", "dog"))
    (found,) = wrong_answers(predict_features(Classifier(lambda names: torch.eye(2)), features))
    assert found.file == "1"


@pytest.mark.parametrize("count", [2, 25, 130])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(count, suffix, tmp_path):
    names = [f"$class$ {c} of a long name that does not fit" for c in range(count)]
    features = FeatureCache.from_tensors(torch.eye(count)[: count // 2 + 1], range(count // 2 + 1), names)
    found = confusion(predict_features(Classifier(lambda names: torch.eye(count).roll(1, 0)), features))
    plot_confusion(found, tmp_path / f"c{suffix}", title="$1")
    if suffix == ".png":
        with Image.open(tmp_path / "c.png") as image:
            assert min(image.size) > 400 and max(image.size) < 3000
    else:
        text = (tmp_path / "c.svg").read_text()
        assert 0 < text.count("of a l") <= 2 * 65


def test_a_contact_sheet_shows_the_pictures(predictions, tmp_path):
    wrong = list(wrong_answers(predictions))
    for answer, colour in zip(wrong, ((250, 0, 0), (0, 250, 0), (0, 0, 250)), strict=True):
        Image.new("RGB", (40, 30), colour).save(tmp_path / answer.file)
    plot_wrong_answers(wrong, tmp_path, tmp_path / "sheet.png", title="wrong")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    assert {(250, 0, 0), (0, 250, 0), (0, 0, 250)} <= colours
    (tmp_path / wrong[1].file).unlink()
    with pytest.raises(ValueError, match="cannot read image .*4 é.png"):
        plot_wrong_answers(wrong, tmp_path, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="at least one wrong answer"):
        plot_wrong_answers([], tmp_path, tmp_path / "sheet.png")
