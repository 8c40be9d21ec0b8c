"""`make audit`: what is found in the locks, and that a failure is not taken for nothing found."""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
from audit import main
from execution import ROOT

ADVISORY = json.loads((ROOT / "guides/07_pins/GHSA-7f5h-v6xp-fcq8.json").read_text())


@pytest.fixture
def audit(tmp_path, monkeypatch):
    """Return a function that audits a requirements file with a database of one advisory."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("advisory.json", json.dumps(ADVISORY))
    monkeypatch.setenv("DATABASE", str(tmp_path / "all.zip"))
    return lambda path: main([str(path)])


def test_all_packages_of_a_lock_are_looked_up_and_a_vulnerability_is_found(audit, capsys):
    assert audit(ROOT / "guides/07_pins/last_year.txt") == 1
    assert "GHSA-7f5h-v6xp-fcq8 in starlette 0.48.0, fixed in 0.49.1" in capsys.readouterr().out
    assert audit(ROOT / "requirements-scale.txt") == 0
    assert int(re.search(r": (\d+) packages", capsys.readouterr().out)[1]) > 150


@pytest.mark.extended  # it takes long
def test_database_that_cannot_be_read_is_no_clean_result(tmp_path):
    command = [sys.executable, ROOT / "tools/audit.py", ROOT / "model_requirements.txt"]
    variables = os.environ | {"DATABASE": str(tmp_path / "missing.zip")}
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("Not audited: ")
