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

FILES = ["MLmodel", "model.skops", "conda.yaml", "python_env.yaml", "requirements.txt"]
FILES += ["input_example.json", "serving_input_example.json"]
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

    def check(folder: Path, trusted_types=()) -> str:
        with pytest.raises(UnreviewedContentError) as caught:
            check_contents(folder, packages, trusted_types)
        return str(caught.value)

    return check


def test_saved_model_has_just_the_files_that_are_known(original, packages):
    assert sorted(path.name for path in original.rglob("*")) == sorted(FILES)
    assert check_contents(original, packages) is None


def test_model_without_an_input_example_is_accepted(tmp_path, packages):
    assert check_contents(save(tmp_path / "model", input_example=None), packages) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(model, refused, name):
    (model / name).unlink()
    message = refused(model)
    assert message.startswith(f"{name}: ")
    assert "missing" in message or "Could not find" in message


@pytest.mark.parametrize("name", ["model.pkl", ".gitattributes", "a\nb"])
def test_a_file_more_is_refused(model, refused, name):
    (model / name).write_text("more")
    assert refused(model).startswith(f"{name}: no such file belongs to a model of the flavor sklearn.")


def test_a_folder_with_code_is_refused(model, refused):
    (model / "code").mkdir()
    (model / "code/evil_loader.py").touch()
    assert refused(model).startswith("code")


def test_an_empty_folder_is_refused(model, refused):
    (model / "empty").mkdir()
    assert refused(model).startswith("empty: only files belong to a model")


def test_an_empty_model_is_refused(tmp_path, refused):
    (tmp_path / "model").mkdir()
    assert refused(tmp_path / "model").startswith("MLmodel: ")


def test_a_link_is_refused(model, refused, tmp_path):
    # given a file that is the same, but lies where it can be changed later
    (model / "MLmodel").rename(tmp_path / "elsewhere")
    (model / "MLmodel").symlink_to(tmp_path / "elsewhere")
    assert refused(model).startswith("MLmodel: only files belong to a model")


CRAFTED = {
    "pickle": (
        {"serialization_format": "pickle"},
        "MLmodel: serialization_format is 'pickle', and must be 'skops'. Save the model with mlflow.sklearn.log_model",
    ),
    "cloudpickle": (
        {"serialization_format": "cloudpickle"},
        "MLmodel: serialization_format is 'cloudpickle', and must be 'skops'.",
    ),
    "skops": (
        {"skops_trusted_types": ["test_policy.Payload"]},
        "MLmodel: skops would load types that nobody has reviewed: test_policy.Payload. Add a type that you have",
    ),
}


@pytest.fixture
def crafted(request, tmp_path):
    """Give the folder of a model that writes a file when it is loaded, and that file, which is not there."""
    options, _ = CRAFTED[request.param]
    payload = Payload(max_iter=1000)
    payload.marker = str(tmp_path / "marker")
    folder = save(tmp_path / "model", payload, **options)
    (tmp_path / "marker").unlink(missing_ok=True)
    return folder, tmp_path / "marker"


@pytest.mark.parametrize("crafted", CRAFTED, indirect=True)
def test_crafted_model_does_its_work_when_it_is_loaded(crafted):
    # given no check, then MLflow believes the model; so the tests below show something
    folder, marker = crafted
    mlflow.pyfunc.load_model(str(folder))
    assert marker.exists()


@pytest.mark.parametrize(("crafted", "reason"), [(kind, CRAFTED[kind][1]) for kind in CRAFTED], indirect=["crafted"])
def test_crafted_model_is_refused_before_it_is_deserialised(refused, crafted, reason):
    folder, marker = crafted
    assert refused(folder).startswith(reason)
    assert not marker.exists()


@pytest.mark.parametrize("crafted", ["skops"], indirect=True)
def test_skops_file_is_asked_itself(refused, crafted):
    # given a model whose MLmodel keeps silent about what model.skops asks for
    folder, marker = crafted
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
    ("flavor", "key", "value"),
    [
        ("sklearn", "serialization_format", "pickle"),
        ("sklearn", "pickled_model", "../model.skops"),
        ("sklearn", "skops_trusted_types", ["builtins.eval"]),
        ("python_function", "loader_module", "evil_loader"),
        ("python_function", "model_path", "MLmodel"),
        ("python_function", "code", "."),
        ("python_function", "python_version", "3.11.7 --find-links /tmp"),
    ],
)
def test_mlmodel_that_says_something_else_is_refused(refused, model, flavor, key, value):
    edited(model / "MLmodel", lambda content: content["flavors"][flavor].update({key: value}))
    assert refused(model).startswith("MLmodel: ")


@pytest.mark.parametrize("reviewed", [[], [TREE]])
def test_only_the_projects_own_list_of_types_counts(refused, packages, tmp_path, reviewed):
    # given a forest, whose MLmodel allows the type that forests need
    folder = save(tmp_path / "model", RandomForestClassifier(n_estimators=2), skops_trusted_types=[TREE])
    # then it depends on the project's list whether it is accepted
    if reviewed:
        check_contents(folder, packages, reviewed)
    else:
        assert TREE in refused(folder)


ENVIRONMENTS = {
    "a build tool from elsewhere": ("python_env.yaml", lambda c: c["build_dependencies"].append("evil @ file:///evil")),
    "another list": ("python_env.yaml", lambda c: c.update(dependencies=["-r requirements.txt", "evil==1"])),
    "another Python": ("python_env.yaml", lambda c: c.update(python="3.12.1")),
    "another channel": ("conda.yaml", lambda c: c.update(channels=["https://evil.example"])),
    "a conda package": ("conda.yaml", lambda c: c["dependencies"].append("evil")),
    "a pip package": ("conda.yaml", lambda c: c["dependencies"][-1]["pip"].append("evil==1")),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment_file_that_differs_from_the_pins_is_refused(refused, model, case):
    name, change = ENVIRONMENTS[case]
    edited(model / name, change)
    assert refused(model).startswith(f"{name}: it asks for other packages than requirements.txt.")


@pytest.mark.parametrize("line", ["evil @ file:///evil", "evil>=1", "-r other.txt", "--find-links /evil", "evil==1"])
def test_line_in_requirements_that_is_no_kept_pin_is_refused(refused, model, line):
    with (model / "requirements.txt").open("a") as file:
        file.write(f"\n{line}\n")
    assert refused(model).startswith("requirements.txt: ")


def test_requirements_and_files_that_agree_with_each_other_and_not_with_the_hashes_are_refused(refused, model):
    # given another version, the same in all three files
    for name in ("requirements.txt", "conda.yaml", "python_env.yaml"):
        text = (model / name).read_text(encoding="utf-8")
        (model / name).write_text(text.replace("skops==", "skops==0."), encoding="utf-8")
    assert refused(model).startswith("requirements.txt: its pins differ from those in the signed list of hashes.")
