"""Accuracy, harmonic mean, base-to-novel, ensembles, paths and barriers, against numbers made by hand."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, cache, head, normal, prompt, with_parameter

from mergetune import (
    FeatureCache,
    Prompt,
    base_to_novel,
    classifier,
    connectivity,
    evaluate,
    harmonic_mean,
    logit_ensemble,
    path,
    plot,
    summarise,
    weight_average,
)
from mergetune.evaluation import BaseNovel, Confusion, Path, Report, accuracy, cross_entropy, plot_confusion, score

OTHERS = ("red bus", "bird")


def logits(clip, solution, features) -> torch.Tensor:
    """The model's own, in float64."""
    x = features.tensor().double()
    if isinstance(solution, Prompt):
        return clip.logit_scale * x @ solution.class_embeddings(clip, features.classnames).double().T
    bias = 0.0 if solution.bias is None else solution.bias.double()
    return solution.logit_scale * (x @ solution.weight.double().T + bias)


def predictions(classify, features) -> torch.Tensor:
    weights = classify(features.classnames)
    x = features.tensor()
    return ((torch.cat([x, torch.ones(len(x), 1)], 1) if weights.shape[1] == 9 else x) @ weights.T).argmax(-1)


# -- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def corners():
    """Seven images that lie on axes 0 0 0 1 1 2 2, labelled 0 0 1 1 1 0 2; a fourth class has none."""
    axes = torch.eye(4)[[0, 0, 0, 1, 1, 2, 2]]
    return FeatureCache.from_tensors(axes, [0, 0, 1, 1, 1, 0, 2], ("a", "b", "c", "d"))


@pytest.mark.parametrize("batch_size", [1, 3, 8192])
def test_accuracy_by_hand(corners, batch_size):
    report = accuracy(torch.eye(4), corners, batch_size=batch_size)
    assert report.accuracy == pytest.approx(100 * 5 / 7) and report.images == 7
    assert report.per_class == pytest.approx({"a": 100 * 2 / 3, "b": 100 * 2 / 3, "c": 100})
    assert report.mean_per_class == pytest.approx((200 / 3 + 200 / 3 + 100) / 3)
    assert report.standard_error == pytest.approx(100 * math.sqrt(5 / 7 * 2 / 7 / 7))
    told = json.loads(json.dumps(report.to_json()))
    assert told == {**asdict(report), "mean_per_class": report.mean_per_class, "standard_error": report.standard_error}


def test_accuracy_with_a_bias_and_with_normalisation(corners):
    only_b = torch.cat([torch.eye(4), torch.tensor([[0.0], [9.0], [0.0], [0.0]])], 1)
    assert accuracy(only_b, corners).accuracy == pytest.approx(100 * 3 / 7)
    long = torch.eye(4) + torch.tensor([[0.0], [0.0], [5.0], [0.0]])  # [0, 0, 1, 0] + 5 everywhere
    assert accuracy(long, corners).accuracy == pytest.approx(100 * 1 / 7)
    assert accuracy(long, corners, normalize=True).accuracy == pytest.approx(100 * 5 / 7)


def test_classes_of_one_name_are_reported_apart(corners):
    report = accuracy(torch.eye(4), replace(corners, classnames=("a", "x", "x", "d")))
    assert report.per_class == pytest.approx({"a": 100 * 2 / 3, "x (1)": 100 * 2 / 3, "x (2)": 100})


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 6), (4,)])
def test_weights_of_another_shape_are_refused(corners, shape):
    with pytest.raises(ValueError, match=r"weights must have shape \[C, D\] = \[4, 4\], got"):
        accuracy(torch.zeros(shape), corners)


@pytest.mark.parametrize(
    "solution", [prompt(), head(bias=False), head(), prompt().per_class(NAMES)], ids=lambda s: s.kind
)
def test_evaluate_a_solution(clip, solution):
    features = cache(60)
    expected = (logits(clip, solution, features).argmax(-1) == features.labels).double().mean().item()
    assert 0 < expected < 1 and evaluate(clip, solution, features).accuracy == pytest.approx(100 * expected)


def test_evaluate_templates(clip):
    features, templates = cache(60), ["a photo of a {}.", "the {}"]
    x, weights = features.tensor(), clip.class_embeddings(NAMES, templates)
    expected = 100 * ((x @ weights.T).argmax(-1) == features.labels).float().mean().item()
    assert evaluate(clip, templates, features).accuracy == pytest.approx(expected)
    template = "a photo of a {}."
    assert evaluate(clip, template, features) == evaluate(clip, Prompt.from_template(clip, template), features)


def test_heads_are_looked_up_by_name(clip):
    features, h = cache(60), head()
    turned = replace(h, weight=h.weight.flip(0), bias=h.bias.flip(0), classnames=NAMES[::-1])
    assert evaluate(clip, turned, features) == evaluate(clip, h, features)


def test_features_of_another_clip_are_refused(clip):
    with pytest.raises(ValueError, match="features must come from this CLIP's image tower"):
        evaluate(clip, prompt(), cache(60, fingerprint="x" * 64))


# -- base to novel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "novel", "hm"), [(80, 60, 68.5714285714), (50, 50, 50), (0, 90, 0), (0, 0, 0)])
def test_harmonic_mean(base, novel, hm):
    assert harmonic_mean(base, novel) == pytest.approx(hm)


def test_published_harmonic_means():
    """CoOp and MERGETUNE on 11 data sets (arXiv 2601.10497)."""
    assert harmonic_mean(82.69, 63.22) == pytest.approx(71.66, abs=0.005)
    assert harmonic_mean(80.82, 73.97) == pytest.approx(77.24, abs=0.005)


def test_negative_accuracies_are_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1 and 5"):
        harmonic_mean(-1, 5)


def test_base_to_novel_tests_each_half_among_its_own_classes(clip):
    base, novel = cache(60), cache(40, seed=1, classes=OTHERS)
    both = base_to_novel(classifier(clip, prompt()), base, novel)
    assert both.base == evaluate(clip, prompt(), base) and both.novel == evaluate(clip, prompt(), novel)
    assert set(both.base.per_class) == set(NAMES) and set(both.novel.per_class) == set(OTHERS)
    assert both.hm == harmonic_mean(both.base.accuracy, both.novel.accuracy)
    with pytest.raises(ValueError, match="among the head's 3 classes, got 'red bus'"):
        base_to_novel(classifier(clip, head(bias=False)), base, novel)


def test_seen_and_unseen_are_answered_among_the_classes_of_both(clip):
    """By hand, with a prompt that answers some novel images with a base class."""
    base, novel = cache(60), cache(40, seed=1, classes=OTHERS)
    both = base_to_novel(classifier(clip, prompt()), base, novel)
    weights = torch.cat([prompt().class_embeddings(clip, names) for names in (NAMES, OTHERS)])
    for report, images, first in ((both.seen, base, 0), (both.unseen, novel, len(NAMES))):
        right = (images.tensor() @ weights.T).argmax(1) == images.labels + first
        assert report.accuracy == pytest.approx(100 * right.double().mean().item()) and report.images == len(images)
        assert list(report.per_class) == list(images.classnames)
    assert both.seen.accuracy < both.base.accuracy and both.unseen.accuracy < both.novel.accuracy
    assert both.joint_hm == harmonic_mean(both.seen.accuracy, both.unseen.accuracy)
    assert list(both.to_json()) == ["base", "novel", "hm", "seen", "unseen", "joint_hm"]


def test_a_map_of_the_images_comes_before_the_product(clip):
    """A rotation of the images answers as the inverse rotation of the class weights, in every label space."""
    tests = {"base": cache(60), "novel": cache(40, seed=1, classes=OTHERS)}
    weights = {part: prompt().class_embeddings(clip, images.classnames) for part, images in tests.items()}
    rotation = torch.linalg.qr(normal(8, 8, seed=5))[0]
    mapped = score(weights, tests, images=lambda x: x @ rotation)
    assert mapped == score({part: w @ rotation.T for part, w in weights.items()}, tests) != score(weights, tests)


def run_of(base: float, novel: float, **joint: Report) -> BaseNovel:
    return BaseNovel(Report(base, {"a": base}, 100), Report(novel, {"b": novel}, 400), **joint)


def test_summarise_by_hand():
    row = summarise("CoOp", [run_of(80, 60), run_of(90, 50)])
    assert (row.name, row.seeds, row.base, row.novel) == ("CoOp", 2, 85, 55)
    assert row.hm == pytest.approx(2 * 85 * 55 / 140)  # of the means, as published; not the mean of 68.57 and 64.29
    assert (row.base_std, row.novel_std) == (pytest.approx(math.sqrt(50)), pytest.approx(math.sqrt(50)))
    assert row.hm_std == pytest.approx(abs(480 / 7 - 450 / 7) / math.sqrt(2))
    assert row.base_error == pytest.approx((4 + 3) / 2)
    assert row.novel_error == pytest.approx((100 * math.sqrt(0.24 / 400) + 2.5) / 2)
    json.dumps(asdict(row))
    assert row.joint_hm is None

    def joint(seen: float, unseen: float) -> BaseNovel:
        return run_of(80, 60, seen=Report(seen, {"a": seen}, 100), unseen=Report(unseen, {"b": unseen}, 400))

    row = summarise("CoOp", [joint(70, 30), joint(70, 50)])
    assert (row.seen, row.unseen, row.joint_hm) == (70, 40, pytest.approx(2 * 70 * 40 / 110))
    assert (row.seen_std, row.unseen_std) == (0, pytest.approx(math.sqrt(200)))


def test_summarise_one_and_no_run():
    row = summarise("one", [run_of(80, 60)])
    assert (row.base_std, row.novel_std, row.hm_std, row.seeds) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="at least one result of 'none'"):
        summarise("none", [])


# -- ensembles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_weight_average_is_wise_ft_on_class_embeddings(clip, t):
    a, b = classifier(clip, "a photo of a {}."), classifier(clip, prompt())
    start, end = clip.class_embeddings(NAMES), prompt().class_embeddings(clip, NAMES)
    expected = clip.logit_scale * F.normalize((1 - t) * start + t * end, dim=-1)
    torch.testing.assert_close(weight_average(a, b, t)(NAMES), expected)
    if t in (0.0, 1.0):
        torch.testing.assert_close(weight_average(a, b, t)(NAMES), (b if t else a)(NAMES))


PAIRS = {
    "prompts": (prompt(1), prompt(2)),
    "heads": (head(1, bias=False), head(2, bias=False)),
    "heads with bias": (head(1), head(2)),
    "heads of two scales": (head(1, bias=False, scale=3.0), head(2, bias=False, scale=0.5)),
    "head and prompt": (head(1, bias=False, scale=1.0), prompt(1)),
    "heads with and without bias": (head(1), head(2, bias=False)),
}


@pytest.mark.parametrize("t", [0.3, 0.5])
@pytest.mark.parametrize("pair", PAIRS)
def test_logit_ensemble_is_the_average_of_the_logits(clip, pair, t):
    (a, b), features = PAIRS[pair], cache(300)
    mixed = (1 - t) * logits(clip, a, features) + t * logits(clip, b, features)
    ensemble = logit_ensemble(classifier(clip, a), classifier(clip, b), t)
    assert torch.equal(predictions(ensemble, features), mixed.argmax(-1))
    expected = 100 * (mixed.argmax(-1) == features.labels).double().mean().item()
    assert accuracy(ensemble(NAMES), features).accuracy == pytest.approx(expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("pair", [name for name in PAIRS if name != "prompts"] + ["head and zero-shot"])
def test_weight_average_of_heads_is_plain(clip, pair, t):
    """WiSE-FT's w = (1 - a) w0 + a w1: the lengths of a head's rows are learned, and are averaged with them."""
    a, b = (classifier(clip, s) for s in PAIRS.get(pair, (head(1, bias=False), "a photo of a {}.")))
    start, end = a(NAMES), b(NAMES)
    width = max(start.shape[1], end.shape[1])
    start, end = (F.pad(w, (0, width - w.shape[1])) for w in (start, end))
    torch.testing.assert_close(weight_average(a, b, t)(NAMES), (1 - t) * start + t * end)
    features = cache(300)
    same = predictions(logit_ensemble(a, b, t), features) == predictions(weight_average(a, b, t), features)
    assert same.all(), "the logits of a linear head are linear in its weights"


def test_weight_average_of_cosine_heads_keeps_their_lengths(clip):
    a, b = (classifier(clip, replace(head(i, bias=False), normalize=True)) for i in (1, 2))
    lengths = weight_average(a, b, 0.5)(NAMES).norm(dim=-1)
    torch.testing.assert_close(lengths, a(NAMES).norm(dim=-1))


def test_weight_average_of_heads_ends_at_the_heads(clip):
    a, b = classifier(clip, head(1)), classifier(clip, head(2))
    features = cache(300)
    assert torch.equal(predictions(weight_average(a, b, 1.0), features), predictions(b, features))


# -- paths ------------------------------------------------------------------------------------------------------------

ENDS = {
    "prompts": (prompt(1), prompt(2)),
    "class-specific": (prompt(1).per_class(NAMES), prompt(2).per_class(NAMES)),
    "heads": (head(1, bias=False), head(2, bias=False)),
    "heads with bias": (head(1), head(2)),
    "heads of two scales": (head(1, bias=False, scale=3.0), head(2, bias=False, scale=0.5)),
    "other words behind the name": (prompt(1), prompt(2, "X X X X {}, a type of pet.")),
}


@pytest.mark.parametrize("space", ["embedding", "parameter"])
@pytest.mark.parametrize("ends", ENDS)
def test_the_ends_of_a_path_are_the_solutions_themselves(clip, ends, space):
    if (ends, space) == ("other words behind the name", "parameter"):
        with pytest.raises(ValueError, match="must end alike"):
            path(clip, *ENDS[ends], cache(60), space=space)
        return
    (a, b), features = ENDS[ends], cache(60)
    walked = path(clip, a, b, features, points=5, space=space)
    assert walked.alphas == (0, 0.25, 0.5, 0.75, 1)
    for i, solution in ((0, a), (-1, b)):
        own = F.cross_entropy(logits(clip, solution, features), features.labels).item()
        assert walked.loss[i] == pytest.approx(own, rel=1e-5)
        assert walked.accuracy[i] == evaluate(clip, solution, features).accuracy


@pytest.mark.parametrize("space", ["embedding", "parameter"])
def test_the_middle_of_a_path(clip, space):
    (a, b), features = ENDS["prompts"], cache(60)
    if space == "embedding":  # the interpolation comes before the normalisation
        weights = 0.75 * a.class_weights(clip, NAMES) + 0.25 * b.class_weights(clip, NAMES)
    else:
        weights = with_parameter(a, 0.75 * a.ctx + 0.25 * b.ctx).class_weights(clip, NAMES)
    weights = F.normalize(weights, dim=-1)
    loss = F.cross_entropy(clip.logit_scale * features.tensor() @ weights.T, features.labels).item()
    walked = path(clip, a, b, features, points=5, space=space)
    assert walked.loss[1] == pytest.approx(loss, rel=1e-5)
    assert walked.accuracy[1] == accuracy(weights, features).accuracy


def test_both_spaces_are_one_for_heads(clip):
    a, b = head(1), head(2)
    walks = [path(clip, a, b, cache(60), points=7, space=space) for space in ("embedding", "parameter")]
    assert walks[0].loss == pytest.approx(walks[1].loss, rel=1e-6) and walks[0].accuracy == walks[1].accuracy


@pytest.mark.parametrize("batch_size", [7, 8192])
def test_cross_entropy_is_the_mean_over_images(batch_size):
    features, weights = cache(60), normal(3, 8)
    expected = F.cross_entropy(20 * features.tensor() @ weights.T, features.labels).item()
    assert cross_entropy(weights, features, scale=20, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("alphas", "loss", "barrier"),
    [
        ((0, 0.5, 1), (1, 2, 1), 1),
        ((0, 0.5, 1), (1, 2, 3), 0),  # on the chord
        ((0, 0.5, 1), (2, 0.5, 1), 0),  # a valley
        ((0, 0.25, 0.5, 1), (0, 3, 3, 4), 2),
        ((0, 1), (5, 1), 0),
    ],
)
def test_the_barrier_by_hand(alphas, loss, barrier):
    walked = Path(alphas, loss, (50.0,) * len(loss))
    assert walked.barrier == barrier
    assert json.loads(json.dumps(walked.to_json()))["barrier"] == barrier


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"points": 1}, ValueError, "points must be at least 2, for both ends, got 1"),
        ({"space": "weights"}, ValueError, "space must be one of embedding, parameter, got 'weights'"),
        ({"b": head(bias=False)}, TypeError, "one kind, got prompt and head"),
        (
            {"b": replace(prompt(), ctx=normal(2, 16), template="X X {}."), "space": "parameter"},
            ValueError,
            "equal shapes",
        ),
    ],
)
def test_paths_that_make_no_sense_are_refused(clip, kwargs, error, match):
    with pytest.raises(error, match=match):
        path(clip, **{"a": prompt(), "b": prompt(), "features": cache(60), **kwargs})


def test_a_head_without_bias_has_a_bias_of_zero_on_a_path(clip):
    bare = head(1, bias=False)
    zero = replace(bare, bias=torch.zeros(len(bare.weight)))
    assert path(clip, bare, head(2), cache(60)).loss == path(clip, zero, head(2), cache(60)).loss
    assert path(clip, head(2), bare, cache(60)).loss == path(clip, head(2), zero, cache(60)).loss


@pytest.fixture
def walks(clip):
    return connectivity(clip, Prompt.from_template(clip), prompt(1), prompt(2), cache(60), points=3)


def test_connectivity_walks_the_three_paths(clip, walks):
    assert list(walks) == ["zero-shot to MERGETUNE", "fine-tuned to MERGETUNE", "zero-shot to fine-tuned"]
    first, second, direct = walks.values()
    assert first.loss[-1] == second.loss[-1] and first.loss[0] == direct.loss[0] and second.loss[0] == direct.loss[-1]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
@pytest.mark.parametrize("panels", [1, 2])
def test_plot_writes_a_file(walks, tmp_path, suffix, panels):
    file = tmp_path / f"figure.{suffix}"
    plot({f"panel {i}": walks for i in range(panels)}, file)
    head_of = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert file.read_bytes().startswith(head_of)
    if suffix == "svg":
        assert b"cross-entropy" in file.read_bytes() or b"<path" in file.read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_figure_replaces_a_link_and_not_the_file_behind_it(walks, tmp_path, suffix):
    (tmp_path / "theirs").write_text("theirs")
    file = tmp_path / f"figure{suffix}"
    counted = Confusion(np.array([[2, 1], [0, 3]]), ("cat", "dog"), ())
    for draw in (lambda: plot({"panel": walks}, file), lambda: plot_confusion(counted, file)):
        file.unlink(missing_ok=True)
        file.symlink_to("theirs")
        draw()
        assert (tmp_path / "theirs").read_text() == "theirs" and not file.is_symlink() and file.stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, "theirs"])


def test_plot_draws_every_path(walks, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kwargs: drawn.append(args) or real(self, *args, **kwargs))
    plot({"panel": {**walks, "a fourth": next(iter(walks.values()))}}, tmp_path / "figure.svg")
    assert len(drawn) == 2 * 4
