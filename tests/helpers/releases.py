"""A store with released versions to test with."""

import shutil
from pathlib import Path

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from versions import iris_rows, register, store_in

from mlflow_lifecycle.releases.gate import GateSettings
from mlflow_lifecycle.releases.release import Release, release
from mlflow_lifecycle.signing.keys import own_key

ROWS_TRAIN, ROWS_TEST = train_test_split(iris_rows(), test_size=0.2, stratify=iris_rows()["species"], random_state=42)
SENTENCES = {"intended_use": "To learn with.", "limits": "Three species only."}
SETTINGS = GateSettings({"accuracy_score": 0.5}, rebuild=False)


def make_store(folder: Path) -> list[Path]:
    """Make a store with a cautious version, a good one, and another cautious one, and release the first two in turn.

    Return copies of the folder: one made after the first release, and one made after the second.
    """
    folder.mkdir()
    copies = []
    with pytest.MonkeyPatch.context() as monkeypatch, store_in(folder, monkeypatch):
        for strength in (0.01, 1.0, 0.01):
            register(folder, LogisticRegression(C=strength, max_iter=1000), ROWS_TRAIN)
        for number in (1, 2):
            released(f"models:/iris/{number}")
            copies.append(shutil.copytree(folder, folder.with_name(f"after release {number}")))
    return copies


def released(uri: str = "models:/iris/2", rows=ROWS_TEST, target="species", settings=SETTINGS, **options) -> Release:
    """Release a version, without building its environment, unless ``settings`` say otherwise."""
    return release(uri, rows, target, settings, **({"key": own_key()} | SENTENCES | options))
