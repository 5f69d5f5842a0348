"""The torch ops: definitions, implementations (backends), and the choice of a backend.

``ops.<name>`` runs an op, ``ops.reference.<name>`` is its definition. If a call names a backend, this backend runs or
the call raises; nothing falls back silently. Only this package uses torch.ops and the native core.
"""

from mergetune.ops import reference
from mergetune.ops.attention import prefix_attention, prefix_attention_backward
from mergetune.ops.backends import BACKENDS, OPS, Implementation, available_backends
from mergetune.ops.native import build_info
from mergetune.ops.path_loss import lmc_loss, path_cross_entropy
from mergetune.ops.selection import refusals
from mergetune.ops.self_test import self_test
from mergetune.ops.task_vectors import count_around, merge_deltas
from mergetune.ops.verdicts import Trial, Verdict, VerdictFile
from mergetune.ops.verification import ensure_verified, keep, kept_verdicts, verify

__all__ = [
    "BACKENDS",
    "OPS",
    "Implementation",
    "Trial",
    "Verdict",
    "VerdictFile",
    "available_backends",
    "build_info",
    "count_around",
    "ensure_verified",
    "keep",
    "kept_verdicts",
    "lmc_loss",
    "merge_deltas",
    "path_cross_entropy",
    "prefix_attention",
    "prefix_attention_backward",
    "reference",
    "refusals",
    "self_test",
    "verify",
]
