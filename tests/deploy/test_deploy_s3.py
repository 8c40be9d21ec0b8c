"""The team's server with its files in a bucket: nobody but the server has the bucket's key, and nothing is lost."""

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from deployment import DEPLOY, PASSWORDS, deployed, follow, logged, predict
from execution import copy_project, differing_outputs, wait_until
from kernels import execute_in, running_kernel
from object_store import BUCKET, object_store, program
from postgresql import programs

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux"),
]
NOTEBOOKS = ["project.ipynb", "guides/04_release_and_report.ipynb", "guides/07_keep_pins_current.ipynb"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, lacking):
    """Give the S3 store, running and empty."""
    if program() is None:
        lacking("SeaweedFS", "make postgresql")
    with object_store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(scope="module")
def team(store, tmp_path_factory, lacking):
    """Give the server, which keeps its files in that store."""
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    with deployed(tmp_path_factory.mktemp("team"), store.settings) as team:
        yield team


@pytest.fixture(scope="module")
def without_credentials():
    """Let no program of these tests have credentials of a bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="module", params=NOTEBOOKS)
def on_the_server(request, team, tmp_path_factory, without_credentials):
    """Execute a notebook as ana, in a kernel of its own. Give its name and the folder with its copy."""
    team.empty()
    name = request.param
    notebook = copy_project(tmp_path_factory.mktemp("notebook"), name)
    folder = notebook.parent
    variables = team.as_user("ana") | {"REBUILD_ENVIRONMENT": "off" if "04" in name else "on"}
    with running_kernel(tmp_path_factory.mktemp("kernel")) as kernel:
        assert execute_in(kernel, notebook, folder, **variables) == ""
    return name, folder


def test_notebook_gives_its_stored_outputs_with_its_files_in_a_bucket(on_the_server, store, team):
    name, folder = on_the_server
    differing = differing_outputs(folder, name)
    if "04" in name:  # the checks of the gate
        (table,) = differing
        assert "skipped on request" in table
    else:
        assert differing == []
    assert any(file.endswith("/MLmodel") for file in store.files())
    assert list(team.artifacts.iterdir()) == []


@pytest.fixture
def run(team):
    """Give the id of a new run of ana's, and the folder of its files in the bucket."""
    with team.client("ana") as client:
        experiment = client.get_experiment_by_name("files")
        number = experiment.experiment_id if experiment else client.create_experiment("files")
        info = client.create_run(number).info
        yield info.run_id, info.artifact_uri.removeprefix("mlflow-artifacts:/")


def test_large_file_goes_to_the_bucket_in_parts_and_comes_back(run, team, store, tmp_path):
    # given a file of 20 MB
    run_id, folder = run
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(20_000_000))
    # when
    with team.client("ana") as client:
        client.log_artifact(run_id, str(large))
        back = client.download_artifacts(run_id, "large.bin", str(tmp_path / "back.bin"))
    # then the store has it in parts: their number ends its ETag
    assert store.files()[f"{folder}/large.bin"].strip('"').partition("-")[2] == "3"
    assert Path(back).read_bytes() == large.read_bytes()


@pytest.mark.parametrize("forced", [False, True], ids=["by default", "asked for by the client"])
def test_client_that_cannot_reach_the_bucket_sends_and_gets_large_files(
    forced, run, team, store, tmp_path, monkeypatch
):
    # given a client for which every other address than the server's is closed
    run_id, _ = run
    if forced:
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1000000")
    asked = []
    request = requests.Session.request

    def at_the_server(session, method, url, **options):
        asked.append(url)
        assert url.startswith(team.address), url
        return request(session, method, url, **options)

    monkeypatch.setattr(requests.Session, "request", at_the_server)
    large = tmp_path / "forced.bin"
    large.write_bytes(os.urandom(6_000_000))
    # when it sends a large file, and gets it back
    with team.client("ana") as client:
        client.log_artifact(run_id, str(large))
        back = client.download_artifacts(run_id, "forced.bin", str(tmp_path / "back"))
    # then it has asked the server alone
    assert Path(back).read_bytes() == large.read_bytes()
    assert asked != []


@pytest.mark.parametrize("way", ["presigned/1/x/artifacts/notes.txt", "mpu/create/1/x/artifacts"])
def test_server_signs_no_address_in_the_bucket(way, team):
    address = f"{team.address}/api/2.0/mlflow-artifacts/{way}"
    method = "GET" if way.startswith("presigned") else "POST"
    body = {"path": "1/x/artifacts/notes.txt", "num_parts": 1}
    answer = requests.request(method, address, json=body, auth=("admin", PASSWORDS["admin"]), timeout=30)
    assert answer.status_code == 501
    assert "Signature" not in answer.text


def test_nobody_reaches_the_bucket_without_its_key(store):
    for path in (f"{BUCKET}/", f"{BUCKET}/1/x", ""):
        assert requests.get(f"{store.address}/{path}", timeout=30).status_code == 403
        assert requests.put(f"{store.address}/{path}x", data=b"evil", timeout=30).status_code in (403, 405)


def test_file_of_another_user_is_refused_as_with_a_folder(run, team):
    _, folder = run
    address = f"{team.address}/api/2.0/mlflow-artifacts/artifacts/{folder}/notes.txt"
    for method in ("GET", "PUT", "DELETE"):
        answer = requests.request(method, address, data=b"evil", auth=("ben", PASSWORDS["ben"]), timeout=30)
        assert answer.status_code == 403


def test_what_was_acknowledged_survives_a_kill_of_the_store(run, team, store):
    # given four programs that upload files of a model's size, one after the other
    _, folder = run
    ended, acknowledged, failed = [], {}, []

    def upload(number: int) -> None:
        for count in range(10_000):
            if ended:
                return
            name, content = f"{number}/{count}.bin", os.urandom(3_000_000)
            address = f"{team.address}/api/2.0/mlflow-artifacts/artifacts/{folder}/{name}"
            try:
                answer = requests.put(address, data=content, auth=("ana", PASSWORDS["ana"]), timeout=120)
            except requests.RequestException:
                failed.append(name)
                continue
            if answer.status_code == 200:
                acknowledged[name] = content
            else:
                failed.append(name)

    with ThreadPoolExecutor(4) as executor:
        uploads = [executor.submit(upload, number) for number in range(4)]
        try:
            wait_until(lambda: len(acknowledged) >= 8)
            # when the store is killed while they do, and started again
            store.kill()
            before = len(acknowledged)
            time.sleep(2)
            store.start()
            wait_until(lambda: len(acknowledged) >= before + 8)
        finally:
            ended.append(True)
        for ended_upload in uploads:
            ended_upload.result()
    # then every file that was acknowledged is there and whole
    assert failed != []
    with requests.Session() as session:
        session.auth = ("ana", PASSWORDS["ana"])
        for name, content in acknowledged.items():
            address = f"{team.address}/api/2.0/mlflow-artifacts/artifacts/{folder}/{name}"
            assert session.get(address, timeout=60).content == content, name


@pytest.fixture
def quickstart(team, kernel, tmp_path, without_credentials):
    """Execute the quickstart as ana in an empty store."""
    team.empty()
    notebook = copy_project(tmp_path / "project")
    assert execute_in(kernel, notebook, notebook.parent, **team.as_user("ana")) == ""


def test_backup_wipe_and_restore_bring_back_what_is_in_the_bucket(team, store, tmp_path, quickstart):
    # given what is on the server, and a backup by the README
    with team.client("admin") as client:
        before = logged(client), predict(team, "ana")
    files = store.files().keys()
    follow("Back up", team, tmp_path)
    # when all is wiped and restored
    team.kill()
    for name in ("mlflow", "mlflow_auth"):
        team.database.run(["dropdb", name])
    for name in files:
        store.client().delete_object(Bucket=BUCKET, Key=name)
    team.prepare_database()
    follow("Restore", team, tmp_path)
    # then it is all there
    with team.client("admin") as client:
        assert (logged(client), predict(team, "ana")) == before
    assert store.files().keys() == files


def artifacts(team, action: str, destination: str, **options) -> subprocess.CompletedProcess:
    """Run artifacts.py as the server's container does, with another destination."""
    command = team.command(["python", "artifacts.py", action])
    variables = team.variables | {"ARTIFACTS_DESTINATION": destination}
    return subprocess.run(command, cwd=team.folder, env=variables, check=True, capture_output=True, **options)


def test_files_move_from_a_folder_to_a_bucket(team, store, tmp_path):
    # given a folder with files
    names = {"1/abc/artifacts/notes.txt": b"notes", "2/models/m-1/artifacts/model.skops": os.urandom(9_000_000)}
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    # when
    saved = artifacts(team, "save", str(tmp_path)).stdout
    artifacts(team, "restore", f"s3://{BUCKET}/below/a prefix", input=saved)
    # then
    for name, content in names.items():
        there = store.client().get_object(Bucket=BUCKET, Key=f"below/a prefix/{name}")["Body"]
        with contextlib.closing(there):
            assert there.read() == content
    printed = artifacts(team, "size", f"s3://{BUCKET}/below/a prefix", text=True).stdout
    assert printed == "2 files, 9,000,005 bytes\n"


def test_bucket_that_was_not_made_yet_is_empty(team):
    assert artifacts(team, "size", "s3://not-made-yet", text=True).stdout == "0 files, 0 bytes\n"


def test_archive_that_leads_out_of_the_store_is_refused(tmp_path, monkeypatch):
    import io
    import tarfile

    monkeypatch.syspath_prepend(DEPLOY)
    import artifacts

    for name in ("../evil.txt", "/evil.txt", "1/../../evil.txt"):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as writing:
            writing.addfile(tarfile.TarInfo(name))
        archive.seek(0)
        with pytest.raises(ValueError, match="leads out of the store"):
            artifacts.restore(artifacts.Folder(tmp_path), archive)
    assert list(tmp_path.iterdir()) == []
