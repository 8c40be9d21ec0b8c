"""audit: what is found, what is not hidden, and that "not audited" is never "nothing found"."""

import contextlib
import json
import re
import zipfile
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from versions import LOCK, NAME, register, save

from mlflow_lifecycle import audit
from mlflow_lifecycle.audit import Finding, audit_model, audit_pins, is_affected, serve_database
from mlflow_lifecycle.cli import main
from mlflow_lifecycle.exceptions import InvalidInputError, NotAuditedError
from mlflow_lifecycle.signing.keys import own_public_key

VERSION = "1.5.9"
PINS = [f"scikit-learn=={VERSION}", "typing_extensions==4.15.0", "httpx[http2]==0.28.1"]

PINNED = re.search(r"(?m)^scikit-learn==([\w.]+)", LOCK.read_text())[1]


def advisory(package: str, *events: dict, identifier: str = "GHSA-1", ecosystem: str = "PyPI", **more) -> dict:
    """Return an advisory in OSV's format."""
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, *events]}]
    affected = {"package": {"ecosystem": ecosystem, "name": package}, "ranges": ranges}
    return {"id": identifier, "modified": "2026-01-01T00:00:00Z", "affected": [affected], **more}


def database(folder: Path, *advisories: dict) -> Path:
    """Write an archive of OSV's database and return it."""
    path = folder / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for item in advisories:
            archive.writestr(f"{item['id']}.json", json.dumps(item))
    return path


def audit_with(folder: Path, *advisories: dict, **options) -> list[Finding]:
    with serve_database(database(folder, *advisories)) as service:
        return audit_pins(PINS, service, **options)


def test_vulnerabilities_are_found_with_the_versions_that_have_them_no_more(tmp_path):
    # given advisories for these packages, one of which writes a name in another way
    known = [
        advisory("scikit-learn", {"fixed": "2.0"}),
        advisory("Typing.Extensions", {"fixed": "5"}, identifier="GHSA-2"),
        advisory("httpx", identifier="GHSA-3"),
    ]
    # and others for older versions, withdrawn, ignored, and of another registry
    known += [
        advisory("scikit-learn", {"fixed": VERSION}, identifier="GHSA-4"),
        advisory("scikit-learn", identifier="GHSA-5", withdrawn="2026-02-01T00:00:00Z"),
        advisory("scikit-learn", identifier="GHSA-6"),
        advisory("scikit-learn", identifier="GHSA-7", ecosystem="npm"),
    ]
    # then
    found = audit_with(tmp_path, *known, ignored=["GHSA-6"])
    assert sorted(found, key=lambda finding: finding.id) == [
        Finding("GHSA-1", "scikit-learn", VERSION, ["2.0"]),
        Finding("GHSA-2", "typing-extensions", "4.15.0", ["5"]),
        Finding("GHSA-3", "httpx", "0.28.1", []),
    ]


@pytest.mark.parametrize(
    ("version", "events", "affected"),
    [
        ("1.5", [{"introduced": "1"}, {"fixed": "1.5"}], False),
        ("1.5", [{"introduced": "1"}, {"last_affected": "1.5"}], True),
        ("1.6", [{"introduced": "1"}, {"last_affected": "1.5"}], False),
        ("0.9", [{"introduced": "1"}], False),
        ("2.1", [{"introduced": "0"}, {"fixed": "1"}, {"introduced": "2"}, {"fixed": "3"}], True),
    ],
)
def test_range_holds_its_versions(version, events, affected):
    assert is_affected(version, {"ranges": [{"type": "ECOSYSTEM", "events": events}]}) == affected


def test_version_can_be_listed():
    assert is_affected("1.5", {"versions": ["1.4", "1.5"]})


def test_service_that_is_down_is_an_error(monkeypatch):
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(NotAuditedError, match=r"gave no result: error: .*sending request"):
        audit_pins(PINS, "http://127.0.0.1:9")


def test_answer_in_another_format_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "FORMAT", "1")
    with pytest.raises(NotAuditedError, match="another format"):
        audit_with(tmp_path)


def test_package_that_was_not_looked_up_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "LOCK", audit.LOCK.replace("{needed}", ""))
    with pytest.raises(NotAuditedError, match="Only 0 of 3 packages were looked up"):
        audit_with(tmp_path)


def test_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "all.zip").write_text("no")
    with (
        pytest.raises(InvalidInputError, match="is not an archive of OSV's database"),
        serve_database(tmp_path / "all.zip"),
    ):
        pass


@pytest.fixture(scope="module")
def named(store):
    """Give the client of a store whose version 1 has an alias, and whose version 2 has none."""
    client = mlflow.MlflowClient()
    register(store, metadata={"note": "another one"})
    client.set_registered_model_alias(NAME, "production", "1")
    with contextlib.chdir(store):
        yield client


def run(*arguments: object):
    return CliRunner().invoke(main, ["audit", NAME, *map(str, arguments)])


def test_versions_with_an_alias_are_audited_and_others_if_asked_for(named, tmp_path):
    path = database(tmp_path, advisory("scikit-learn"))
    (found,) = audit_model(NAME, own_public_key(), database=path)
    assert (found.uri, found.aliases, found.unsigned) == (f"models:/{NAME}/1", ["production"], "")
    assert found.packages > 50
    assert [finding.package for finding in found.findings] == ["scikit-learn"]
    assert len(audit_model(NAME, own_public_key(), database=path, all_versions=True)) == 2


def test_list_that_is_not_signed_is_audited_and_said_so(named, tmp_path):
    (found,) = audit_model(NAME, None, database=database(tmp_path, advisory("scikit-learn")))
    assert found.unsigned == "There is no public key to verify it with"
    assert len(found.findings) == 1


def test_failure_at_one_version_does_not_hide_what_is_found_in_another(named, tmp_path):
    # given a version whose list is loose, without a signature
    with mlflow.start_run():
        folder = save(tmp_path / "loose", pip_requirements=["scikit-learn>=1"])
        logged = mlflow.initialize_logged_model("loose")
        named.log_model_artifacts(logged.model_id, str(folder))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        loose = mlflow.register_model(f"models:/{logged.model_id}", NAME)
    named.set_registered_model_alias(NAME, "next", loose.version)
    # when
    answer = run("--database", database(tmp_path, advisory("scikit-learn")))
    named.delete_registered_model_alias(NAME, "next")
    named.delete_model_version(NAME, loose.version)
    # then
    assert answer.exit_code == 2
    assert f"GHSA-1 in scikit-learn {PINNED}, fixed in no version" in answer.stdout
    assert "not audited: " in answer.stdout
    assert "leaves the version open" in answer.stdout


def test_command_ends_with_1_if_something_is_found_and_names_the_next_step(named, tmp_path):
    path = database(tmp_path, advisory("scikit-learn", {"fixed": "2.0"}))
    answer = run("--database", path)
    assert answer.exit_code == 1
    assert "fixed in 2.0" in answer.stdout
    assert f"lifecycle renew models:/{NAME}/1 --requirements FILE --lock FILE" in answer.stdout
    # and the result is JSON for a program
    (found,) = json.loads(run("--json", "--database", path).stdout)
    assert found["findings"] == [{"id": "GHSA-1", "package": "scikit-learn", "version": PINNED, "fixed_in": ["2.0"]}]


def test_command_ends_with_0_if_nothing_is_found(named, tmp_path):
    answer = run("--markdown", "--database", database(tmp_path))
    assert answer.exit_code == 0
    assert answer.stdout.splitlines()[:2] == ["| version | result |", "|---|---|"]
    assert "no known vulnerability in" in answer.stdout


def test_model_without_an_alias_is_refused_with_the_command(named):
    named.create_registered_model("other")
    with pytest.raises(InvalidInputError, match="lifecycle audit other --all-versions"):
        audit_model("other", None)
