"""Rules of the method and of the statistics that are easily lost: what is near what, and what is drawn how often."""

import json
import shutil
import zipfile
from importlib.resources import as_file, files

import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, cache, head, prompt
from typer.testing import CliRunner

from mergetune import Head, Prompt, fit, tune
from mergetune.cli import app

STILL = {"epochs": 1, "lr": 1e-30, "warmup_lr": 1e-30, "precision": "float32"}  # rates that move nothing
SEVERAL = ["a photo of a {}.", "one {} outdoors", "the {}, drawn by a child"]


def ensemble(clip, templates):
    """Zero-shot class embeddings [C, D] by their definition: the mean over templates of unit embeddings, unit again."""
    return F.normalize(sum(clip.class_embeddings(NAMES, template) for template in templates), dim=-1)


def distance(a, b):
    """Mean over classes of 1 - cos."""
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean().item()


def surrogate(result):
    """What the only epoch of a run that does not move has measured."""
    return result.history[0]["surrogate"]


@pytest.mark.parametrize("given", [None, "the {}, drawn by a child", SEVERAL])
def test_kgcoop_stays_near_the_templates_that_are_given(clip, given):
    template = "one {} outdoors"
    result = tune(clip, cache(), method="kgcoop", template=template, zero_shot=given, n_ctx=2, **STILL)
    near = [template] if given is None else [given] if isinstance(given, str) else given
    start = result.solution.class_embeddings(clip, NAMES)
    assert surrogate(result) == pytest.approx(distance(start, ensemble(clip, near)), abs=1e-6)
    others = [[t] for t in SEVERAL if [t] != near]
    assert all(abs(surrogate(result) - distance(start, ensemble(clip, other))) > 1e-4 for other in others)


@pytest.mark.parametrize("kind", ["identity", "cosine"])
def test_fit_stays_near_the_mean_of_all_templates_that_are_given(clip, kind):
    result = fit(clip, cache(), prompt(), tau=1, zero_shot=SEVERAL, surrogate=kind, **STILL)
    start = prompt().class_embeddings(clip, NAMES)
    assert surrogate(result) == pytest.approx(distance(start, ensemble(clip, SEVERAL)), abs=1e-6)
    fewer = [[t for t in SEVERAL if t != left_out] for left_out in SEVERAL]
    assert all(abs(surrogate(result) - distance(start, ensemble(clip, some))) > 1e-4 for some in fewer)


def test_fit_of_a_head_starts_from_the_mean_of_all_templates_that_are_given(clip):
    tuned = head(bias=False, scale=clip.logit_scale)
    result = fit(clip, cache(), tuned, tau=0, zero_shot=SEVERAL, **STILL)
    assert isinstance(result.solution, Head)
    torch.testing.assert_close(result.solution.weight, ensemble(clip, SEVERAL))
    assert surrogate(result) == pytest.approx(0, abs=1e-6)
    alone = fit(clip, cache(), tuned, tau=0, zero_shot=SEVERAL[0], **STILL)
    assert not torch.allclose(alone.solution.weight, result.solution.weight, atol=1e-3)


def test_a_prompt_starts_from_the_words_of_the_first_template_that_fits(clip):
    result = fit(clip, cache(), prompt(), tau=0, zero_shot=["the {}", "one {} outdoors", *SEVERAL], **STILL)
    torch.testing.assert_close(result.solution.ctx, Prompt.from_template(clip, SEVERAL[0]).ctx)


def test_the_class_bootstrap_draws_once_for_each_dataset_and_not_for_each_cell(tmp_path):
    """Zero-shot answers alike in all cells of a dataset: more seeds tell nothing about other classes, more datasets do.

    The second dataset holds the images of the first. With draws of its own the standard error falls by sqrt(2).
    """
    with as_file(files("mergetune") / "assets" / "icon-clip") as model:
        backbone = ["--backbone", f"local-dir:{model}"]
        with (
            as_file(files("mergetune") / "assets" / "tilted-icons.zip") as archive,
            zipfile.ZipFile(archive) as content,
        ):
            classes = ("anchor", "bell", "camera", "heart")
            content.extractall(tmp_path / "images", [n for n in content.namelist() if n.split("/")[1] in classes])
        run("cache", tmp_path / "images", "--out", tmp_path / "a", *backbone)
        shutil.copytree(tmp_path / "a", tmp_path / "b")

        def error(*datasets, seeds):
            """The zero-shot line's standard error over classes. All calls share the finished cells of one folder."""
            found = run(
                "compare", *(tmp_path / name for name in datasets), "--out", tmp_path / "compared", *backbone,
                "--all-classes", "--expert", "head:1", "--seeds", *seeds, "--shots", 4, "--tune", "epochs=1",
                "--fit", "epochs=1", "--lam", 8, "--tau", 0.3, "--reference", "zero-shot",
            )  # fmt: skip
            assert len(found["cells"]) == len(datasets) * len(seeds)
            (line,) = (line for line in found["lines"] if line["row"] == "zero-shot")
            return line["errors"]["all"]

        one = error("a", seeds=[1])
        assert one > 1
        assert error("a", seeds=[1, 2]) == pytest.approx(one, rel=1e-9)
        assert error("a", "b", seeds=[1]) == pytest.approx(one / 2**0.5, rel=0.1)


def run(*arguments):
    """A command's JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
