"""The files that describe the team's server, its start script, and the commands of deploy/README.md.

What only a container engine can do, the README names; everything else is run here as it is written there.
"""

import contextlib
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
import requests
import yaml
from deployment import DEPLOY, PASSWORDS, SECRETS, follow, logged, predict, readme_commands, secrets_in, services
from execution import MODEL, ROOT, copy_project, finished, git
from kernels import execute_in
from postgresql import programs
from sklearn.datasets import load_iris

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def validated(file: Path) -> subprocess.CompletedProcess:
    """Check a file against the Compose specification's schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


def test_compose_file_follows_the_compose_specification(tmp_path, lacking):
    # given the file, and one with a slip of the pen
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.replace("healthcheck:", "health_check:"))
    # when both are validated
    processes = [validated(DEPLOY / "compose.yaml"), validated(wrong)]
    if "No module named check_jsonschema" in processes[0].stderr:
        lacking("check-jsonschema", "make postgresql")
    # then only the first passes
    assert processes[0].returncode == 0, processes[0].stdout + processes[0].stderr
    assert processes[1].returncode == 1
    assert "health_check" in processes[1].stdout


def test_example_of_the_settings_names_them_all_and_holds_no_value():
    lines = [line for line in (DEPLOY / ".env.example").read_text().splitlines() if line and line[0] != "#"]
    assert all(line.endswith("=") for line in lines)
    of_compose = set(re.findall(r"\$\{(\w+)", COMPOSE)) | {secret["environment"] for secret in secrets_of_compose()}
    assert {line[:-1] for line in lines} == of_compose | {"COMPOSE_PROFILES"}  # Compose's own


def secrets_of_compose() -> list[dict]:
    return list(yaml.safe_load(COMPOSE)["secrets"].values())


def test_secrets_are_in_no_containers_environment():
    names = {secret["environment"] for secret in secrets_of_compose()}
    assert names > SECRETS.keys()
    for service in yaml.safe_load(COMPOSE)["services"].values():
        assert [
            value for value in service.get("environment", {}).values() for name in names if f"${{{name}" in value
        ] == []


def let_in() -> list[str]:
    """Return what a build of the images may see; all else is shut out."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and line[0] != "#"]
    assert patterns[0] == "*"
    assert all(pattern[0] == "!" for pattern in patterns[1:])
    return [pattern[1:] for pattern in patterns[1:]]


def test_settings_and_backups_are_kept_out_of_git_and_of_the_images():
    secret = ["deploy/.env", "deploy/backup/mlflow.dump"]
    assert git(ROOT, "check-ignore", *secret).splitlines() == secret
    assert [name for name in let_in() for path in secret if path.startswith(name)] == []


def test_what_is_published_is_published_to_this_machine_only():
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {
        "server": ["127.0.0.1:5000:5000"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "model": ["127.0.0.1:5001:5001"],
    }


def test_only_the_server_shares_a_network_with_the_database_and_the_store():
    inside = [name for name, service in services().items() if "inside" in service["networks"]]
    assert inside == ["database", "server", "store"]
    networks = yaml.safe_load(COMPOSE)["networks"]
    assert networks["inside"] == networks["metrics"] == {"internal": True}


def test_database_image_is_of_the_version_that_the_tests_run(lacking):
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    answer = subprocess.run([programs() / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    assert services()["database"]["image"].startswith(f"postgres:{answer.split()[-1]}-")


def test_images_are_of_exact_versions_without_rights_and_from_files_that_are_let_in():
    # given each stage of the Dockerfile
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert re.match(r"python:3\.\d+\.\d+-slim-\w+ AS base\n", stages[0])
    for stage in stages[1:]:
        # then it runs as a user of its own
        assert stage.startswith("base AS ")
        assert re.findall(r"^USER (\w+)", stage, flags=re.MULTILINE) == ["mlflow"]
        # and what it copies is there, and let into the build
        for line in re.findall(r"^COPY (?:--chown=\w+ )?(.*) \S+$", stage, flags=re.MULTILINE):
            for name in line.split():
                assert (ROOT / name).exists()
                assert name in let_in()


@pytest.fixture
def started(tmp_path):
    """Return a function that runs a command by the start script, with good secrets unless it is given others."""

    def start(command: list[str], **others: str) -> subprocess.CompletedProcess:
        for name, secret in (SECRETS | others).items():
            (tmp_path / name).write_text(secret)
        variables = {"PATH": os.environ["PATH"], "SECRETS_FOLDER": str(tmp_path)}
        return finished([sys.executable, str(DEPLOY / "start.py"), *command], DEPLOY, variables, limit=30)

    return start


def test_start_script_becomes_the_command(started):
    process = started(["sh", "-c", "echo $$ $PPID; exit 3"])
    assert process.returncode == 3
    assert process.stdout.split()[1] == str(os.getpid())  # no process of the script stays between


def test_start_script_hands_on_the_secrets_where_each_program_looks_for_it(started):
    process = started(["sh", "-c", 'echo "$PGPASSWORD|$MLFLOW_AUTH_ADMIN_PASSWORD|$MLFLOW_FLASK_SERVER_SECRET_KEY"'])
    assert process.stdout == "|".join(SECRETS.values()) + "\n"


@pytest.mark.parametrize("name", SECRETS)
def test_start_is_refused_without_a_secret(name, started, tmp_path):
    (tmp_path / "none").mkdir()
    process = started(["env", f"SECRETS_FOLDER={tmp_path / 'none'}", sys.executable, str(DEPLOY / "start.py"), "true"])
    assert process.returncode == 1
    assert f"{name} is missing" in process.stderr


REASONS = {
    "": "is missing",
    "Sh0rt-0ne!?": "has fewer than 32 characters",
    "a1B2" * 12: "repeats itself",
    "Admin-PASSWORD-1-of-MLflow-4-Postgres": "has words that everybody tries",
    "The-house-by-the-sea-has-2-doors-and-5-windows": "reads like words or a number",
    "31415926535897932384626433832795028841971": "reads like words or a number",
}


@pytest.mark.parametrize(("secret", "reason"), REASONS.items())
def test_start_is_refused_with_a_bad_secret(secret, reason, started):
    for name in SECRETS:
        process = started(["echo", "started"], **{name: secret})
        assert process.returncode == 1
        assert process.stdout == ""
        assert process.stderr == f"Not started: {name} {reason}. Make all three: python3 make_env.py\n"


# What everybody tries: short ones, long ones, and those with a sign, a capital and a digit, as forms ask for.
EVERYBODYS = [
    "123456789012",
    "1234567890123",
    "111111111111",
    "121212121212",
    "000000000000",
    "987654321098",
    "qwertyuiop12",
    "qwertyuiop[]",
    "1q2w3e4r5t6y",
    "1qaz2wsx3edc",
    "zaq12wsxcde3",
    "asdfghjkl123",
    "Password1234",
    "P@ssw0rd1234",
    "Passw0rd!123",
    "password1234",
    "Welcome12345",
    "Welcome2024!",
    "Admin1234567",
    "administrator",
    "changeme1234",
    "letmein12345",
    "iloveyou1234",
    "Sommer2024!!",
    "Mlflow123456",
    "mlflow-server",
    "postgres1234",
    "abcdefghijkl",
    "secretsecret",
]


@pytest.fixture
def reason_against(monkeypatch):
    """Give the function of the start script that judges a secret."""
    monkeypatch.syspath_prepend(DEPLOY)
    import start

    return start.reason_against


def test_what_everybody_tries_is_refused_also_where_it_is_made_long(reason_against):
    for secret in EVERYBODYS:
        for longer in (secret, secret * 3, f"{secret}-{secret.title()}-{secret}"):
            assert reason_against(longer), longer


@pytest.mark.parametrize("made", [secrets.token_urlsafe, secrets.token_hex])
def test_what_is_made_is_taken(made, reason_against):
    refused = [secret for secret in (made(32) for _ in range(300)) if reason_against(secret)]
    assert len(refused) < 300 / 50  # by chance, some of 0 to 9 and a to f alone have little variety


def test_one_command_makes_the_settings_for_the_owner_alone(tmp_path, reason_against):
    # given what the repository has
    for name in ("make_env.py", "start.py", ".env.example"):
        shutil.copy(DEPLOY / name, tmp_path)
    (line,) = [line for line in readme_commands("Start") if "make_env" in line]
    # when the README's command is run twice, for a user whose files all may read
    first, second = (finished(["bash", "-c", f"umask 0; {line}"], tmp_path, dict(os.environ), limit=30) for _ in "12")
    # then the file is there, with secrets that differ and that the server starts with
    assert first.returncode == 0, first.stderr
    settings = (tmp_path / ".env").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", settings, flags=re.MULTILINE))
    made = [values.pop(name) for name in [*SECRETS, "AWS_SECRET_ACCESS_KEY"]]
    assert len(set(made)) == 4
    assert [secret for secret in made if reason_against(secret) or secret in first.stdout] == []
    assert set(values.values()) == {""}
    # and only its owner can read it, and the second one changed nothing
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert second.returncode == 1
    assert "is there already, and stays as it is" in second.stderr
    assert (tmp_path / ".env").read_text() == settings


def test_start_is_refused_where_two_secrets_are_the_same(started):
    process = started(["echo", "started"], POSTGRES_PASSWORD=SECRETS["MLFLOW_SECRET_KEY"])
    assert process.returncode == 1
    assert "POSTGRES_PASSWORD, MLFLOW_ADMIN_PASSWORD, MLFLOW_SECRET_KEY are the same" in process.stderr
    assert secrets_in(process.stderr) == []


@pytest.mark.parametrize("name", ["server", "model"])
def test_health_check_is_one_program(name):
    command, *_, program = services()[name]["healthcheck"]["test"]
    assert command == "CMD"
    compile(program, "health check", "exec")


def test_health_check_of_the_container_passes(team):
    check = services()["server"]["healthcheck"]["test"]
    assert check[0] == "CMD"
    assert (
        finished(
            [sys.executable, *(team.native(part) for part in check[2:])], team.folder, team.variables, limit=30
        ).returncode
        == 0
    )
    check = services()["database"]["healthcheck"]["test"]
    team.database.run(check[1:], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("host", "status"),
    {"localhost:5000": 200, "server:5000": 200, "mlflow.example.org": 200, "example.org": 403}.items(),
)
def test_server_answers_only_to_its_names(host, status, team):
    address = f"{team.address}/api/2.0/mlflow/experiments/get?experiment_id=0"
    answer = requests.get(address, headers={"Host": host}, auth=("admin", PASSWORDS["admin"]), timeout=30)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("origin", "status"), {"https://mlflow.example.org": 200, "https://example.org": 403, "null": 403}.items()
)
def test_only_the_interface_itself_may_write_from_a_browser(origin, status, team):
    address = f"{team.address}/ajax-api/2.0/mlflow/experiments/search"
    headers = {"Host": "mlflow.example.org", "Origin": origin}
    body = {"max_results": 1}
    answer = requests.post(address, json=body, headers=headers, auth=("admin", PASSWORDS["admin"]), timeout=30)
    assert answer.status_code == status


def test_without_a_public_name_the_server_answers_on_this_machine_only():
    allowed = [argument for argument in services()["server"]["command"] if "allowed" in argument]
    assert allowed == [
        "--allowed-hosts=localhost:*,127.0.0.1:*,server:*,localhost",
        "--cors-allowed-origins=https://localhost",
    ]


def test_users_are_added_and_granted_rights_as_the_readme_says(team, tmp_path):
    # given an experiment and a model of eve's, whom the README's first command is to add
    add, *grants = [line for line in readme_commands("Add a user") if "curl" in line]
    assert len(grants) == 2

    def asked(line: str, **names: str) -> str:
        for old, new in names.items():
            line = re.sub(rf"\b{old}\b", new, line)
        line = re.sub(r"--user (\w+)", lambda match: f"--user {match[1]}:{passwords[match[1]]}", line)
        line = line.replace("http://127.0.0.1:5000", team.address)
        process = finished(["bash", "-c", line], tmp_path, {"password": passwords["eve"]} | os.environ, limit=60)
        assert process.returncode == 0, process.stdout + process.stderr

    passwords = PASSWORDS | {"eve": "eves-own-pass-phrase-8"}
    asked(add, ana="eve")
    team.ask("admin", "2.0/mlflow/users/create", username="fay", password=passwords["eve"])
    as_eve = team.as_user("eve", passwords["eve"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_eve.items():
            patch.setenv(name, value)
        client = mlflow.MlflowClient(team.address)
        experiment = client.create_experiment("eve's")
        client.create_registered_model("eves_model")
        # when eve grants fay to read them, by the other two
        for line in grants:
            asked(line, ana="eve", ben="fay", tracking_quick_start="eves_model", **{'"1"': f'"{experiment}"'})
        # then fay may read, and not write
        patch.setenv("MLFLOW_TRACKING_USERNAME", "fay")
        assert client.get_registered_model("eves_model").name == "eves_model"
        assert client.get_experiment(experiment).name == "eve's"
        with pytest.raises(mlflow.MlflowException, match="Permission denied"):
            client.create_run(experiment)


@pytest.fixture(scope="module")
def store(tmp_path_factory, kernel):
    """Give a folder with a SQLite store, to which the quickstart and some unusual things have been logged."""
    folder = tmp_path_factory.mktemp("a store of Zoë")
    assert execute_in(kernel, copy_project(folder), folder) == ""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    location = (folder / "mlruns").as_uri()
    run = client.create_run(client.create_experiment("Zoë's", location, {"who": "Zoë"}), run_name="half")
    for step, value in enumerate([0.5, float("nan"), float("inf"), -1e300]):
        client.log_metric(run.info.run_id, "loss", value, step=step)
    client.log_text(run.info.run_id, "Zoë's", "a folder/notes ä.txt")
    client.set_model_version_tag(MODEL, "1", "reviewed", "yes")
    client.update_model_version(MODEL, "1", "The first.")
    client.delete_run(client.create_run("0", run_name="deleted").info.run_id)
    client.delete_experiment(client.create_experiment("deleted", location))
    client.create_registered_model("without_versions", {"kind": "empty"})
    return folder


@pytest.fixture(scope="module")
def moved(team, store):
    """Give the store, which has been moved to the team's server as the README says."""
    team.empty()
    assert follow("Move a SQLite store here", team, store) == []
    return store


def test_a_moved_store_is_complete(team, moved):
    # given all that is in the SQLite store, and what its models predict
    local = mlflow.MlflowClient(f"sqlite:///{moved / 'mlflow.db'}")
    there = logged(local)
    assert len(there["runs"]) == 4
    mlflow.set_tracking_uri(f"sqlite:///{moved / 'mlflow.db'}")
    pipeline = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
    mlflow.set_tracking_uri(None)
    # then all of it is on the server, and the models predict the same
    with team.client("admin") as client:
        here = logged(client)
        notes = client.search_runs([client.get_experiment_by_name("Zoë's").experiment_id])[0].info
        text = Path(client.download_artifacts(notes.run_id, "a folder/notes ä.txt")).read_text()
    for kind, entries in there.items():
        assert [entry for entry in entries if entry not in here[kind]] == [], kind
    assert text == "Zoë's"
    answers = predict(team, "admin", "12")
    assert answers[2] == pipeline.predict(load_iris(as_frame=True).data).tolist()
    assert answers[0] != answers[1]


def test_a_moved_store_takes_more(team, moved, tmp_path):
    with team.client("admin") as client:
        number = client.create_experiment(tmp_path.name)
        assert client.create_run(number).info.artifact_uri.startswith(f"mlflow-artifacts:/{number}/")


def test_a_store_is_not_moved_to_a_server_that_is_not_empty(team, moved):
    with team.client("admin") as client:
        before = logged(client)
        process = team.run(["python", "move_store.py", str(moved), "/artifacts"])
        assert process.returncode == 1
        assert "Nothing was moved: the server is not empty, it has rows in" in process.stderr
        assert logged(client) == before


def without_files(store: Path) -> None:
    (models,) = (store / "mlruns").glob("*/models")
    shutil.rmtree(models)


def of_another_version(store: Path) -> None:
    change(store, "UPDATE alembic_version SET version_num = 'other'")


def with_other_rows(store: Path) -> None:
    change(store, "INSERT INTO scheduler_leases VALUES ('a', 0, 1)")


def change(store: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


# Stores of somebody who wants a file of the machine that moves them, or to write one there.
ELSEWHERE = "/proc/self/environ"
OF_ALL_RUNS = "UPDATE runs SET artifact_uri"


def with_a_link_to_a_file(store: Path) -> None:
    (next((store / "mlruns").glob("*/models/*/artifacts")) / "environ").symlink_to(ELSEWHERE)


def with_a_link_to_a_folder(store: Path) -> None:
    (store / "mlruns").rename(store / "behind")
    (store / "mlruns").symlink_to(store / "behind")


def with_a_link_for_a_database(store: Path) -> None:
    (store / "mlflow.db").rename(store / "other.db")
    (store / "mlflow.db").symlink_to(store / "other.db")


def with_a_way_out_of_the_files(store: Path) -> None:
    change(store, f"{OF_ALL_RUNS} = '/x/mlruns/../../../proc/self/' || run_uuid || '/artifacts'")


def with_files_of_the_machine(store: Path) -> None:
    change(store, f"{OF_ALL_RUNS} = 'file:///proc/self'")


def with_an_id_that_leads_out(store: Path) -> None:
    change(
        store,
        "PRAGMA foreign_keys = off",
        "UPDATE runs SET run_uuid = '../../../evil', artifact_uri = '/x/mlruns/1/../../../evil/artifacts'"
        " WHERE run_uuid = (SELECT min(run_uuid) FROM runs)",
    )


def with_an_experiment_that_leads_out(store: Path) -> None:
    change(store, "PRAGMA foreign_keys = off", "UPDATE runs SET experiment_id = '../evil'")


def with_files_elsewhere(store: Path) -> None:
    change(store, "UPDATE model_versions SET storage_location = '/elsewhere'")


def with_a_source_elsewhere(store: Path) -> None:
    change(store, "UPDATE model_versions SET source = 'https://example.org/model'")


def with_a_source_that_leads_out(store: Path) -> None:
    change(store, "UPDATE model_versions SET source = (SELECT min(artifact_uri) FROM runs) || '/../../../../etc'")


def with_a_source_on_the_server(store: Path) -> None:
    change(store, "UPDATE model_versions SET source = 'mlflow-artifacts:/1/secret'")


def without_tables(store: Path) -> None:
    change(store, "DROP TABLE alembic_version")


REFUSALS = {
    without_files: "there are no files of the model in",
    of_another_version: "the store has schema other, the server ",
    with_other_rows: "the store has rows that this script does not know how to move, in scheduler_leases",
    with_a_link_to_a_file: "environ is a link or no file",
    with_a_link_to_a_folder: "mlruns is a link or no file",
    with_a_link_for_a_database: "mlflow.db, and no link",
    with_a_way_out_of_the_files: "which is not its place below mlruns",
    with_files_of_the_machine: "which is not its place below mlruns",
    with_an_id_that_leads_out: "is no id that MLflow makes",
    with_an_experiment_that_leads_out: "is no id that MLflow makes",
    with_files_elsewhere: "/elsewhere, in model_versions, belongs to no run and no model",
    with_a_source_elsewhere: "https://example.org/model, in model_versions, belongs to no run and no model",
    with_a_source_that_leads_out: "/etc, in model_versions, belongs to no run and no model",
    with_a_source_on_the_server: "mlflow-artifacts:/1/secret, in model_versions, belongs to no run and no model",
    without_tables: "no such table: alembic_version",
}


@pytest.mark.parametrize(("prepare", "reason"), REFUSALS.items(), ids=[prepare.__name__ for prepare in REFUSALS])
def test_a_store_that_cannot_be_moved_as_a_whole_is_not_moved(prepare, reason, team, moved, moving, tmp_path):
    # given a store in which something is wrong, and an empty database
    store = copied(moved, tmp_path)
    prepare(store)
    # when it is to be moved there, then one line says why not
    assert re.fullmatch(rf"Nothing was moved: .*{re.escape(reason)}.*\.", moving(store))
    # and the database stays empty, and nothing is written beside the artifacts
    count = ["psql", "--no-align", "--tuples-only", "--command=SELECT count(*) FROM runs"]
    assert team.database.run([*count, "--dbname=empty"], capture_output=True, text=True).stdout == "0\n"
    assert list(tmp_path.rglob("*evil*")) == []
    assert list((tmp_path / "artifacts").rglob("environ")) == []


def copied(store: Path, folder: Path) -> Path:
    """Copy a store to ``folder``, and make a folder for artifacts beside it."""
    (folder / "artifacts").mkdir()
    shutil.copytree(store / "mlruns", folder / "store/mlruns")
    shutil.copy(store / "mlflow.db", folder / "store")
    return folder / "store"


@pytest.fixture
def moving(team, monkeypatch):
    """Return a function that moves a store that `copied` made to the database that is empty, and gives why not."""
    for name, value in (team.database.variables | {"PGDATABASE": "empty"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(DEPLOY)
    import move_store

    def move(store):
        with pytest.raises(SystemExit) as end:
            move_store.main([str(store), str(store.parent / "artifacts")])
        return str(end.value)

    return move


IN_USE = "Nothing was moved: the store is in use; stop what logs to it, and try again."
LOGGING = """
import sys, mlflow
client = mlflow.MlflowClient(sys.argv[1])
run = client.create_run("0")
for step in range(1_000_000):
    client.log_metric(run.info.run_id, "loss", step, step=step)
    print(step, flush=True)
"""
WRITING = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[2])
for step in range(1_000_000):
    (folder / f"{step}.txt").write_text("more")
    print(step, flush=True)
    time.sleep(0.05)
"""


@pytest.mark.parametrize("program", {"rows": LOGGING, "files": WRITING}.items(), ids=["rows", "files"])
def test_a_store_that_somebody_logs_to_is_not_moved(program, moved, moving, tmp_path):
    # given a process that logs to the store all the time
    store = copied(moved, tmp_path)
    folder = next((store / "mlruns").glob("*/models/*/artifacts"))
    arguments = [f"sqlite:///{store / 'mlflow.db'}", str(folder)]
    process = subprocess.Popen([sys.executable, "-c", program[1], *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "0\n"
        # when it is to be moved, then it is not
        assert moving(store) == IN_USE
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_locked_store_is_not_moved(moved, moving, tmp_path):
    store = copied(moved, tmp_path)
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert moving(store) == IN_USE


def test_backup_wipe_and_restore_bring_everything_back(team, moved, tmp_path):
    # given what is on the server, and a backup of it
    with team.client("admin") as client:
        before = logged(client), predict(team, "admin", "12")
    follow("Back up", team, tmp_path)
    # when all is wiped, and restored on what is as new as after the first start
    team.kill()
    for name in ("mlflow", "mlflow_auth"):
        team.database.run(["dropdb", name])
    for name in team.artifacts.iterdir():
        shutil.rmtree(name)
    team.prepare_database()
    of_compose = follow("Restore", team, tmp_path)
    assert of_compose[0] == "docker compose stop server"
    # then it is all there, the users with their passwords too, and the models predict the same
    with team.client("admin") as client:
        assert (logged(client), predict(team, "admin", "12")) == before
    with team.client("ana") as client:
        assert client.search_experiments() == []
    # and nobody but the owner can read the backup, nor what was replaced
    kept = list((tmp_path / "backup").iterdir())
    assert len(kept) == 5
    assert [path.name for path in [tmp_path / "backup", *kept] if path.stat().st_mode & 0o077] == []


def test_a_restore_leaves_nothing_of_what_was_there_and_keeps_a_copy_of_it(team, moved, tmp_path):
    # given a backup, and an experiment that ana made after it
    follow("Back up", team, tmp_path)
    with team.client("ana") as client:
        run = client.create_run(client.create_experiment("after the backup")).info
        client.log_text(run.run_id, "a secret of ana's", "secret.txt")
    # when the backup is restored, and ben makes an experiment
    follow("Restore", team, tmp_path)
    with team.client("ben") as client:
        number = client.create_experiment("ben's")
    # then it has the number of ana's, and none of her files
    assert number == run.experiment_id
    assert not (team.artifacts / number).exists()
    # and these are in the copy of what was replaced
    (copy,) = (tmp_path / "backup").glob("replaced_*.tar")
    with tarfile.open(copy) as archive:
        assert f"{number}/{run.run_id}/artifacts/secret.txt" in archive.getnames()


def test_a_backup_taken_while_eight_clients_write_is_consistent(team, moved, tmp_path):
    # given eight clients, who make runs with a file each, one after the other
    ended, wrong = threading.Event(), []

    def write(number):
        client = mlflow.MlflowClient(team.address)
        while not ended.is_set():
            run_id = client.create_run("0").info.run_id
            client.log_text(run_id, run_id * 1000, "a folder/notes.txt")
            client.log_metric(run_id, "number", number)
            client.set_terminated(run_id)
        return number

    with team.client("admin") as client, ThreadPoolExecutor(8) as executor:
        clients = [executor.submit(write, number) for number in range(8)]
        try:
            while len(client.search_runs(["0"], "attributes.status = 'FINISHED'")) < 8:
                time.sleep(0.1)
            # when a backup is taken meanwhile
            follow("Back up", team, tmp_path)
        finally:
            ended.set()
        assert sorted(process.result() for process in clients) == list(range(8))
        # then, once it is restored, every run that was finished has its metric and its file
        follow("Restore", team, tmp_path)
        runs = client.search_runs(["0"], "attributes.status = 'FINISHED'", max_results=10_000)
        for run in runs:
            notes = team.artifacts / "0" / run.info.run_id / "artifacts/a folder/notes.txt"
            if "number" not in run.data.metrics or notes.read_text() != run.info.run_id * 1000:
                wrong.append(run.info.run_id)
    assert len(runs) >= 8
    assert wrong == []


def test_databases_are_upgraded_as_the_readme_says(team, moved, tmp_path):
    with team.client("admin") as client:
        before = logged(client)
        follow("Upgrade", team, tmp_path)
        assert logged(client) == before
