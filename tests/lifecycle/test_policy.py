"""What a model's folder may hold: whatever asks for more is refused before any of it is loaded."""

import shutil
from pathlib import Path

import mlflow
import pytest
import yaml
from execution import ROOT
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from versions import LOCK, save

from mlflow_lifecycle.exceptions import UnreviewedContentError
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.policy import check_contents

TREE = "sklearn.tree._tree.Tree"


class Payload(LogisticRegression):
    """A model that writes a file when it is deserialised."""

    def __setstate__(self, state):
        """Take ``state``, as pickle and skops both do."""
        Path(state["marker"]).touch()
        super().__setstate__(state)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Give the file with the pins of the models here, and their hashes."""
    path = tmp_path_factory.mktemp("packages") / "packages.txt"
    path.write_text(locked(read_pins(ROOT / "model_requirements.txt"), LOCK))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Give the folder of a saved model. No test changes it."""
    return save(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original, tmp_path):
    """Give a copy of the saved model."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def refused(packages):
    """Give the function that checks a folder, which must be refused, and returns the message."""

    def check(folder: Path) -> str:
        with pytest.raises(UnreviewedContentError) as caught:
            check_contents(folder, packages)
        return str(caught.value)

    return check


@pytest.mark.parametrize("options", [{}, {"input_example": None}], ids=["with an example", "without"])
def test_saved_model_is_accepted(tmp_path, packages, options):
    assert check_contents(save(tmp_path / "model", **options), packages) is None


@pytest.mark.parametrize("name", ["MLmodel", "model.skops", "conda.yaml", "input_example.json"])
def test_a_missing_file_is_refused(model, refused, name):
    (model / name).unlink()
    message = refused(model)
    assert message.startswith(f"{name}: ")
    assert "missing" in message or "Could not find" in message


def test_a_file_more_is_refused(model, refused):
    (model / "model.pkl").write_text("more")
    assert refused(model).startswith("model.pkl: no such file belongs to a model of the flavor sklearn.")


def test_a_folder_is_refused(model, refused):
    (model / "code").mkdir()
    assert refused(model).startswith("code: only files belong to a model")


def test_a_link_is_refused(model, refused, tmp_path):
    # given a file that is the same, but lies where it can be changed later
    (model / "MLmodel").rename(tmp_path / "elsewhere")
    (model / "MLmodel").symlink_to(tmp_path / "elsewhere")
    assert refused(model).startswith("MLmodel: only files belong to a model")


def crafted(folder: Path, **options) -> tuple[Path, Path]:
    """Save a model that writes a file when it is loaded; return its folder, and that file, which is not there."""
    payload = Payload(max_iter=1000)
    payload.marker = str(folder / "marker")
    save(folder / "model", payload, **options)
    (folder / "marker").unlink(missing_ok=True)
    return folder / "model", folder / "marker"


CRAFTED = {
    "pickle": (
        {"serialization_format": "pickle"},
        "MLmodel: serialization_format is 'pickle', and must be 'skops'. Save the model with mlflow.sklearn.log_model",
    ),
    "skops": (
        {"skops_trusted_types": ["test_policy.Payload"]},
        "MLmodel: skops would load types that nobody has reviewed: test_policy.Payload. Add a type that you have",
    ),
}


@pytest.mark.parametrize(("options", "reason"), CRAFTED.values(), ids=CRAFTED)
def test_crafted_model_is_refused_before_it_is_deserialised(refused, tmp_path, options, reason):
    folder, marker = crafted(tmp_path, **options)
    assert refused(folder).startswith(reason)
    assert not marker.exists()
    # and where nobody checks it, it does its work
    mlflow.pyfunc.load_model(str(folder))
    assert marker.exists()


def test_skops_file_is_asked_itself(refused, tmp_path):
    # given a model whose MLmodel keeps silent about what model.skops asks for
    folder, marker = crafted(tmp_path, **CRAFTED["skops"][0])
    text = (folder / "MLmodel").read_text(encoding="utf-8")
    (folder / "MLmodel").write_text(text.replace("    - test_policy.Payload\n", ""), encoding="utf-8")
    message = refused(folder)
    assert message.startswith("model.skops: skops would load types that nobody has reviewed: test_policy.Payload.")
    assert not marker.exists()


def test_pickle_under_the_name_of_a_skops_file_is_refused(refused, model, tmp_path):
    save(tmp_path / "pickled", serialization_format="pickle")
    shutil.copy(tmp_path / "pickled/model.pkl", model / "model.skops")
    assert refused(model).startswith("model.skops: ")


def edited(path: Path, change) -> None:
    """Change the YAML file at ``path`` by a function of its content."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value"),
    [("loader_module", "evil_loader"), ("code", "."), ("python_version", "3.11.7 --find-links /tmp")],
)
def test_mlmodel_that_says_something_else_is_refused(refused, model, key, value):
    edited(model / "MLmodel", lambda content: content["flavors"]["python_function"].update({key: value}))
    assert refused(model).startswith(f"MLmodel: {key} is ")


def test_only_the_projects_own_list_of_types_counts(refused, packages, tmp_path):
    # given a forest, whose MLmodel allows the type that forests need
    folder = save(tmp_path / "model", RandomForestClassifier(n_estimators=2), skops_trusted_types=[TREE])
    # then it depends on the project's list whether it is accepted
    assert TREE in refused(folder)
    check_contents(folder, packages, [TREE])


ENVIRONMENTS = {
    "a build tool from elsewhere": ("python_env.yaml", lambda c: c["build_dependencies"].append("evil @ file:///evil")),
    "another channel": ("conda.yaml", lambda c: c.update(channels=["https://evil.example"])),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment_file_that_differs_from_the_pins_is_refused(refused, model, case):
    name, change = ENVIRONMENTS[case]
    edited(model / name, change)
    assert refused(model).startswith(f"{name}: it asks for other packages than requirements.txt.")


def test_line_in_requirements_that_is_no_pin_is_refused(refused, model):
    with (model / "requirements.txt").open("a") as file:
        file.write("\nevil @ file:///evil\n")
    assert refused(model).startswith("requirements.txt: ")


def test_requirements_and_files_that_agree_with_each_other_and_not_with_the_hashes_are_refused(refused, model):
    # given another version, the same in all three files
    for name in ("requirements.txt", "conda.yaml", "python_env.yaml"):
        text = (model / name).read_text(encoding="utf-8")
        (model / name).write_text(text.replace("skops==", "skops==0."), encoding="utf-8")
    assert refused(model).startswith("requirements.txt: its pins differ from those in the signed list of hashes.")
