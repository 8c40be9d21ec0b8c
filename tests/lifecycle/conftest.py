"""Stores with released versions, which the tests of releases share."""

import pytest
from releases import make_store
from versions import restored, store_in


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """Give a folder with a store in which version 1 is in production."""
    return make_store(tmp_path_factory.mktemp("once") / "project", 1)


@pytest.fixture(scope="module")
def made_twice(tmp_path_factory):
    """Give a folder with a store in which version 2 is in production, and version 1 was."""
    return make_store(tmp_path_factory.mktemp("twice") / "project", 1, 2)


@pytest.fixture
def folder(made_once, monkeypatch):
    """Give the folder with the store in which version 1 is in production. After the test it is as it was."""
    with restored(made_once), store_in(made_once, monkeypatch):
        yield made_once


@pytest.fixture
def twice(made_twice, monkeypatch):
    """Give the folder with the store in which version 2 replaced version 1. After the test it is as it was."""
    with restored(made_twice), store_in(made_twice, monkeypatch):
        yield made_twice
