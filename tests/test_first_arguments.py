"""The first arguments of public functions: what was given by mistake is said, with the way on."""

from pathlib import Path

import pytest
import torch
from tiny import NAMES, cache, head

import mergetune as mt

TEXT = "a photo of a {}."
NO_CLIP = r"clip must be a FrozenClip, got ('ViT'|a FeatureCache): mergetune\.load_clip\(NAME, WEIGHTS\) loads one"
NO_CACHE = r"must be cached features, got 'cache/base': mergetune\.FeatureCache\.open\(FOLDER\) opens them"


def dataset() -> mt.Dataset:
    return mt.Dataset("pictures", full_train=mt.ImageList(Path("pictures"), ("a.png",), (0,), ("cat",)))


@pytest.mark.parametrize("given", ["ViT", "features"])
def test_what_is_no_clip_is_refused(given, tmp_path):
    given, features = cache() if given == "features" else given, cache()
    for call in (
        lambda: mt.tune(given, features),
        lambda: mt.fit(given, features, head()),
        lambda: mt.evaluate(given, head(), features),
        lambda: mt.classifier(given, TEXT),
        lambda: mt.connectivity(given, head(), head(), head(), features),
        lambda: mt.Predictor(given, "out"),
        lambda: mt.to_onnx(head(), tmp_path / "a.onnx", clip=given),
        lambda: mt.cache_features(given, dataset().train, tmp_path / "cache"),
        lambda: mt.fit_dataset(given, dataset(), tmp_path / "out"),
    ):
        with pytest.raises(TypeError, match=NO_CLIP):
            call()
    assert not list(tmp_path.iterdir())


def test_what_is_no_cache_is_refused(clip, tmp_path):
    for call in (
        lambda: mt.tune(clip, "cache/base"),
        lambda: mt.tune(clip, cache(), val="cache/base"),
        lambda: mt.fit(clip, "cache/base", head()),
        lambda: mt.fit(clip, cache(), head(), val="cache/base"),
        lambda: mt.evaluate(clip, head(), "cache/base"),
        lambda: mt.connectivity(clip, head(), head(), head(), "cache/base"),
        lambda: mt.predict_features(mt.classifier(clip, head()), "cache/base"),
    ):
        with pytest.raises(TypeError, match=NO_CACHE):
            call()
    with pytest.raises(TypeError, match=r"got a Tensor: .*cache_features\(clip, IMAGES, FOLDER\) makes them"):
        mt.evaluate(clip, head(), torch.eye(len(NAMES)))
    with pytest.raises(TypeError, match="images must be an ImageList, got a Dataset: take its train, val or test"):
        mt.cache_features(clip, dataset(), tmp_path / "cache")
    with pytest.raises(TypeError, match="data must be a Dataset, got 'photos': mergetune.ImageFolder"):
        mt.fit_dataset(clip, "photos", tmp_path / "out")
