"""deploy/values.yaml sets on Kubernetes what deploy/compose.yaml sets for the server.

MLflow's Helm chart is not in this project. deploy/kubernetes.md says how the values were rendered.
"""

import re

import yaml
from deployment import DEPLOY, entrypoint, services

# Variables with another value in a pod: the host of the database, the bucket, and addresses and folders of the pod.
OTHERWISE = {
    "PGHOST",
    "ARTIFACTS_DESTINATION",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "SECRETS_FOLDER",
    "METRICS_ADDRESS",
    "ARTIFACTS_FOLDER",
}
HOST = "mlflow.example.org"
VALUES = yaml.safe_load((DEPLOY / "values.yaml").read_text(encoding="utf-8"))
SERVER = services({"PUBLIC_HOST": HOST})["server"]


def plain_variables() -> dict[str, str]:
    """Return the variables of the server and of its init containers that do not come from the Secret."""
    entries = list(VALUES["env"])
    for container in VALUES["extraInitContainers"]:
        entries += container["env"]
    variables = {entry["name"]: entry["value"] for entry in entries if "value" in entry}
    variables["MLFLOW_BACKEND_STORE_URI"] = VALUES["mlflow"]["backendStoreUri"]  # set by the chart
    return variables


def secret_keys() -> dict[str, str]:
    """Return the key in the Secret for each variable that comes from it."""
    keys = {}
    for entry in VALUES["env"]:
        if "valueFrom" in entry:
            keys[entry["name"]] = entry["valueFrom"]["secretKeyRef"]["key"]
    return keys


def test_values_set_every_variable_of_the_compose_file():
    variables = plain_variables()
    assert variables.keys() | secret_keys().keys() >= SERVER["environment"].keys()
    for name in SERVER["environment"].keys() - OTHERWISE:
        assert variables[name] == SERVER["environment"][name]
    assert variables["ARTIFACTS_DESTINATION"] == VALUES["mlflow"]["artifactsDestination"]


def test_secrets_reach_the_variables_that_the_start_script_sets(monkeypatch):
    # given the start script, which sets a variable from each secret of the compose file
    monkeypatch.syspath_prepend(DEPLOY)
    import start

    expected = {variable: secret for secret, variable in start.SECRETS.items()}
    expected[start.STORE_SECRET] = start.STORE_SECRET
    assert set(SERVER["secrets"]) == set(expected.values())
    # when the values set them instead
    keys = secret_keys()
    # then each variable has the same secret
    assert {variable: keys[variable] for variable in expected} == expected


def test_command_of_kubernetes_documentation_creates_every_key_of_the_secret():
    page = (DEPLOY / "kubernetes.md").read_text(encoding="utf-8")
    created = re.search(r"secret generic mlflow-team .*grep -E '\^\((.*)\)='", page)[1].split("|")
    assert set(created) == set(secret_keys().values())


def test_options_of_the_server_are_those_of_the_compose_file():
    # given the options of both
    options = {}
    for argument in SERVER["command"][2:]:
        name, _, value = argument.removeprefix("--").partition("=")
        options[name.replace("-", "_")] = value
    rendered = {name: str(value) for name, value in VALUES["server"]["value_options"].items()}
    # then they are the same, except for those that the chart adds, and the names under which a pod is reached
    assert options.pop("expose_prometheus")
    assert VALUES["metrics"]["enabled"]
    assert options.pop("artifacts_destination")
    assert VALUES["mlflow"]["artifactsDestination"].startswith("s3://")
    assert [name for name in options if not options[name]] == VALUES["server"]["flag_options"]
    hosts = options.pop("allowed_hosts").split(",")
    allowed = rendered.pop("allowed_hosts").split(",")
    assert set(hosts) - {"server:*"} <= set(allowed)
    assert rendered == {name: value for name, value in options.items() if value}
    # and the host of the ingress is one of these names
    assert [rule["host"] for rule in VALUES["ingress"]["hosts"]] == [HOST]
    assert HOST in allowed
    assert rendered["cors_allowed_origins"] == f"https://{HOST}"


def test_init_container_checks_the_secrets_by_the_start_script_of_the_same_image():
    (container,) = VALUES["extraInitContainers"]
    assert container["image"] == "{repository}:{tag}".format(**VALUES["image"])
    assert container["command"][:2] == entrypoint()
    folders = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "secrets"]
    assert [entry["value"] for entry in container["env"] if entry["name"] == "SECRETS_FOLDER"] == folders


def test_public_keys_are_mounted_read_only_where_the_server_reads_them():
    (mount,) = VALUES["extraVolumeMounts"]
    assert mount["name"] in [volume["name"] for volume in VALUES["extraVolumes"]]
    assert mount["mountPath"] == plain_variables()["PUBLIC_KEYS"]
    assert mount["readOnly"]


def test_one_pod_runs_as_the_user_of_the_image_without_rights():
    assert VALUES["replicaCount"] == 1
    assert VALUES["deploymentStrategy"] == {"type": "Recreate"}
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    pod = VALUES["podSecurityContext"]
    assert f"--uid {pod['runAsUser']} mlflow" in dockerfile
    assert pod["runAsNonRoot"]
    for context in [VALUES["securityContext"], *[item["securityContext"] for item in VALUES["extraInitContainers"]]]:
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
