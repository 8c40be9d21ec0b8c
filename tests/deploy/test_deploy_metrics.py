"""What Prometheus reads from the team's server, and the alerts that it makes of it."""

import re
import shutil
import subprocess
import sys

import psutil
import pytest
import requests
import yaml
from deployment import DEPLOY, PASSWORDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
SEARCH = "api/2.0/mlflow/experiments/search"


@pytest.fixture
def promtool(lacking):
    """Return a function that runs promtool, and gives what it prints."""
    program = shutil.which("promtool")
    if program is None:
        lacking("promtool", "apt-get install prometheus")

    def run(*arguments: str) -> str:
        process = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


def read(team) -> dict[str, float]:
    """Return the value of each series."""
    text = requests.get(f"http://127.0.0.1:{team.metrics_port}/metrics", timeout=30).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def total(series: dict[str, float], name: str) -> float:
    return sum(value for key, value in series.items() if re.match(name, key))


def test_answers_failed_logins_and_the_disk_are_counted_over_all_processes(team):
    # given
    before = read(team)
    # when twenty requests are answered, on connections that both processes take, and four come with a wrong password
    for _ in range(20):
        body = {"max_results": 1}
        requests.post(f"{team.address}/{SEARCH}", json=body, auth=("ana", PASSWORDS["ana"]), timeout=30)
    for _ in range(4):
        requests.post(f"{team.address}/{SEARCH}", json=body, auth=("cleo", "wrong"), timeout=30)
    # then
    after = read(team)
    for name, count in {
        'team_responses_total{status="200"}': 20,
        'team_responses_total{status="401"}': 4,
        "team_failed_logins_total": 4,
        "mlflow_http_request_duration_seconds_count": 20,
    }.items():
        assert total(after, re.escape(name)) - total(before, re.escape(name)) == count, name
    assert 0 < after["team_disk_free_bytes"] < after["team_disk_bytes"] == shutil.disk_usage(team.artifacts).total


@pytest.mark.parametrize("path", ["metrics", "metrics/", "%6detrics"])
def test_figures_are_not_where_users_are(path, team):
    for credentials in (None, ("admin", PASSWORDS["admin"])):
        answer = requests.get(f"{team.address}/{path}", auth=credentials, timeout=30)
        assert answer.status_code == 404
        assert "team_" not in answer.text


def test_figures_stay_when_a_process_of_the_server_is_killed(team):
    # given the process that offers them
    listening = [
        connection.pid
        for connection in psutil.net_connections("tcp4")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == team.metrics_port
    ]
    # when it is killed
    psutil.Process(listening[0]).kill()
    # then another takes its place
    with requests.Session() as session:
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=RETRIES))
        assert "team_responses_total" in session.get(f"http://127.0.0.1:{team.metrics_port}/metrics", timeout=30).text


RETRIES = requests.adapters.Retry(total=12, connect=12, backoff_factor=0.1, backoff_max=5)


def test_promtool_accepts_configuration_and_rules(promtool):
    assert "5 rules found" in promtool("check", "config", str(DEPLOY / "prometheus.yml"))


def test_each_alert_fires_when_it_should_and_only_then(promtool, tmp_path):
    # given series of an hour: all is well, and for each alert what it is for
    well = {
        'up{job="server"}': "1x60",
        'team_responses_total{job="server", status="200"}': "0+1000x60",
        'team_responses_total{job="server", status="500"}': "0+5x60",
        'mlflow_http_request_duration_seconds_bucket{job="server", le="1"}': "0+1000x60",
        'mlflow_http_request_duration_seconds_bucket{job="server", le="+Inf"}': "0+1005x60",
        'team_disk_free_bytes{job="server"}': "20x60",
        'team_disk_bytes{job="server"}': "100x60",
        'team_failed_logins_total{job="server"}': "0+5x60",
        'up{job="model"}': "0x60",  # it was never served
    }
    wrong = {
        "Down": {'up{job="server"}': "1x50 0x10"},
        "ServerErrors": {'team_responses_total{job="server", status="500"}': "0+50x60"},
        "Slow": {
            'mlflow_http_request_duration_seconds_bucket{job="server", le="1"}': "0+900x60",
            'mlflow_http_request_duration_seconds_bucket{job="server", le="5"}': "0+1005x60",
        },
        "DiskFull": {'team_disk_free_bytes{job="server"}': "9x60"},
        "FailedLogins": {'team_failed_logins_total{job="server"}': "0+20x60"},
    }
    of_the_model = {
        "Down": {'up{job="model"}': "1x50 0x10"},
        "ServerErrors": {
            'model_requests_total{job="model", status="200"}': "0+90x60",
            'model_requests_total{job="model", status="500"}': "0+10x60",
        },
    }
    names = set(re.findall(r"alert: (\w+)", (DEPLOY / "alerts.yml").read_text()))
    assert names == wrong.keys()
    tests = []
    for job, cases in {"server": {"none": {}} | wrong, "model": of_the_model}.items():
        for fires, series in cases.items():
            values = [{"series": key, "values": value} for key, value in (well | series).items()]
            expected = [
                {"alertname": name, "eval_time": "1h", "exp_alerts": [{"exp_labels": {"job": job}}] * (name == fires)}
                for name in sorted(names)
            ]
            tests.append({"interval": "1m", "input_series": values, "alert_rule_test": expected})
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # the text is for people
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests}))
    # then promtool finds each alert where it should be
    assert "SUCCESS" in promtool("test", "rules", str(tmp_path / "test.yml"))
