"""Triton kernels compiled ahead of time, in a process of their own: in the tests' own they are interpreted."""

import json
import os
import subprocess
import sys

import pytest
import triton


def compile_quick(op: str) -> list[dict]:
    """What each of an op's usual configurations takes, for every GPU; the test is skipped without Triton's tools."""
    for tool in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, tool).path  # noqa: B018
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"registers, spills and shared memory are NOT checked: Triton has no {tool} here ({error})")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mergetune.kernels.aot", "--op", op, "--quick", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    assert result.stdout, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_resources(cases: list[dict]) -> None:
    """No spills, and registers and shared memory within the GPU's limits."""
    for case in cases:
        assert case["spill_bytes"] == case["stack_bytes"] == 0, case
        assert 0 < case["registers"] <= 255, case
        assert 0 < case["shared_bytes"] <= case["shared_limit"], case
        assert case["fits"], case
