"""The bill of materials of a release: valid CycloneDX, with each package and the model's card, and signed."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

from versions import NAME

from mlflow_lifecycle.pins import read_pins
from mlflow_lifecycle.releases.sbom import write_sbom
from mlflow_lifecycle.signing.keys import own_public_key
from mlflow_lifecycle.signing.verify import verified


def test_release_has_a_signed_bill_of_materials(folder, lacking):
    if find_spec("cyclonedx") is None:
        lacking("CycloneDX's validator", "make browser")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    with verified(f"models:/{NAME}@production", own_public_key()) as copy:
        text = (copy.folder.parent / "sbom.cdx.json").read_text(encoding="utf-8")
        pins = read_pins(copy.folder / "requirements.txt")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", NAME, "1")
    assert model["modelCard"]["modelParameters"]["task"] == "classification"
    names = [package["purl"] for package in bill["components"]]
    assert len(names) == len(pins)
    assert any(name.startswith("pkg:pypi/scikit-learn@") for name in names)
    assert all(package["hashes"] for package in bill["components"])
    assert bill["dependencies"] == [{"ref": model["bom-ref"], "dependsOn": names}]


def test_package_with_an_extra_is_listed_by_its_name(tmp_path):
    (tmp_path / "packages.txt").write_text("uvicorn[standard]==0.30.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    facts = {
        "model_name": NAME,
        "version": "1",
        "task": "",
        "intended_use": "",
        "limits": "",
        "tested": {"metrics": {}},
    }
    write_sbom(SimpleNamespace(packages=tmp_path / "packages.txt"), facts, tmp_path / "sbom.json")
    (package,) = json.loads((tmp_path / "sbom.json").read_text())["components"]
    assert (package["name"], package["purl"]) == ("uvicorn", "pkg:pypi/uvicorn@0.30.0")
