"""Every public reader on damaged files: it reads them, or raises a documented error of one sentence with the file.

pytest -m slow tests/slow/test_fuzz.py
FUZZ_SEED=7 FUZZ_CASES=100000 pytest -m slow tests/slow/test_fuzz.py
FUZZ_CASE=1234 pytest -m slow -n 0 tests/slow/test_fuzz.py     one case, in this process
"""

import os

import pytest
from fuzz_readers import READERS
from fuzz_workers import campaign, prepare, run_case

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED", "14"))
CASES = int(os.environ.get("FUZZ_CASES", "24000"))
ONE = os.environ.get("FUZZ_CASE")
ONLY = os.environ.get("FUZZ_ONLY", "")


def test_damaged_files_raise_documented_errors_within_limits(tmp_path, capsys):
    readers = [reader for reader in READERS if ONLY in reader.name]
    prepare(readers, tmp_path)
    if ONE is not None:
        _, _, wrong = run_case(readers, tmp_path, SEED, int(ONE), tmp_path / "work")
        assert not wrong, wrong
        return
    found = campaign(readers, tmp_path, seed=SEED, cases=range(CASES), workers=len(os.sched_getaffinity(0)))
    with capsys.disabled():
        print(f"\n{found.cases:,} cases of {len(readers)} readers in {found.seconds:.0f} s, seed {SEED}")
        for reader in readers:
            counts = [found.outcomes[reader.name, kind] for kind in ("read", "refused", "failed")]
            print(f"{reader.name:24} read {counts[0]:6,}   refused {counts[1]:6,}   failed {counts[2]:4,}")
    assert not found.failures, "\n".join(found.failures)
    assert found.cases == CASES
    assert ONLY or found.cases >= 20_000
    for reader in readers:
        assert found.outcomes[reader.name, "refused"] or not reader.refuses, f"no damage of {reader.name} was noticed"
