"""A random split is stable: images that come, go or are renamed hardly move others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mergetune.data import ImageFolder


def write(root: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def sides(root: Path, **options) -> dict[bytes, str]:
    """Content of a file -> its split."""
    data = ImageFolder(root, **options)
    lists = {"train": data.full_train, "val": data.full_val, "test": data.full_test}
    return {path.read_bytes(): split for split, found in lists.items() if found for path in found.paths}


def moved(before: dict[bytes, str], after: dict[bytes, str]) -> dict[tuple[str, str], int]:
    """(from, to) -> images that are in both and changed sides."""
    found: dict[tuple[str, str], int] = {}
    for content in before.keys() & after.keys():
        if before[content] != after[content]:
            way = before[content], after[content]
            found[way] = found.get(way, 0) + 1
    return found


@pytest.mark.parametrize("count", [5, 11, 24, 57, 100])
@pytest.mark.parametrize("large", [False, True], ids=["small", "same beginning"])
def test_an_image_more_or_less_moves_at_most_one_across_each_cut(tmp_path, count, large):
    head = bytes(1 << 16) if large else b""  # large files of equal size that differ behind their beginning
    noise = random.Random(count)
    write(tmp_path, {f"cat/{i}.png": head + noise.randbytes(8) for i in range(count)})
    write(tmp_path, {f"dog/{i}.png": noise.randbytes(8) for i in range(9)})
    before = sides(tmp_path)
    for i in range(6):
        extra = tmp_path / "cat" / f"more-{i}.png"
        extra.write_bytes(head + noise.randbytes(8))
        after = sides(tmp_path)
        for pair in ({"train", "val"}, {"val", "test"}, {"train", "test"}):
            crossing = sum(n for way, n in moved(before, after).items() if set(way) == pair)
            assert crossing <= (pair != {"train", "test"}), "images moved across a cut"
        before = after
    for i in range(6):
        (tmp_path / "cat" / f"more-{i}.png").unlink()
        after = sides(tmp_path)
        assert sum(moved(before, after).values()) <= 2
        before = after


def test_names_do_not_matter(tmp_path):
    noise = random.Random(0)
    contents = [noise.randbytes(8) for _ in range(30)]
    write(tmp_path / "a", {f"cat/{i}.png": content for i, content in enumerate(contents)})
    write(tmp_path / "b", {f"cat/x{i}/{content.hex()}.jpg": content for i, content in enumerate(contents)})
    for folder in ("a", "b"):
        write(tmp_path / folder, {f"dog/{i}.png": noise.randbytes(8) for i in range(8)})
    one, other = sides(tmp_path / "a"), sides(tmp_path / "b")
    assert {c: one[c] for c in contents} == {c: other[c] for c in contents}
    assert sides(tmp_path / "a", seed=1) != one


@pytest.mark.parametrize(("val", "test"), [(None, None), (0.0, 0.5), (0.1, 0.1), (0.4, 0.4)])
@pytest.mark.parametrize("count", [4, 10, 33])
def test_shares_are_kept(tmp_path, val, test, count):
    write(tmp_path, {f"{name}/{i}.png": f"{name} {i}".encode() for name in ("cat", "dog") for i in range(count)})
    data = ImageFolder(tmp_path, val=val, test=test)
    shares = {"val": 0.2 if val is None else val, "test": 0.3 if test is None else test}
    for split, share in shares.items():
        found = getattr(data, f"full_{split}")
        assert (found is None) == (not share)
        if found is not None:
            assert all(abs(number - share * count) <= 1 and number for number in found.counts)


def test_copies_stay_together_whatever_else_comes(tmp_path):
    noise = random.Random(3)
    write(tmp_path, {f"cat/{i}.png": noise.randbytes(8) for i in range(12)})
    for i in range(12):  # every picture twice, and some in another class
        write(tmp_path, {f"cat/copy-{i}.png": (tmp_path / f"cat/{i}.png").read_bytes()})
    write(tmp_path, {f"dog/{i}.png": noise.randbytes(8) for i in range(9)})
    write(tmp_path, {f"dog/stray-{i}.png": (tmp_path / f"cat/{i}.png").read_bytes() for i in range(3)})
    for seed in range(4):
        data = ImageFolder(tmp_path, seed=seed)
        found = [{p.read_bytes() for p in part.paths} for part in (data.train, data.val, data.test)]
        assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
