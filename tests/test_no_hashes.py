"""No message shows a hash: what differs is said in names, counts and values."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cache_cases import BUILD, TinyClip, draw_images, resealed
from fit_cases import QUICK
from safetensors.torch import load_file, save_file
from tiny import NAMES, cache, head, normal, prompt, tiny_clip

from mergetune import FeatureCache, Head, Residual, Stack, cache_features, evaluate, fit, load_solution, tune
from mergetune.experiments.cells import Task
from mergetune.experiments.comparison import heads
from mergetune.experiments.engine import begun
from mergetune.experiments.protocol_plans import Experiment, plan
from mergetune.experiments.protocols import head_of
from mergetune.facts import CompareOptions
from mergetune.solutions import Templates

pytestmark = pytest.mark.usefixtures("one_thread")

HASH = re.compile("[0-9a-fA-F]{8}")


def other_training_images(folder: Path) -> None:
    fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK)
    fit(tiny_clip(), cache(seed=5), prompt(), resume=folder, **QUICK)


def other_solutions(folder: Path) -> None:
    fit(tiny_clip(), cache(), [prompt(), prompt(2)], resume=folder, **QUICK)
    fit(tiny_clip(), cache(), [prompt(), prompt(3)], resume=folder, zero_shot="the {}", **QUICK)


def other_zero_shot(folder: Path) -> None:
    fit(tiny_clip(), cache(), head(), resume=folder, zero_shot=head(4), tau=1.0, **QUICK)
    fit(tiny_clip(), cache(), head(), resume=folder, zero_shot=head(5), tau=1.0, **QUICK)


def other_base(folder: Path) -> None:
    for seed in (1, 2):
        base = Stack(Templates(), Residual(normal(3, 8, seed=seed), NAMES))
        tune(tiny_clip(), cache(), method="residual", base=base, resume=folder, **QUICK)


def other_start(folder: Path) -> None:
    for seed in (1, 2):
        tune(tiny_clip(), cache(), n_ctx=2, resume=folder, **QUICK | {"seed": seed})


def a_damaged_state(folder: Path) -> None:
    fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK)
    file = folder / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fit(tiny_clip(), cache(), prompt(), resume=folder, **QUICK)


def a_solution_of_another_clip(folder: Path) -> None:
    replace(prompt(), backbone="tiny-0", fingerprint=tiny_clip().text_fingerprint).check(tiny_clip(1))


def a_solution_of_other_weights(folder: Path) -> None:
    replace(prompt(), backbone="tiny-1", fingerprint=tiny_clip().text_fingerprint).check(tiny_clip(1))


def a_solution_without_a_name(folder: Path) -> None:
    replace(Head.zero_shot(tiny_clip(), NAMES, ("a {}",)), backbone=None).check(tiny_clip(1))


def a_solution_of_another_checksum(folder: Path) -> None:
    prompt().save(folder)
    save_file(
        {name: tensor + 1 for name, tensor in load_file(folder / "solution.safetensors").items()},
        folder / "solution.safetensors",
    )
    load_solution(folder)


def features_of_another_clip(folder: Path) -> None:
    evaluate(tiny_clip(1), "a {}", cache(fingerprint=tiny_clip().image_fingerprint))


def training_features_of_another_clip(folder: Path) -> None:
    fit(tiny_clip(1), cache(fingerprint=tiny_clip().image_fingerprint), prompt(), **QUICK)


def built(folder: Path, **clip: str) -> FeatureCache:
    return cache_features(TinyClip(**clip), draw_images(folder.parent / "images", 11), folder, **BUILD)


def a_cache_of_another_clip(folder: Path) -> None:
    built(folder, image_fingerprint="0123456789abcdef" * 4)
    built(folder, image_fingerprint="fedcba9876543210" * 4)


def a_cache_on_disk_of_another_clip(folder: Path) -> None:
    evaluate(tiny_clip(), "a {}", replace(cache(fingerprint="ab" * 32), path=built(folder).path))


def other_cells(folder: Path) -> None:
    for seed in (1, 2):
        task = Task("pets", cache(seed=seed), cache(seed=seed + 4))
        for file, record in heads(tiny_clip(seed), [task], CompareOptions(), (0,), (1,)).items():
            begun(folder / file, record)


def other_experts(folder: Path) -> None:
    for seed in (1, 2):
        setup = CompareOptions(experts={"mine": prompt(seed)})
        for file, record in heads(tiny_clip(), [Task("pets", cache(), cache(seed=4))], setup, (0,), (1,)).items():
            begun(folder / file, record)


def other_runs(folder: Path) -> None:
    (run,) = plan("few-shot", datasets=["dtd"], seeds=[1], shots=[1])
    for name, seed in (("tiny", 0), ("tiny", 1)):
        clip = tiny_clip(seed)
        head_there = head_of(run, Experiment(folder, folder), clip)
        head_there["settings"]["clip"] = name
        begun(folder / "run.json", head_there)


def a_checksum_of_another_length(folder: Path) -> None:
    manifest = built(folder).path / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["arrays"][0]["sha256"][0] += "0"
    manifest.write_bytes(resealed(changed))
    FeatureCache.open(folder)


def a_changed_manifest(folder: Path) -> None:
    manifest = built(folder).path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"labels":[0', '"labels":[1'))
    FeatureCache.open(folder)


def changed_rows(folder: Path) -> None:
    (built(folder).path / "arrays.bin").write_bytes(bytes(2 * 11 * 24))
    FeatureCache.open(folder)


CASES: list[Callable[[Path], None]] = [
    other_training_images, other_solutions, other_zero_shot, other_base, other_start, a_damaged_state,
    a_solution_of_another_clip, a_solution_of_other_weights, a_solution_without_a_name, a_solution_of_another_checksum,
    features_of_another_clip, training_features_of_another_clip, a_cache_of_another_clip,
    a_cache_on_disk_of_another_clip, a_checksum_of_another_length, a_changed_manifest,
    changed_rows, other_cells, other_experts, other_runs,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_message_names_what_differs_without_a_hash(case, tmp_path):
    with pytest.raises(ValueError) as caught:
        case(tmp_path / "place")
    message = str(caught.value).replace(str(tmp_path), "")
    assert not HASH.search(message), message
    assert any(word in message for word in (" there", " got ", " in both")), message
