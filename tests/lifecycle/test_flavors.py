"""The flavors: how each is stored, loaded and checked, and which task a model has."""

import re
import shutil

import mlflow
import pytest
import yaml
from execution import ROOT
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from versions import LOCK, iris_rows, save

from mlflow_lifecycle.exceptions import UnreviewedContentError
from mlflow_lifecycle.flavors import FLAVORS, flavor_of, load_estimator, stored_task, task_of
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.policy import check_contents

LOCKED = dict(re.findall(r"(?m)^(xgboost-cpu|lightgbm)(==[^ ;]+)", (ROOT / "requirements-dev.txt").read_text()))
PINS = {"xgboost": f"xgboost-cpu{LOCKED['xgboost-cpu']}", "lightgbm": f"lightgbm{LOCKED['lightgbm']}"}
CLASSES = {"xgboost": "xgboost.sklearn.XGBClassifier", "lightgbm": "lightgbm.sklearn.LGBMClassifier"}


def pins_with(name: str) -> list[str]:
    """Return the pins of this project, and that of the flavor's library."""
    return [*read_pins(ROOT / "model_requirements.txt"), PINS[name]]


@pytest.fixture(params=CLASSES)
def native(request, tmp_path):
    """Give the flavor, and the folder of a model as it writes it, made by hand: the library need not be installed."""
    flavor = FLAVORS[request.param]
    folder = save(tmp_path / "model", pip_requirements=pins_with(flavor.name))
    (folder / "model.skops").rename(folder / flavor.file)
    entry = flavor.entry | {flavor.version_key: "1.0", "model_class": CLASSES[flavor.name]}
    if flavor.trusted_types:
        entry["skops_trusted_types"] = sorted(flavor.trusted_types)
    content = yaml.safe_load((folder / "MLmodel").read_text())
    pyfunc = content["flavors"]["python_function"]
    kept = {name: pyfunc[name] for name in ("env", "python_version")}
    content["flavors"] = {"python_function": kept | flavor.loader, flavor.name: entry}
    (folder / "MLmodel").write_text(yaml.safe_dump(content))
    return flavor, folder


@pytest.fixture
def packages(tmp_path):
    """Give the function that writes the pins of this project with hashes, and more pins."""

    def write(*pins: str):
        text = locked(read_pins(ROOT / "model_requirements.txt"), LOCK)
        for pin in pins:
            text += f"{pin} \\\n    --hash=sha256:{'0' * 64}\n"
        path = tmp_path / "packages.txt"
        path.write_text(text)
        return path

    return write


def refusal(folder, packages) -> str:
    with pytest.raises(UnreviewedContentError) as caught:
        check_contents(folder, packages)
    return str(caught.value)


def change(folder, name: str, model_class: str | None) -> None:
    """Change the class of the model in MLmodel."""
    content = yaml.safe_load((folder / "MLmodel").read_text())
    content["flavors"][name]["model_class"] = model_class
    (folder / "MLmodel").write_text(yaml.safe_dump(content))


def test_native_model_is_accepted_and_its_task_is_known_without_its_library(native, packages):
    flavor, folder = native
    check_contents(folder, packages(PINS[flavor.name]))
    assert stored_task(folder) == "classification"
    change(folder, flavor.name, CLASSES[flavor.name].replace("Classifier", "Regressor"))
    check_contents(folder, packages(PINS[flavor.name]))
    assert stored_task(folder) == "regression"


@pytest.mark.parametrize("native", ["xgboost"], indirect=True)
@pytest.mark.parametrize("model_class", ["xgboost.core.Booster", None])
def test_model_class_outside_of_the_fixed_list_is_refused(native, packages, model_class):
    flavor, folder = native
    change(folder, flavor.name, model_class)
    message = refusal(folder, packages(PINS[flavor.name]))
    assert message.startswith(f"MLmodel: model_class is {model_class!r}, and must be one of {flavor.name}.sklearn.")
    assert flavor.advice in message


def test_pins_without_the_library_are_refused(native, packages, tmp_path):
    # given a model that was logged with the pins of this project, which have no booster
    flavor, folder = native
    plain = save(tmp_path / "plain")
    for name in ("requirements.txt", "conda.yaml", "python_env.yaml"):
        shutil.copy(plain / name, folder / name)
    message = refusal(folder, packages())
    assert message.startswith(f"requirements.txt: it does not pin {' or '.join(flavor.packages)}.")


def test_text_column_of_a_native_model_is_refused(native, packages):
    flavor, folder = native
    text = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(text.replace('"type": "double"', '"type": "string"', 1))
    message = refusal(folder, packages(PINS[flavor.name]))
    assert message.startswith("MLmodel: the column 'sepal length (cm)' is text, which")


def test_pyfunc_model_and_unknown_flavor_are_refused_with_what_to_save():
    pyfunc = mlflow.models.Model(flavors={"python_function": {}})
    with pytest.raises(UnreviewedContentError, match=r"a pyfunc model runs its own code\. Save a scikit-learn"):
        flavor_of(pyfunc)
    unknown = mlflow.models.Model(flavors={"python_function": {}, "catboost": {}})
    with pytest.raises(UnreviewedContentError, match=r"one of sklearn, xgboost, lightgbm, got catboost\. Save"):
        flavor_of(unknown)


ESTIMATORS = {
    "pipeline": (make_pipeline(StandardScaler(), DummyClassifier()), "species", "classification"),
    "search": (GridSearchCV(make_pipeline(DummyRegressor()), {}), "petal width (cm)", "regression"),
}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_task_of_a_saved_model_is_that_of_the_loaded_one(kind, tmp_path):
    estimator, target, task = ESTIMATORS[kind]
    types = ["sklearn.metrics._scorer._PassthroughScorer", "sklearn.model_selection._split.KFold", "numpy.dtype"]
    folder = save(tmp_path / "model", estimator, target=target, skops_trusted_types=types)
    assert stored_task(folder) == task
    assert task_of(load_estimator(folder)) == task


def test_model_without_a_task_is_refused(tmp_path):
    folder = save(tmp_path / "model", KMeans(2), iris_rows().drop(columns="species"), "petal width (cm)")
    with pytest.raises(ValueError, match="KMeans is neither a classifier nor a regressor"):
        stored_task(folder)
    with pytest.raises(ValueError, match="KMeans is neither a classifier nor a regressor"):
        task_of(load_estimator(folder))


@pytest.mark.parametrize(("name", "task"), [("xgboost", "classification"), ("lightgbm", "regression")])
@pytest.mark.extended  # it takes long
def test_model_saved_by_the_real_library_is_accepted_and_loaded(name, task, tmp_path, packages):
    # given a model that the library itself has trained, and MLflow has saved
    library = pytest.importorskip(name, reason=f"{name} is not installed. Install it: make site")
    estimator = getattr(library, {"xgboost": "XGBClassifier", "lightgbm": "LGBMRegressor"}[name])
    data = load_iris(as_frame=True)
    model = estimator(n_estimators=3, verbosity=0).fit(data.data, data.target)
    signature = mlflow.models.infer_signature(data.data, data.target)
    settings = {"signature": signature, "pip_requirements": pins_with(name)}
    getattr(mlflow, name).save_model(model, tmp_path / "model", **settings)
    # then the policy accepts it, and the loaded model predicts the same
    check_contents(tmp_path / "model", packages(PINS[name]))
    assert stored_task(tmp_path / "model") == task
    loaded = load_estimator(tmp_path / "model")
    assert task_of(loaded) == task
    assert (loaded.predict(data.data) == model.predict(data.data)).all()
