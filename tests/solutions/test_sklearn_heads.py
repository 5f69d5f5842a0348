"""Linear classifiers of scikit-learn become heads with the same answers; their files are never run."""

import os
import pickle
import warnings
import zlib

import numpy as np
import pytest
import torch

from mergetune import Head
from mergetune.io.pickled_modules import read_module

joblib = pytest.importorskip("joblib")
linear_model = pytest.importorskip("sklearn.linear_model")
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.multiclass import OneVsRestClassifier  # noqa: E402
from sklearn.multioutput import MultiOutputClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import (  # noqa: E402
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC  # noqa: E402

WIDTH = 8
NAMES = ("ant", "bee", "cat")  # in sorted order, as scikit-learn numbers them


def rows(count: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, WIDTH))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


X = rows(60)


def labels(classes: int, kind: str) -> np.ndarray:
    numbers = X[:, :classes].argmax(1)
    return numbers + 4 if kind == "int" else np.array(NAMES)[numbers].astype(kind)


MODELS = {
    "logistic": linear_model.LogisticRegression,
    "ridge": linear_model.RidgeClassifier,
    "ridge without bias": lambda: linear_model.RidgeClassifier(fit_intercept=False),
    "svc": LinearSVC,
    "sgd": linear_model.SGDClassifier,
    "lda": LinearDiscriminantAnalysis,
    "search": lambda: GridSearchCV(linear_model.RidgeClassifier(), {"alpha": [1.0]}, cv=2),
    "scaled": lambda: make_pipeline(Normalizer(), StandardScaler(), linear_model.LogisticRegression()),
    "scaled twice": lambda: make_pipeline(
        RobustScaler(), "passthrough", MinMaxScaler(), MaxAbsScaler(), StandardScaler(with_mean=False), LinearSVC()
    ),
    "in a pipeline": lambda: make_pipeline(
        StandardScaler(with_std=False), make_pipeline(StandardScaler(), linear_model.RidgeClassifier())
    ),
}


def write_pickle(protocol):
    return lambda model, file: file.write_bytes(pickle.dumps(model, protocol=protocol))


FILES = {
    **{f"pickle {protocol}": write_pickle(protocol) for protocol in range(6)},
    "joblib": joblib.dump,
    "joblib zlib": lambda model, file: joblib.dump(model, file, compress=3),
    "joblib gzip": lambda model, file: joblib.dump(model, file, compress=("gzip", 3)),
    "joblib 5": lambda model, file: joblib.dump(model, file, protocol=5),
}


def answers(head: Head, x: np.ndarray) -> list[str]:
    logits = torch.from_numpy(x).float() @ head.weight.T + head.bias
    return [head.classnames[c] for c in logits.argmax(1)]


@pytest.mark.parametrize(("classes", "kind"), [(2, "U"), (2, "int"), (3, "O")])
@pytest.mark.parametrize("name", MODELS)
def test_a_head_answers_as_its_model(tmp_path, name, classes, kind):
    """For unit-norm features; whatever the classes are, and in whatever file the model comes."""
    model = MODELS[name]().fit(X, labels(classes, kind))
    x, given = rows(400, seed=1), [*"0123", *NAMES] if kind == "int" else None
    expected = [str(found) if given is None else given[found] for found in model.predict(x)]
    head = Head.from_sklearn(model, classnames=given)
    assert answers(head, x) == expected
    for way, write in FILES.items():
        write(model, tmp_path / "model.head")
        same = Head.from_checkpoint(tmp_path / "model.head", classnames=given)
        assert torch.equal(same.weight, head.weight) and torch.equal(same.bias, head.bias), way
        assert same.classnames == head.classnames, way


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: SVC(kernel="linear"), "got SVC"),  # its rows stand for pairs of classes, which may be as many
        (lambda: make_pipeline(StandardScaler(), Normalizer(), LinearSVC()), "the step Normalizer"),
        (lambda: make_pipeline(Normalizer("l1"), LinearSVC()), "the step Normalizer"),
        (lambda: make_pipeline(MinMaxScaler(clip=True), LinearSVC()), "the step MinMaxScaler"),
        (lambda: make_pipeline(PolynomialFeatures(), LinearSVC()), "the step PolynomialFeatures"),
        (lambda: make_pipeline(StandardScaler(), SVC(kernel="linear")), "got SVC"),
    ],
)
def test_what_is_no_linear_head_is_refused_by_name(tmp_path, model, named):
    fitted = model().fit(X, labels(3, "U"))
    with pytest.raises((TypeError, ValueError), match=named):
        Head.from_sklearn(fitted)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(fitted))
    with pytest.raises(ValueError, match=f"model.pkl cannot be read as a head: .*{named}"):
        Head.from_checkpoint(tmp_path / "model.pkl")


def test_models_of_several_labels_per_image_are_refused_by_name(tmp_path):
    several = (X[:, :3] > np.median(X[:, :3])).astype(int)
    for model, named in (
        (linear_model.RidgeClassifier(), "got RidgeClassifier that was fitted to several labels per image"),
        (linear_model.RidgeClassifierCV(), "got RidgeClassifierCV that was fitted to several labels per image"),
        (GridSearchCV(linear_model.RidgeClassifier(), {"alpha": [1.0]}, cv=2), "several labels per image"),
        (MultiOutputClassifier(LinearSVC()), "got MultiOutputClassifier"),
        (OneVsRestClassifier(LinearSVC()), "got OneVsRestClassifier"),
    ):
        model.fit(X, several)
        with pytest.raises((TypeError, ValueError), match=named):
            Head.from_sklearn(model)
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
        with pytest.raises(ValueError, match=named):
            Head.from_checkpoint(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    ("loss", "classes", "warned"),
    [("log_loss", 3, 1), ("modified_huber", 3, 1), ("modified_huber", 2, 1), ("log_loss", 2, 0), ("hinge", 3, 0)],
)
def test_a_head_that_has_other_probabilities_than_its_model_says_so_once(tmp_path, loss, classes, warned):
    model = make_pipeline(StandardScaler(), linear_model.SGDClassifier(loss=loss)).fit(X, labels(classes, "U"))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    for read in (lambda: Head.from_sklearn(model), lambda: Head.from_checkpoint(tmp_path / "model.pkl")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read()
        told = [str(each.message) for each in caught if "probabilities" in str(each.message)]
        assert len(told) == warned and all("SGDClassifier" in text for text in told)


class Call:
    """Unpickled, it calls os.mkdir."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("way", FILES)
@pytest.mark.parametrize("place", ["a field", "a class", "a step", "alone"])
def test_no_file_of_a_model_is_run(tmp_path, way, place):
    model, call = linear_model.LogisticRegression().fit(X, labels(3, "O")), Call(tmp_path / "executed")
    if place == "a field":
        model.coef_ = call
    elif place == "a class":
        model.classes_ = np.array([*NAMES[:2], call], dtype=object)
    elif place == "a step":
        model = make_pipeline(StandardScaler(), model).fit(X, labels(3, "O"))
        model.steps.insert(0, ("call", call))
    FILES[way](call if place == "alone" else model, tmp_path / "model")
    with pytest.raises(ValueError, match="model cannot be read as a checkpoint: .*mkdir, and pickled code is never"):
        Head.from_checkpoint(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("way", FILES)
def test_damaged_files_of_models_are_refused(tmp_path, way):
    FILES[way](MODELS["scaled"]().fit(X, labels(3, "O")), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    chance = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[chance.integers(2, len(content))] ^= 1 << int(chance.integers(8))
        cut = len(content) if chance.random() < 0.5 else int(chance.integers(2, len(content)))
        (tmp_path / "model").write_bytes(damaged[:cut])
        try:
            Head.from_checkpoint(tmp_path / "model")
        except ValueError as error:
            assert "model" in str(error)


def test_a_small_file_does_not_grow(tmp_path):
    """zlib's thousandfold of zeros, and a size of 2^60 bytes in a pickle of protocol 5."""
    joblib.dump(np.zeros(9 << 20), tmp_path / "zeros", compress=9)
    with pytest.raises(ValueError, match="must inflate to at most 67,108,864 bytes"):
        Head.from_checkpoint(tmp_path / "zeros")
    (tmp_path / "size").write_bytes(b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".")
    with pytest.raises(ValueError, match="bytes that the file does not have"):
        Head.from_checkpoint(tmp_path / "size")


def doubled(end: bytes, depth: int = 100) -> bytes:
    """A pickle with a tuple that holds 2^100 tuples by references, and what uses it."""
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(depth))
    return b"\x80\x04)\x94" + pairs + end.replace(b"LAST", b"h" + bytes([depth])) + b"."


DOUBLED = {
    "a key": b"}LASTK\x01s",
    "keys": b"}(LASTK\x01u",
    "keys of a dict": b"(LASTK\x01d",
    "a member of a set": b"\x8f(LAST\x90",
    "a member of a frozen set": b"(LAST\x91",
    "a key of an ordered dict": b"ccollections\nOrderedDict\n]LASTK\x01\x86a\x85R",
    "a dtype": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nLAST\x85RC\x00\x86R",
    "a storage": b"LASTQ",
    "an attribute": b"csklearn.linear_model\nLogisticRegression\n)\x81}(X\x05\x00\x00\x00coef_LAST"
    b"X\x0a\x00\x00\x00intercept_LASTX\x08\x00\x00\x00classes_LASTub",
    "labels": b"}(X\x08\x00\x00\x00classes_]LASTaX\x0c\x00\x00\x00class_to_idx}X\x01\x00\x00\x00aLASTsu",
}


@pytest.mark.parametrize("name", DOUBLED)
def test_nested_tuples_cost_no_time(tmp_path, monkeypatch, name):
    """Nothing computes a hash, a text or an array of them: each would take for ever."""
    monkeypatch.setattr("mergetune.io.pickled_contents.MAX_VISITS", 1 << 12)
    (tmp_path / "model").write_bytes(doubled(DOUBLED[name]))
    for read in (Head.from_checkpoint, read_module):
        with pytest.raises(ValueError, match="model"):
            read(tmp_path / "model")


BOMBS = {
    "lists": b"(" + b"]" * (1 << 13) + b"l",
    "dicts": b"(" + b"}" * (1 << 13) + b"l",
    "sets": b"(" + b"\x8f" * (1 << 13) + b"l",
    "references": b"N" + b"\x94" * (1 << 13),
    "classes": b"".join(b"csklearn.a\n%d\n0" % number for number in range(1 << 15)) + b"N",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_makes_few_objects(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mergetune.io.unpickling.FREE_OBJECTS", 1 << 12)
    (tmp_path / "model").write_bytes(zlib.compress(b"\x80\x04" + BOMBS[name] + b"."))
    with pytest.raises(ValueError, match="it (makes|names) more than [0-9,]+ (objects|entries|classes)"):
        Head.from_checkpoint(tmp_path / "model")


def test_a_long_key_does_not_stand_in_each_name_below_it(tmp_path):
    tensor, key = torch.zeros(1), "A" * (1 << 20)
    torch.save({key: [tensor] * 400}, tmp_path / "module")
    with pytest.raises(ValueError, match="its names have more than 134,217,728 characters"):
        read_module(tmp_path / "module")
    torch.save({key: {f"{i}": tensor for i in range(400)}}, tmp_path / "head")
    with pytest.raises(ValueError, match="its names have more than 134,217,728 characters"):
        Head.from_checkpoint(tmp_path / "head")
