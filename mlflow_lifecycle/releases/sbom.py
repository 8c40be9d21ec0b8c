"""The software bill of materials of a release: the model and its packages, in CycloneDX 1.6.

MLflow records the packages of a model in pip's format, which no scanner of vulnerabilities or
licences takes for a model. The format: https://cyclonedx.org/docs/1.6/json.
"""

import json
import re
from pathlib import Path
from urllib.parse import quote

from mlflow_lifecycle.signing.verify import Verified


def write_sbom(copy: Verified, facts: dict, path: Path) -> None:
    """Write the bill of materials of a version.

    Args:
        copy: the version, verified.
        facts: from ``mlflow_lifecycle.releases.card.card_facts``.
        path: the file of JSON.
    """
    packages = []
    for block in re.split(r"\n(?=\S)", copy.packages.read_text(encoding="utf-8").strip()):
        name, version = re.match(r"([^\s\[]+)\S*?==([^\s;]+)", block).groups()
        identifier = f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version)}"
        hashes = []
        for digest in re.findall("--hash=sha256:([0-9a-f]{64})", block):
            hashes.append({"alg": "SHA-256", "content": digest})
        packages.append(
            {
                "type": "library",
                "bom-ref": identifier,
                "name": name,
                "version": version,
                "purl": identifier,
                "hashes": hashes,
            }
        )
    metrics = []
    for name, value in facts["tested"]["metrics"].items():
        metrics.append({"type": name, "value": str(value)})
    model = {
        "type": "machine-learning-model",
        "bom-ref": f"{facts['model_name']}/{facts['version']}",
        "name": facts["model_name"],
        "version": facts["version"],
        "modelCard": {
            "modelParameters": {"task": facts["task"]},
            "quantitativeAnalysis": {"performanceMetrics": metrics},
            "considerations": {
                "useCases": [facts["intended_use"]],
                "technicalLimitations": [facts["limits"]],
            },
        },
    }
    needed = [package["bom-ref"] for package in packages]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": packages,
        "dependencies": [{"ref": model["bom-ref"], "dependsOn": needed}],
    }
    path.write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")
