"""The team's server in containers: built, used, killed, backed up, restored and upgraded, by deploy/README.md."""

import html
import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import requests
from containers import in_containers, why_no_engine
from deployment import DEPLOY, readme_commands, writing
from execution import ROOT, wait_until
from mlflow.exceptions import MlflowException
from nbconvert.filters import markdown2html
from nbval.plugin import get_sanitize_patterns
from serving import NAME
from sklearn.datasets import load_iris

# The guides take several minutes in the container, so they run there only if asked for: CONTAINER_GUIDES=on. Guides 03
# and 04 go on with what the guides before them have left; test_deploy_guides.py compares these two.
GUIDES = sorted(f"guides/{path.name}" for path in ROOT.glob("guides/0[125]*.ipynb"))
# The files are in a bucket. CONTAINER_FILES=folder has them in a volume, as test_deploy.py has without containers.
PROFILES = ["metrics"] if os.environ.get("CONTAINER_FILES") == "folder" else ["metrics", "s3"]
COMPARED = ["project.ipynb", *(GUIDES if os.environ.get("CONTAINER_GUIDES") else [])]


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """Give the team's server, running in containers."""
    if reason := why_no_engine():
        pytest.skip(f"no containers: {reason}")  # also where CI is set: not every machine can have an engine
    with in_containers(tmp_path_factory.mktemp("containers"), PROFILES) as running:
        yield running


def test_all_services_start_healthy_and_only_two_are_published(containers):
    listed = containers.run("docker compose ps --format json").stdout
    services = {service["Service"]: service for service in map(json.loads, listed.splitlines())}
    expected = ["database", "prometheus", "server", *(["store"] if "s3" in PROFILES else [])]
    assert {name: service["Health"] for name, service in services.items()} == dict.fromkeys(expected, "healthy")
    published = {
        name: [port["URL"] for port in service["Publishers"] or [] if port["PublishedPort"]]
        for name, service in services.items()
    }
    assert published == {name: ["127.0.0.1"] if name in ("prometheus", "server") else [] for name in expected}


def test_no_process_runs_as_root(containers):
    for service, number in containers.ids().items():
        users = containers.run(f"docker top {number} -eo pid,uid,comm").stdout.splitlines()[1:]
        assert len(users) > 0
        assert [line for line in users if line.split()[1] == "0"] == [], service
    assert containers.run("docker compose run --rm -T experiment id --user").stdout == "10001\n"


def test_database_store_and_figures_cannot_be_reached_from_another_container(containers):
    connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
    reach = f"docker compose run --rm -T experiment .venv/bin/python -c '{connect}'"
    assert containers.run(f"{reach} server 5000").returncode == 0
    for place in ("database 5432", "store 8333", "server 9000"):
        answer = containers.run(f"{reach} {place}", check=False)
        assert answer.returncode == 1, place
        assert re.search("gaierror|timed out|refused|unreachable", answer.stderr)


def test_no_secret_is_in_what_the_engine_shows_or_in_an_image(containers):
    # given what the engine tells of containers, images and volumes; `run` looks for secrets in all of it
    numbers = " ".join(containers.ids().values())
    images = containers.run("docker compose --profile '*' config --images").stdout.split()
    assert len(images) >= 3
    containers.run(
        f"docker inspect {numbers} {' '.join(images)}; docker compose logs; docker compose --profile '*' ps --all"
    )
    for image in images:
        containers.run(f"docker history --no-trunc {image}")
        # then no file in an image has one either, and no .env
        search = "grep --recursive --files-with-matches --fixed-strings --file=- /server /project /home /etc /tmp"
        script = f"({search}; find / -xdev -name '.env*' -path '*deploy*') 2>/dev/null || true"
        looked = subprocess.run(
            ["docker", "run", "--rm", "--interactive", "--user=root", "--entrypoint=sh", image, "-c", script],
            input="\n".join(containers.secrets),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (looked.returncode, looked.stdout) == (0, "")


def test_users_are_refused_what_the_server_alone_decides(containers):
    # given an experiment of ana's
    with containers.client("ana") as client:
        run = client.create_run(client.create_experiment("ana's")).info
        client.log_text(run.run_id, "by ana", "notes.txt")
    # then ben can neither read nor write it, nor choose where his files go, nor list the users
    with containers.client("ben") as client:
        for call in (client.get_run, lambda number: client.log_text(number, "by ben", "notes.txt")):
            with pytest.raises((MlflowException, requests.HTTPError), match="403"):
                call(run.run_id)
        with pytest.raises(MlflowException, match="Only an admin may choose an artifact_location"):
            client.create_experiment("ben's", "file:///artifacts/1")
    assert containers.ask("ben", "GET", "api/2.0/mlflow/users/list").status_code == 403
    # and who has no password, or a wrong one, gets nothing
    address = f"{containers.address}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert requests.get(address, timeout=30).status_code == 401
    assert requests.get(address, auth=("ben", "guess"), timeout=30).status_code == 401


def shown(text: str) -> str:
    """Return what a page shows, without tags and spaces, and with what varies replaced as the tests of notebooks do."""
    text = html.unescape(re.sub(r"<(style|script)[^>]*>.*?</\1>|<[^>]+>", "", text, flags=re.DOTALL))
    for pattern, replacement in get_sanitize_patterns((ROOT / "tests/sanitize.cfg").read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text)
    return "".join(text.split())


@pytest.fixture(scope="module")
def pages(containers, heart_disease):
    """Run the quickstart and the guides in the experiment container as ana; give the text of each page."""
    build = containers.folder / "build"
    build.mkdir()
    build.chmod(0o777)  # the container's user is none of this machine
    (build / NAME).write_bytes(heart_disease)
    mounted = f"--volume {build}:/project/build --env HEART_DISEASE_DATA=/project/build/{NAME}"
    for command in ("make run", "make guides") if os.environ.get("CONTAINER_GUIDES") else ("make run",):
        containers.run(f"docker compose run --rm -T {mounted} experiment {command}", limit=900)
    return {page.stem: shown(page.read_text(encoding="utf-8")) for page in build.glob("*.html")}


@pytest.mark.parametrize("name", COMPARED)
def test_notebook_shows_its_stored_outputs_in_the_experiment_container(name, pages):
    notebook = nbformat.read(ROOT / name, as_version=4)
    stored = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            table, markdown = data.get("text/html"), data.get("text/markdown")
            if "image/png" not in data and "nbval-ignore-output" not in cell.metadata.get("tags", []):
                text = html.escape(output.get("text") or data.get("text/plain") or "")
                stored.append(shown(table or (markdown and markdown2html(markdown)) or text))
    assert len(stored) > 3
    assert [text for text in stored if text not in pages[Path(name).stem]] == []


def test_prometheus_reads_the_server_and_knows_the_alerts(containers):
    address = f"http://127.0.0.1:{containers.settings['PROMETHEUS_PORT']}/api/v1"

    def healths() -> dict[str, str]:
        targets = requests.get(f"{address}/targets", timeout=30).json()["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in targets}

    wait_until(lambda: healths()["server"] == "up")
    assert healths() == {"server": "up", "model": "down"}  # no model is served
    (group,) = requests.get(f"{address}/rules", timeout=30).json()["data"]["groups"]
    assert len(group["rules"]) == 5
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


@pytest.mark.parametrize("service", ["server", "database"])
def test_a_killed_container_loses_nothing_that_was_acknowledged(service, containers, tmp_path):
    with writing(containers.as_user("admin"), tmp_path) as acknowledged:
        # given a writer
        wait_until(lambda: len(acknowledged()) > 20)
        # when a container is killed under it, and started again
        containers.run(f"docker kill --signal=KILL {containers.ids()[service]}")
        early = acknowledged()
        containers.run("docker compose up --detach --wait")
        # then the writer goes on, without a new start
        wait_until(lambda: len(acknowledged()) > len(early))
        run_id, *numbers = acknowledged()
    # and all that was acknowledged is there
    with containers.client("admin") as client:
        there = {metric.step for metric in client.get_metric_history(run_id, "number")}
    assert len(numbers) > 20
    assert there.issuperset(map(int, numbers))


def test_down_keeps_the_data_and_up_finds_it(containers):
    with containers.client("ana") as client:
        run = client.create_run(client.create_experiment("kept")).info
        client.log_text(run.run_id, "by ana", "notes.txt")
    containers.run("docker compose down")
    assert containers.ids() == {}
    containers.run(containers.up)
    with containers.client("ana") as client:
        assert Path(client.download_artifacts(run.run_id, "notes.txt")).read_text() == "by ana"


# As a guide does it, in the experiment container: train, sign and release.
RELEASE = """
from pathlib import Path
import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from mlflow_lifecycle.signing.keys import own_key
from mlflow_lifecycle.releases.gate import GateSettings
from mlflow_lifecycle.releases.release import release
from mlflow_lifecycle.signing.statement import register_candidate

iris = load_iris(as_frame=True)
rows = iris.data.assign(species=iris.target_names[iris.target])
train, test = rows.iloc[::2], rows.iloc[1::2]
mlflow.set_experiment("served")
with mlflow.start_run():
    model = LogisticRegression(max_iter=1000).fit(train.drop(columns="species"), train["species"])
    signature = mlflow.models.infer_signature(train.drop(columns="species"), train["species"])
    pins = {"pip_requirements": "model_requirements.txt", "input_example": train.drop(columns="species").head(3)}
    mlflow.sklearn.save_model(model, "/tmp/model", signature=signature, **pins)
    key, lock = own_key(), Path("requirements.txt")
    version = register_candidate(Path("/tmp/model"), "served", key=key, lock=lock, training_rows=train)
settings = GateSettings({"accuracy_score": 0.8}, rebuild=False)
sentences = {"intended_use": "a test", "limits": "all else"}
release(f"models:/served/{version.version}", test, "species", settings, key=key, **sentences)
"""


def test_a_released_version_is_served_from_a_container_that_reaches_no_database_and_no_private_key(containers):
    # given a release of ana's, which ben may read, once the server has her public key
    (containers.folder / "release.py").write_text(RELEASE)
    run = f"docker compose run --rm -T --volume {containers.folder}/release.py:/release.py:ro experiment"
    refused = containers.run(f"{run} .venv/bin/python /release.py", check=False)
    assert "The server has no public key to verify it with" in refused.stderr
    save_key, serve = readme_commands("Serve a model")
    containers.run(f"{save_key} && cp signing_key.pub public_keys")
    containers.run(f"{run} .venv/bin/python /release.py")
    with containers.client("ana") as client:
        experiment = client.get_experiment_by_name("served").experiment_id
    for kind, name in {"registered_model": "served", "experiment": experiment}.items():
        granted = {"username": "ben", "resource_type": kind, "resource_id": name, "permission": "READ"}
        containers.ask("ana", "POST", "api/3.0/mlflow/users/permissions/grant", json=granted).raise_for_status()
    # when it is served as the README says
    containers.run(serve)
    # then it answers
    address = f"http://127.0.0.1:{containers.settings['MODEL_PORT']}"
    rows = {"dataframe_split": {"columns": list(load_iris(as_frame=True).data), "data": [[5.1, 3.5, 1.4, 0.2]]}}
    assert requests.post(f"{address}/invocations", json=rows, timeout=60).json()["predictions"] == ["setosa"]
    # and its container has no private key, and no way to the database
    assert containers.run("docker compose exec -T model ls /project/keys").stdout == ""
    connect = "import socket; socket.create_connection(('database', 5432), timeout=5)"
    assert containers.run(f'docker compose exec -T model python -c "{connect}"', check=False).returncode == 1
    containers.run("docker compose --profile serve rm --stop --force model")


def test_moves_of_an_alias_are_shown_as_the_readme_says(containers):
    with containers.client("ana") as client:
        client.create_registered_model("moved")
        run = client.create_run(client.create_experiment("moved")).info
        client.create_model_version("moved", run.artifact_uri, run.run_id)
        client.set_registered_model_alias("moved", "champion", 1)
    (command,) = readme_commands("Protected aliases")
    newest = containers.run(command).stdout.splitlines()[2]
    assert [value.strip() for value in newest.split("|")][1:] == ["ana", "moved", "champion", "", "1"]


@pytest.mark.skipif("s3" not in PROFILES, reason="the files are in the volume: CONTAINER_FILES=folder")
def test_files_of_the_volume_are_copied_to_the_bucket_as_the_readme_says(containers):
    write = "mkdir -p /artifacts/from_the_volume && echo by ana > /artifacts/from_the_volume/notes.txt"
    containers.run(f"docker compose run --rm -T server sh -c '{write}'")
    containers.follow("Files in a bucket")
    listed = containers.run("docker compose run --rm -T server python artifacts.py save | tar --list").stdout
    assert "from_the_volume/notes.txt" in listed.splitlines()


def models(containers) -> list[tuple[str, str]]:
    """Return each version of ana's, and the run that made it."""
    with containers.client("ana") as client:
        return [(version.name, str(version.version), version.run_id) for version in client.search_model_versions()]


def test_backup_and_restore_by_the_readme_bring_back_what_was_wiped(containers):
    # given runs with files, and a backup
    with containers.client("ana") as client:
        run = client.create_run(client.create_experiment("backed up")).info
        client.log_text(run.run_id, "by ana", "notes.txt")
    before = models(containers)
    # and a private key of the experiment container's
    inside = "docker compose run --rm -T experiment"
    containers.run(f"{inside} sh -c 'umask 077; echo secret > keys/a_key'")
    save, bring_back = re.findall(r"(?m)^- `(.* --directory=keys .*)`$", (DEPLOY / "README.md").read_text())
    containers.follow("Back up")
    containers.run(save)
    backup = containers.folder / "deploy/backup"
    assert [path.name for path in [backup, *backup.iterdir()] if path.stat().st_mode & 0o077] == []
    # when all volumes are removed, and the backup is restored
    containers.run("docker compose --profile '*' down --volumes")
    containers.follow("Restore")
    containers.run(bring_back)
    # then users, runs, files and the key are back
    assert containers.run(f"{inside} sh -c 'cat keys/a_key; stat -c %a keys/a_key'").stdout == "secret\n600\n"
    assert models(containers) == before
    with containers.client("ana") as client:
        assert Path(client.download_artifacts(run.run_id, "notes.txt")).read_text() == "by ana"


def test_upgrade_by_the_readme_keeps_everything(containers):
    with containers.client("ana") as client:
        run = client.create_run(client.create_experiment("upgraded")).info
    before = models(containers)
    containers.follow("Upgrade")
    assert models(containers) == before
    with containers.client("ana") as client:
        assert client.get_run(run.run_id).info.status == "RUNNING"


def test_what_was_deleted_is_removed_as_the_readme_says(containers):
    # given a run with a file, which was deleted
    with containers.client("ana") as client:
        run = client.create_run(client.create_experiment("grows")).info
        client.log_text(run.run_id, "by ana", "notes.txt")
        client.delete_run(run.run_id)
    # when
    (command,) = [line for line in readme_commands("Disk usage and clean-up") if " gc " in line]
    containers.run(re.sub(r"--older-than=\w+", "--older-than=0d0h0m0s", command))
    # then run and file are gone
    with containers.client("ana") as client, pytest.raises(MlflowException, match=r"not found|403"):
        client.get_run(run.run_id)
    listed = containers.run("docker compose run --rm -T server python artifacts.py save | tar --list").stdout
    assert listed.count("/") > 0
    assert run.run_id not in listed
