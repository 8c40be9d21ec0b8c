"""Look for known vulnerabilities in the packages of requirements files, as `lifecycle audit` does for models.

Usage: python tools/audit.py FILE [FILE ...]

DATABASE names a downloaded archive of OSV's database. The exit status is 1 if something is found, and 2 if a package
was not looked up.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

from mlflow_lifecycle.audit import audit_pins, serve_database
from mlflow_lifecycle.exceptions import LifecycleError


def main(paths: list[str]) -> int:
    """Print what is found in each file, and return the exit status."""
    count = 0
    with contextlib.ExitStack() as stack:
        database = os.environ.get("DATABASE")
        service = stack.enter_context(serve_database(Path(database))) if database else ""
        for path in paths:
            pins = re.findall(r"(?m)^[\w.-]+==[^\s;]+", Path(path).read_text(encoding="utf-8"))
            findings = audit_pins(pins, service)
            count += len(findings)
            for finding in findings:
                fixed = " or ".join(finding.fixed_in) or "no version"
                print(f"{path}: {finding.id} in {finding.package} {finding.version}, fixed in {fixed}")
            print(f"{path}: {len(pins)} packages, {len(findings)} known vulnerabilities")
    return 1 if count else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LifecycleError as error:
        print(f"Not audited: {error}", file=sys.stderr)
        sys.exit(2)
