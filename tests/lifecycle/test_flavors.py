"""The flavors: how each is stored, loaded and checked, and which task a model has."""

import functools
import re
import shutil

import mlflow
import pytest
import yaml
from execution import ROOT
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from versions import LOCK, save

from mlflow_lifecycle.exceptions import UnreviewedContentError
from mlflow_lifecycle.flavors import FLAVORS, load_estimator, stored_task, task_of
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.policy import check_contents

INSTALL = "make site"
LOCKED = dict(re.findall(r"(?m)^(xgboost-cpu|lightgbm)(==[^ ;]+)", (ROOT / "requirements-dev.txt").read_text()))
PINS = {
    "sklearn": "scikit-learn",
    "xgboost": f"xgboost-cpu{LOCKED['xgboost-cpu']}",
    "lightgbm": f"lightgbm{LOCKED['lightgbm']}",
}
CLASSES = {"xgboost": "xgboost.sklearn.XGBClassifier", "lightgbm": "lightgbm.sklearn.LGBMClassifier"}


def pins_with(name: str) -> list[str]:
    """Return the pins of this project, and that of the flavor's library."""
    pins = read_pins(ROOT / "model_requirements.txt")
    return pins if name == "sklearn" else [*pins, PINS[name]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give the function that returns a saved scikit-learn model with the pins of a flavor."""

    @functools.cache
    def saved_with(name: str):
        return save(tmp_path_factory.mktemp(name) / "model", pip_requirements=pins_with(name))

    return saved_with


@pytest.fixture(params=CLASSES)
def native(request, tmp_path, saved):
    """Give the flavor, and the folder of a model as it writes it, made by hand: the library need not be installed."""
    flavor = FLAVORS[request.param]
    folder = shutil.copytree(saved(flavor.name), tmp_path / "model")
    (folder / "model.skops").rename(folder / flavor.file)
    model_class = CLASSES[flavor.name]
    entry = flavor.entry | {flavor.version_key: "1.0", "model_class": model_class}
    if flavor.trusted_types:
        entry["skops_trusted_types"] = sorted(flavor.trusted_types, reverse=True)
    content = yaml.safe_load((folder / "MLmodel").read_text())
    pyfunc = content["flavors"]["python_function"]
    kept = {name: pyfunc[name] for name in ("env", "python_version")}
    content["flavors"] = {"python_function": kept | flavor.loader, flavor.name: entry}
    (folder / "MLmodel").write_text(yaml.safe_dump(content))
    return flavor, folder


@pytest.fixture
def packages(tmp_path):
    """Give the function that writes the pins of a flavor with hashes."""

    def write(name: str):
        text = locked(read_pins(ROOT / "model_requirements.txt"), LOCK)
        if name != "sklearn":
            text += f"{PINS[name]} \\\n    --hash=sha256:{'0' * 64}\n"
        path = tmp_path / "packages.txt"
        path.write_text(text)
        return path

    return write


def refusal(folder, packages) -> str:
    with pytest.raises(UnreviewedContentError) as caught:
        check_contents(folder, packages)
    return str(caught.value)


def change(folder, **entries) -> None:
    """Change entries of the flavor in MLmodel."""
    content = yaml.safe_load((folder / "MLmodel").read_text())
    for name in set(content["flavors"]) - {"python_function"}:
        content["flavors"][name].update(entries)
    (folder / "MLmodel").write_text(yaml.safe_dump(content))


def test_native_model_is_accepted_with_its_types_in_any_order(native, packages):
    flavor, folder = native
    check_contents(folder, packages(flavor.name))
    change(folder, **({"skops_trusted_types": sorted(flavor.trusted_types)} if flavor.trusted_types else {}))
    check_contents(folder, packages(flavor.name))


def test_task_of_a_native_model_is_known_without_its_library(native):
    assert stored_task(native[1]) == "classification"
    change(native[1], model_class=CLASSES[native[0].name].replace("Classifier", "Regressor"))
    assert stored_task(native[1]) == "regression"


@pytest.mark.parametrize("model_class", ["xgboost.core.Booster", "lightgbm.basic.Booster", "os.system", None])
def test_model_class_outside_of_the_fixed_list_is_refused(native, packages, model_class):
    flavor, folder = native
    change(folder, model_class=model_class)
    message = refusal(folder, packages(flavor.name))
    assert message.startswith(f"MLmodel: model_class is {model_class!r}, and must be one of {flavor.name}.sklearn.")
    assert flavor.advice in message


@pytest.mark.parametrize("native", ["xgboost"], indirect=True)
def test_xgboost_in_json_is_refused_with_the_format_to_save(native, packages):
    change(native[1], model_format="json", data="model.json")
    (native[1] / "model.ubj").rename(native[1] / "model.json")
    assert refusal(native[1], packages("xgboost")) == (
        "MLmodel: model_format is 'json', and must be 'ubj'. Save an XGBClassifier or XGBRegressor with "
        'mlflow.xgboost.log_model(..., model_format="ubj").'
    )


@pytest.mark.parametrize("native", ["lightgbm"], indirect=True)
def test_lightgbm_in_a_pickle_is_refused_with_the_format_to_save(native, packages):
    change(native[1], serialization_format="cloudpickle", data="model.pkl")
    message = refusal(native[1], packages("lightgbm"))
    assert message.startswith("MLmodel: serialization_format is 'cloudpickle', and must be 'skops'. Save an LGBM")


@pytest.mark.parametrize("native", ["lightgbm"], indirect=True)
def test_lightgbm_may_not_add_types(native, packages):
    change(native[1], skops_trusted_types=[*FLAVORS["lightgbm"].trusted_types, "builtins.eval"])
    message = refusal(native[1], packages("lightgbm"))
    assert message.startswith("MLmodel: skops would load types that nobody has reviewed: builtins.eval.")


def test_pins_without_the_library_are_refused(native, packages, saved):
    # given a model that was logged with the pins of this project, which have no booster
    flavor, folder = native
    for name in ("requirements.txt", "conda.yaml", "python_env.yaml"):
        shutil.copy(saved("sklearn") / name, folder / name)
    message = refusal(folder, packages("sklearn"))
    assert message.startswith(f"requirements.txt: it does not pin {' or '.join(flavor.packages)}.")


def test_text_column_of_a_native_model_is_refused(native, packages):
    flavor, folder = native
    text = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(text.replace('"type": "double"', '"type": "string"', 1))
    message = refusal(folder, packages(flavor.name))
    assert message.startswith("MLmodel: the column 'sepal length (cm)' is text, which")


def test_pyfunc_model_is_refused_with_what_to_save(native, packages):
    content = yaml.safe_load((native[1] / "MLmodel").read_text())
    del content["flavors"][native[0].name]
    (native[1] / "MLmodel").write_text(yaml.safe_dump(content))
    message = refusal(native[1], packages(native[0].name))
    assert message.startswith("MLmodel: a pyfunc model runs its own code. Save a scikit-learn, XGBoost or LightGBM")


def test_unknown_flavor_is_refused_with_those_that_are_known(native, packages):
    content = yaml.safe_load((native[1] / "MLmodel").read_text())
    content["flavors"]["catboost"] = content["flavors"].pop(native[0].name)
    (native[1] / "MLmodel").write_text(yaml.safe_dump(content))
    message = refusal(native[1], packages(native[0].name))
    assert message.startswith("MLmodel: the flavor must be one of sklearn, xgboost, lightgbm, got catboost. Save")


ESTIMATORS = {
    "classifier": (DummyClassifier(), "classification"),
    "regressor": (DummyRegressor(), "regression"),
    "pipeline": (make_pipeline(StandardScaler(), DummyClassifier()), "classification"),
    "search": (GridSearchCV(make_pipeline(DummyRegressor()), {}), "regression"),
}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_task_of_a_saved_model_is_that_of_the_loaded_one(kind, tmp_path):
    estimator, task = ESTIMATORS[kind]
    data = load_breast_cancer(as_frame=True) if task == "classification" else load_diabetes(as_frame=True)
    types = ["sklearn.metrics._scorer._PassthroughScorer", "sklearn.model_selection._split.KFold", "numpy.dtype"]
    folder = save(tmp_path / "model", estimator, data.frame, "target", skops_trusted_types=types)
    assert stored_task(folder) == task
    assert task_of(load_estimator(folder)) == task


def test_model_without_a_task_is_refused(tmp_path):
    rows = load_breast_cancer(as_frame=True).frame
    folder = save(tmp_path / "model", KMeans(2), rows, "target")
    with pytest.raises(ValueError, match="KMeans is neither a classifier nor a regressor"):
        stored_task(folder)
    with pytest.raises(ValueError, match="KMeans is neither a classifier nor a regressor"):
        task_of(load_estimator(folder))


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", ["xgboost", "lightgbm"])
@pytest.mark.extended  # it takes long
def test_model_saved_by_the_real_library_is_accepted_and_loaded(name, task, tmp_path, packages):
    # given a model that the library itself has trained, and MLflow has saved
    library = pytest.importorskip(name, reason=f"{name} is not installed. Install it: {INSTALL}")
    classifier = {"xgboost": "XGBClassifier", "lightgbm": "LGBMClassifier"}[name]
    estimator = getattr(library, classifier.replace("Classifier", "Regressor") if task == "regression" else classifier)
    data = load_breast_cancer(as_frame=True) if task == "classification" else load_diabetes(as_frame=True)
    model = estimator(n_estimators=3, verbosity=0).fit(data.data, data.target)
    signature = mlflow.models.infer_signature(data.data, data.target)
    settings = {"signature": signature, "pip_requirements": pins_with(name)}
    getattr(mlflow, name).save_model(model, tmp_path / "model", **settings)
    # then the policy accepts it, and the loaded model predicts the same
    check_contents(tmp_path / "model", packages(name))
    assert stored_task(tmp_path / "model") == task
    loaded = load_estimator(tmp_path / "model")
    assert task_of(loaded) == task
    assert (loaded.predict(data.data) == model.predict(data.data)).all()
