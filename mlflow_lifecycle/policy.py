"""What the folder of a model may hold, so that loading it runs nothing that nobody has reviewed.

MLflow runs what ``MLmodel`` names: another loader, code beside the model, a pickle. It takes the model's own word for
the types that skops shall trust, and installs whatever the environment files say.
"""

import re
from pathlib import Path

import mlflow
import skops.io
import yaml

from mlflow_lifecycle.pins import parse_pins, read_pins

FILES = {"MLmodel", "model.skops", "conda.yaml", "python_env.yaml", "requirements.txt"}
EXAMPLES = {"input_example.json", "serving_input_example.json"}
LOADER = {
    "loader_module": "mlflow.sklearn",
    "model_path": "model.skops",
    "predict_fn": "predict",
    "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
}
KEPT = {"serialization_format": "skops", "pickled_model": "model.skops", "code": None}


class UnreviewedContentError(ValueError):
    """A model's folder holds or asks for what nobody has reviewed; the message begins with the file's name."""


def check_contents(folder: Path, packages: Path, trusted_types: list[str] | tuple[str, ...] = ()) -> None:
    """Refuse a folder that is anything but a scikit-learn model in skops with exact pins; load nothing of it.

    Args:
        folder: of a model, as MLflow saved it.
        packages: the pins that belong to it, with hashes.
        trusted_types: the types, beyond those that skops knows to be harmless, that the project has reviewed.

    Raises:
        UnreviewedContentError: with the file, and what is wrong.
    """
    at = "MLmodel"
    try:
        for path in folder.rglob("*"):
            at = path.relative_to(folder).as_posix()
            if path.is_symlink() or not path.is_file():
                raise ValueError("only files belong to a model in skops, and no folder or link")
        at = "MLmodel"
        model = mlflow.models.Model.load(str(folder / at))
        files = FILES | (EXAMPLES if model.saved_input_example_info else set())
        for at in sorted(files ^ {path.name for path in folder.iterdir()}):
            raise ValueError("this file is missing" if at in files else "no such file belongs to a model in skops")
        at = "MLmodel"
        flavors = {name: dict(settings) for name, settings in model.flavors.items()}
        asked = flavors["sklearn"].pop("skops_trusted_types") or []
        python = flavors["python_function"].pop("python_version")
        if not re.fullmatch(r"3\.\d+\.\d+", python):
            raise ValueError(f"{python!r} is no version of Python")
        del flavors["sklearn"]["sklearn_version"]
        if flavors != {"python_function": LOADER, "sklearn": KEPT}:
            raise ValueError("it must say that skops loads model.skops, and nothing else")
        _refuse_unknown(asked, trusted_types)
        at = "model.skops"
        _refuse_unknown(skops.io.get_untrusted_types(file=folder / "model.skops"), trusted_types)
        at = "requirements.txt"
        lines = [line.rstrip("\\") for line in packages.read_text(encoding="utf-8").splitlines() if line[:1] != " "]
        if names_and_versions(read_pins(folder / at)) != names_and_versions(lines):
            raise ValueError("its pins are not those whose hashes were kept")
        for at, expected in _environment_files(folder, python).items():
            if yaml.safe_load((folder / at).read_text(encoding="utf-8")) != expected:
                raise ValueError("it asks for other packages than requirements.txt")
    except Exception as error:
        remedy = "Register the model anew; a type that you have reviewed goes into trusted_types."
        raise UnreviewedContentError(f"{at}: {str(error).rstrip('.') or type(error).__name__}. {remedy}") from None


def names_and_versions(pins: list[str]) -> list[str]:
    """Return ``name==version`` of each pin, without the marker that says where it is needed."""
    return [pin.partition(";")[0].strip() for pin in pins]


def _refuse_unknown(asked: list[str], trusted_types: list[str] | tuple[str, ...]) -> None:
    if unknown := sorted(set(asked) - set(trusted_types)):
        raise ValueError(f"it asks for what nobody has reviewed: {', '.join(unknown)}")


def _environment_files(folder: Path, python: str) -> dict[str, dict]:
    """Return what conda.yaml and python_env.yaml must hold, given requirements.txt; the latter's tools are pinned."""
    text = (folder / "requirements.txt").read_text(encoding="utf-8")
    pins = parse_pins(text, "requirements.txt")
    tools = [pin for pin in pins if re.match(r"(pip|setuptools|wheel)==", pin)]
    installer = [pin.replace("==", "<=") for pin in tools if pin.startswith("pip==")]
    lines = [line for line in text.splitlines() if line.strip()]
    conda = {"name": "mlflow-env", "channels": ["conda-forge"]}
    conda["dependencies"] = [f"python={python}", *installer, {"pip": lines}]
    return {
        "conda.yaml": conda,
        "python_env.yaml": {"python": python, "build_dependencies": tools, "dependencies": ["-r requirements.txt"]},
    }
