"""What the folder of a model may hold, so that loading it runs no code that nobody has reviewed.

MLflow runs what ``MLmodel`` names: another loader, code beside the model, a pickle. It takes the
types that skops trusts from the model itself, and installs whatever the environment files list.
"""

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import mlflow
import skops.io
import yaml
from packaging.utils import canonicalize_name

from mlflow_lifecycle.exceptions import InvalidInputError, UnreviewedContentError
from mlflow_lifecycle.flavors import Flavor, flavor_of
from mlflow_lifecycle.pins import names_and_versions, read_pins

FILES = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
EXAMPLES = {"input_example.json", "serving_input_example.json"}
ENVIRONMENT = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
TOOL = re.compile(r"(pip|setuptools|wheel)([=<]=\d[\w.]*)?")
SAVE_AGAIN = "Save the model again with MLflow, and register it"


def check_contents(
    folder: Path,
    packages: Path,
    trusted_types: Collection[str] = (),
) -> None:
    """Refuse a folder that is anything but a model of a known flavor with exact pins.

    Nothing of it is loaded.

    Args:
        folder: of a model, as MLflow saved it.
        packages: the pins that belong to it, with hashes.
        trusted_types: what the project has reviewed, beside the types that skops knows.

    Raises:
        UnreviewedContentError: with the file, and what is wrong.
    """
    _check_only_files(folder)
    with _refusing("MLmodel"):
        model = mlflow.models.Model.load(str(folder / "MLmodel"))
        flavor = flavor_of(model)
        python = _check_entries(model, flavor, trusted_types)
        _check_columns(model, flavor)
    _check_files(folder, model, flavor)
    if flavor.file.endswith(".skops"):
        with _refusing(flavor.file):
            types = skops.io.get_untrusted_types(file=folder / flavor.file)
            _check_types(types, flavor, trusted_types)
    with _refusing("requirements.txt"):
        _check_pins(folder / "requirements.txt", packages, flavor)
    _check_environment_files(folder, python)


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Refuse the file ``name`` if the block fails: a crafted file can raise any error."""
    try:
        yield
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnreviewedContentError(f"{name}: {reason}.") from None


def _check_only_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            name = path.relative_to(folder).as_posix()
            raise UnreviewedContentError(
                f"{name}: only files belong to a model, no folders and no links. "
                "Code beside a model would run when it is loaded. Log the model without code_paths."
            )


def _check_files(folder: Path, model: mlflow.models.Model, flavor: Flavor) -> None:
    expected = FILES | {flavor.file}
    if model.saved_input_example_info:
        expected = expected | EXAMPLES
    found = {path.name for path in folder.iterdir()}
    for name in sorted(expected - found):
        raise UnreviewedContentError(f"{name}: this file is missing. {SAVE_AGAIN}.")
    for name in sorted(found - expected):
        raise UnreviewedContentError(
            f"{name}: no such file belongs to a model of the flavor {flavor.name}. {SAVE_AGAIN}."
        )


def _check_entries(
    model: mlflow.models.Model,
    flavor: Flavor,
    trusted_types: Collection[str],
) -> str:
    """Check the entries of MLmodel, and return the version of Python."""
    entry = dict(model.flavors[flavor.name])
    entry.pop(flavor.version_key, None)
    model_class = entry.pop("model_class", None)
    types = entry.pop("skops_trusted_types", None) or []
    if model_class not in (flavor.model_classes or {None}):
        classes = ", ".join(flavor.model_classes) or "left out"
        wanted = f"and must be one of {classes}"
        raise InvalidInputError(f"model_class is {model_class!r}, {wanted}. {flavor.advice}")
    _check_equal(entry, flavor.entry, flavor.advice)
    loader = dict(model.flavors["python_function"])
    python = str(loader.pop("python_version", ""))
    _check_equal(loader, flavor.loader | {"env": ENVIRONMENT}, flavor.advice)
    if not re.fullmatch(r"3\.\d+\.\d+", python):
        wanted = "and must be a version of Python 3"
        raise InvalidInputError(f"python_version is {python!r}, {wanted}. {SAVE_AGAIN}")
    _check_types(types, flavor, trusted_types)
    return python


def _check_equal(entry: dict, expected: dict, advice: str) -> None:
    for key, value in expected.items():
        if key not in entry:
            raise InvalidInputError(f"{key} is missing, and must be {value!r}. {advice}")
        if entry[key] != value:
            raise InvalidInputError(f"{key} is {entry[key]!r}, and must be {value!r}. {advice}")
    for key in entry:
        if key not in expected:
            raise InvalidInputError(f"{key} is not allowed. {advice}")


def _check_columns(model: mlflow.models.Model, flavor: Flavor) -> None:
    """Refuse text columns where the library would refuse the text that a request holds."""
    if flavor.text_columns or not model.signature or not model.signature.inputs:
        return
    for column in model.signature.inputs:
        if getattr(column.type, "name", "") == "string":
            raise InvalidInputError(
                f"the column {column.name!r} is text, which {flavor.name} refuses in a request. "
                "Encode it in a scikit-learn pipeline, and log that with mlflow.sklearn.log_model"
            )


def _check_types(
    types: Collection[str],
    flavor: Flavor,
    trusted_types: Collection[str],
) -> None:
    unknown = sorted(set(types) - flavor.trusted_types - set(trusted_types))
    if unknown:
        raise InvalidInputError(
            f"skops would load types that nobody has reviewed: {', '.join(unknown)}. "
            "Add a type that you have reviewed to trusted_types, or with --trusted-type"
        )


def _check_pins(requirements: Path, packages: Path, flavor: Flavor) -> None:
    pins = names_and_versions(read_pins(requirements))
    lines = packages.read_text(encoding="utf-8").splitlines()
    locked_lines = [line.rstrip("\\") for line in lines if line[:1] != " "]
    if pins != names_and_versions(locked_lines):
        raise InvalidInputError(
            f"its pins differ from those in the signed list of hashes. {SAVE_AGAIN}"
        )
    names = {canonicalize_name(pin.partition("==")[0]) for pin in pins}
    if names.isdisjoint(flavor.packages):
        needed = " or ".join(flavor.packages)
        raise InvalidInputError(
            f"it does not pin {needed}. Add it to the pins, and log the model again"
        )


def environment_files(pins: list[str], python: str) -> dict[str, dict]:
    """Return what MLflow's other environment files hold for these pins, by their names."""
    return {
        "conda.yaml": {
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={python}", {"pip": pins}],
        },
        "python_env.yaml": {
            "python": python,
            "build_dependencies": [],
            "dependencies": ["-r requirements.txt"],
        },
    }


def _check_environment_files(folder: Path, python: str) -> None:
    """Check that conda.yaml and python_env.yaml ask for what requirements.txt does.

    MLflow adds pip, setuptools and wheel as they were installed where the model was logged, without
    a version if they were not.
    """
    text = (folder / "requirements.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line.strip()]
    expected = environment_files(pins, python)
    for name, content in expected.items():
        with _refusing(name):
            found = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            for key in ("dependencies", "build_dependencies"):
                if key in found:
                    found[key] = [item for item in found[key] if not TOOL.fullmatch(str(item))]
            if found != content:
                raise InvalidInputError(
                    f"it asks for other packages than requirements.txt. {SAVE_AGAIN}"
                )
