"""Find known vulnerabilities in the packages that model versions have recorded.

MLflow records the packages of a model, and never looks at them again. They are looked up in OSV, or
in a copy of its database, by ``uv audit``. That fails loudly if a package was not looked up, where
``pip-audit`` finds nothing.
"""

import contextlib
import json
import tempfile
import threading
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
from packaging.utils import canonicalize_name
from packaging.version import Version

from mlflow_lifecycle.environments import run_uv
from mlflow_lifecycle.exceptions import (
    InvalidInputError,
    KeyRefusedError,
    LifecycleError,
    NotAuditedError,
    NotVerifiedError,
)
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.pins import names_and_versions, read_pins
from mlflow_lifecycle.signing.statement import check_name
from mlflow_lifecycle.signing.verify import find_version, open_model, verified

FORMAT = "preview"  # of the answer of uv audit; another one may mean something else
PROJECT = """\
[project]
name = "audited"
version = "0"
"""
LOCK = """\
version = 1
requires-python = ">=3"
[[package]]
name = "audited"
version = "0"
source = {{ virtual = "." }}
dependencies = [{needed}]
{packages}"""
PACKAGE = """\
[[package]]
name = "{name}"
version = "{version}"
source = {{ registry = "." }}
"""


@dataclass(frozen=True)
class Finding:
    """A known vulnerability of a package, and the versions in which it is fixed."""

    id: str
    package: str
    version: str
    fixed_in: list[str]


@dataclass(frozen=True)
class Audit:
    """What was found in the packages of a version.

    Attributes:
        uri: the version.
        aliases: those that point to it.
        packages: the number of packages that were looked up.
        unsigned: why the list of packages is not the signed one; empty if it is.
        unknown: packages that OSV cannot know: those with a local version, such as 2.9.0+cpu.
        findings: the known vulnerabilities.
        failure: why the packages were not looked up; empty if they were.
    """

    uri: str
    aliases: list[str]
    packages: int
    unsigned: str
    unknown: list[str]
    findings: list[Finding]
    failure: str


def audit_model(
    name: str,
    public_key: Path | None,
    *,
    all_versions: bool = False,
    service: str = "",
    database: Path | None = None,
    ignored: Collection[str] = (),
    trusted_types: Collection[str] = (),
) -> list[Audit]:
    """Return the audit of each version of a registered model that an alias points to.

    A version whose audit fails does not hide what is found in others.

    Args:
        name: the registered model.
        public_key: of the person who signed; None if nobody did.
        all_versions: audit those without an alias, too.
        service: the address of a server with the interface of OSV. The default is OSV.
        database: a downloaded archive of OSV's database, to use in place of the service.
        ignored: the ids of vulnerabilities that are left out.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.

    Raises:
        InvalidInputError: there is no version to audit, or the database cannot be read.
        mlflow.MlflowException: there is no such model, or the store gives no answer.
    """
    check_name(name)
    client = mlflow.MlflowClient()
    aliases = defaultdict(list)
    for alias, version in client.get_registered_model(name).aliases.items():
        aliases[int(version)].append(alias)
    numbers = set(aliases)
    if all_versions:
        for version in client.search_model_versions(f"name = '{name}'"):
            numbers.add(int(version.version))
    if not numbers:
        remedy = f"Audit every version: lifecycle audit {name} --all-versions"
        raise InvalidInputError(f"No alias points to a version of {name}. {remedy}")
    audits = []
    with contextlib.ExitStack() as stack:
        if database:
            service = stack.enter_context(serve_database(database))
        for number in sorted(numbers):
            uri = f"models:/{name}/{number}"
            pins, unsigned, failure = [], "", ""
            findings = []
            try:
                pins, unsigned = read_packages(uri, public_key, trusted_types)
                findings = audit_pins(pins, service, ignored)
            except (LifecycleError, OSError, mlflow.MlflowException) as error:
                failure = printable(str(error))
            audits.append(
                Audit(
                    uri=uri,
                    aliases=sorted(aliases[number]),
                    packages=len(pins),
                    unsigned=unsigned,
                    unknown=[pin for pin in pins if "+" in pin],
                    findings=findings,
                    failure=failure,
                )
            )
    return audits


def read_packages(
    uri: str, public_key: Path | None, trusted_types: Collection[str] = ()
) -> tuple[list[str], str]:
    """Return the pins of a version, and why they are not the signed ones, or an empty text.

    Raises:
        InvalidInputError: the list is not one of exact pins.
    """
    try:
        if public_key is None:
            raise KeyRefusedError("There is no public key to verify it with")
        with verified(uri, public_key, purpose="candidate", trusted_types=trusted_types) as copy:
            return read_version_pins(copy.folder), ""
    except (NotVerifiedError, KeyRefusedError) as error:
        unsigned = str(error)
    version, _ = find_version(uri)
    with tempfile.TemporaryDirectory(prefix="audit-") as scratch:
        open_model(version).download_artifacts("requirements.txt", scratch)
        return read_version_pins(Path(scratch)), unsigned


def read_version_pins(folder: Path) -> list[str]:
    """Return the pins of the model in a folder as ``name==version``."""
    return names_and_versions(read_pins(folder / "requirements.txt"))


def audit_pins(pins: list[str], service: str = "", ignored: Collection[str] = ()) -> list[Finding]:
    """Return the known vulnerabilities of packages.

    Args:
        pins: ``name==version`` of each package.
        service: the address of a server with the interface of OSV. The default is OSV.
        ignored: the ids of vulnerabilities that are left out.

    Raises:
        NotAuditedError: the service does not answer, or not every package was looked up.
    """
    # uv audits a project. This one needs all the packages, and its index is never asked.
    packages = []
    needed = []
    for pin in pins:
        name, _, version = pin.partition("==")
        name = name.partition("[")[0]  # without its extras
        needed.append(f'{{ name = "{name}" }}')
        packages.append(PACKAGE.format(name=name, version=version))
    lock = LOCK.format(needed=", ".join(needed), packages="".join(packages))
    command = ["audit", "--frozen", "--preview-features", "audit-command,json-output"]
    command += ["--output-format", "json"]
    if service:
        command += ["--service-url", f"{service.rstrip('/')}/"]
    for identifier in ignored:
        command += ["--ignore", identifier]
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        (Path(folder) / "uv.lock").write_text(lock, encoding="utf-8")
        (Path(folder) / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        child = run_uv(folder, *command)
    try:
        answer = json.loads(child.stdout)
        audited = answer["summary"]["audited_packages"]
        is_known = answer["schema"]["version"] == FORMAT
    except (ValueError, KeyError, TypeError):
        reason = printable(" ".join(child.stderr.split()))
        raise NotAuditedError(f"uv audit gave no result: {reason}") from None
    if not is_known:
        raise NotAuditedError("uv audit answers in another format. Use the uv of the lock file.")
    if audited < len(pins):
        raise NotAuditedError(f"Only {audited} of {len(pins)} packages were looked up.")
    findings = []
    for found in answer["vulnerabilities"]:
        package = found["dependency"]
        finding = Finding(found["id"], package["name"], package["version"], found["fix_versions"])
        findings.append(finding)
    return findings


@contextlib.contextmanager
def serve_database(archive: Path) -> Iterator[str]:
    """Answer as OSV does, from an archive of its database; give the address to the block.

    Args:
        archive: a zip file with an advisory in JSON per file, such as OSV's ``PyPI/all.zip``.

    Raises:
        InvalidInputError: the file is not such an archive.
    """
    advisories = {}
    try:
        with zipfile.ZipFile(archive) as files:
            for name in files.namelist():
                advisory = json.loads(files.read(name))
                if "withdrawn" not in advisory:
                    advisories[advisory["id"]] = advisory
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InvalidInputError(f"{archive} is not an archive of OSV's database: {error}") from None
    by_package = defaultdict(list)
    for advisory in advisories.values():
        for affected in advisory.get("affected", []):
            package = affected.get("package", {})
            if package.get("ecosystem") == "PyPI":  # other registries have packages of this name
                by_package[canonicalize_name(package["name"])].append((advisory, affected))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            results = []
            for query in json.loads(body)["queries"]:
                found = {}
                for advisory, affected in by_package[canonicalize_name(query["package"]["name"])]:
                    if is_affected(query["version"], affected):
                        found[advisory["id"]] = {key: advisory[key] for key in ("id", "modified")}
                results.append({"vulns": list(found.values())})
            self.answer({"results": results})

        def do_GET(self) -> None:
            self.answer(advisories[self.path.rpartition("/")[2]])

        def answer(self, content: dict) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def is_affected(version: str, affected: dict) -> bool:
    """Return whether an advisory names a version, in its list or in one of its ranges.

    The format is that of https://ossf.github.io/osv-schema.
    """
    if version in affected.get("versions", []):
        return True
    for part in affected.get("ranges", []):
        is_inside = False
        for event in part["events"] if part["type"] == "ECOSYSTEM" else []:
            if "introduced" in event and Version(version) >= Version(event["introduced"]):
                is_inside = True
            if "fixed" in event and Version(version) >= Version(event["fixed"]):
                is_inside = False
            if "last_affected" in event and Version(version) > Version(event["last_affected"]):
                is_inside = False
        if is_inside:
            return True
    return False
