"""Fixtures of the tests of data/."""

from pathlib import Path

import pytest
from cache_cases import draw_images
from coop_cases import CLASSES
from miniature import write_miniature

from mergetune.data import DATASETS


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All fifteen, never changed by a test."""
    root = tmp_path_factory.mktemp("data")
    for name in DATASETS:
        write_miniature(root, name, classes=CLASSES, size=8)
    return root


@pytest.fixture
def images(tmp_path):
    return draw_images(tmp_path / "images", 11)
