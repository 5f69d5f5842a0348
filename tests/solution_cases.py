"""Solutions of each kind."""

from dataclasses import replace

import torch
from tiny import NAMES, normal, parameter

from mergetune import FrozenClip, Head, Prompt

TEMPLATE = "a photo of a {}."


def make(clip: FrozenClip, kind: str):
    known = {"backbone": clip.name, "notes": {"origin": "test", "list": [1, 2.5, None]}}
    if kind == "shared":
        return Prompt(normal(4, 16), TEMPLATE, fingerprint=clip.text_fingerprint, **known)
    if kind == "front":
        return replace(make(clip, "shared"), position="front")
    if kind == "class-specific":
        return Prompt(normal(3, 4, 16), TEMPLATE, NAMES, fingerprint=clip.text_fingerprint, **known)
    bias = normal(3, seed=1) if kind == "head with bias" else None
    return Head(normal(3, 8), NAMES, bias, logit_scale=12.5, fingerprint=clip.image_fingerprint, **known)


KINDS = ["shared", "front", "class-specific", "head", "head with bias"]


def assert_same(a, b):
    assert type(a) is type(b)
    assert torch.equal(parameter(a), parameter(b)) and parameter(a).dtype == parameter(b).dtype
    for name in ("template", "position", "classnames", "backbone", "fingerprint", "notes", "logit_scale"):
        assert getattr(a, name, None) == getattr(b, name, None), name
