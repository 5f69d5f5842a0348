"""A tiny CLIP that counts, its images, and unfinished caches."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mergetune.data import ImageList

SIDE = 8


@dataclass(frozen=True)
class TinyClip:
    """What cache_features needs of a FrozenClip: a random projection of the pixels."""

    name: str = "tiny"
    embed_dim: int = 6
    image_fingerprint: str = "tiny weights"
    image_dtype: torch.dtype = torch.float32
    preprocess_cfg: dict[str, Any] = field(default_factory=lambda: {"size": (SIDE, SIDE)})
    seconds: float = 0.0
    device: torch.device = torch.device("cpu")

    def preprocess(self, image: Image.Image) -> Tensor:
        pixels = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes()
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1) / 255

    def augment(self, image: Image.Image) -> Tensor:
        return self.preprocess(image) * torch.rand(3, 1, 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        time.sleep(self.seconds)
        weights = torch.randn(3 * SIDE * SIDE, self.embed_dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(pixels.flatten(1) @ weights, dim=-1)


def draw_images(root: Path, count: int, classes: int = 3) -> ImageList:
    noise = random.Random(0)
    root.mkdir(parents=True, exist_ok=True)
    files = [f"{i:03d}.png" for i in range(count)]
    for file in files:
        Image.frombytes("RGB", (SIDE, SIDE), noise.randbytes(3 * SIDE * SIDE)).save(root / file)
    return ImageList(root, files, [i % classes for i in range(count)], [f"class {c}" for c in range(classes)])


def shard_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("shard-*"))}


BUILD = {"shard_size": 4, "batch_size": 3, "views": 2}  # 11 images: shards of 4, 4, 3


@dataclass(frozen=True)
class NoMoreEncoding(TinyClip):
    """Proof that nothing is encoded again."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise AssertionError("encoded again")
