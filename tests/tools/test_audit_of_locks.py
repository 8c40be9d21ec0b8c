"""`make audit`: what is found in the locks, and that a failure is not taken for nothing found."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from execution import ROOT

ADVISORY = json.loads((ROOT / "guides/07_pins/GHSA-7f5h-v6xp-fcq8.json").read_text())


@pytest.fixture
def audit(tmp_path):
    """Return a function that audits a requirements file with a database of one advisory."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("advisory.json", json.dumps(ADVISORY))

    def run(path: str, database: str = str(tmp_path / "all.zip")) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "tools/audit.py", path]
        return subprocess.run(command, env=os.environ | {"DATABASE": database}, capture_output=True, text=True)

    return run


def test_vulnerability_in_a_lock_is_found(audit):
    process = audit(ROOT / "guides/07_pins/last_year.txt")
    assert process.returncode == 1, process.stderr
    assert "GHSA-7f5h-v6xp-fcq8 in starlette 0.48.0, fixed in 0.49.1" in process.stdout


def test_all_packages_of_the_largest_lock_are_looked_up(audit):
    process = audit(ROOT / "requirements-scale.txt")
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[1]) > 150


def test_database_that_cannot_be_read_is_no_clean_result(audit, tmp_path):
    process = audit(ROOT / "model_requirements.txt", str(tmp_path / "missing.zip"))
    assert process.returncode == 2
    assert process.stderr.startswith("Not audited: ")
