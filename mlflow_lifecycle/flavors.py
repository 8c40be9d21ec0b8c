"""The flavors of MLflow that can be loaded without running code of the model: one row per flavor.

MLflow loads whatever MLmodel names, such as a pickle, a class, or Python files beside the model.
Each flavor here has one format that only holds data, and its entries in MLmodel are known.
"""

import importlib
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from sklearn.base import ClassifierMixin, RegressorMixin, is_classifier, is_regressor

from mlflow_lifecycle.exceptions import InvalidInputError, LifecycleError, UnreviewedContentError

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

CLASSIFICATION = "classification"
REGRESSION = "regression"
# Where a search, RFE and FrozenEstimator keep the estimator that predicts.
INNER_ESTIMATORS = ("best_estimator_", "estimator_", "estimator")


@dataclass(frozen=True)
class Flavor:
    """How a flavor stores a model.

    Attributes:
        name: the flavor. The module of MLflow that loads it has the same name.
        file: the file that holds the model.
        entry: its entry in MLmodel, without the version and without the types for skops.
        loader: its entry for pyfunc in MLmodel, without the environment.
        version_key: where its entry states the version of the library.
        packages: the requirements must pin one of these.
        advice: how to save a model that is accepted.
        model_classes: each allowed ``model_class``, with its task. MLflow calls this class.
        trusted_types: what skops may load, beside the types that it knows and those of the project.
        text_columns: whether a model takes text.
    """

    name: str
    file: str
    entry: dict
    loader: dict
    version_key: str
    packages: tuple[str, ...]
    advice: str
    model_classes: dict[str, str] = field(default_factory=dict)
    trusted_types: frozenset[str] = frozenset()
    text_columns: bool = False


SKLEARN = Flavor(
    name="sklearn",
    file="model.skops",
    entry={
        "serialization_format": "skops",
        "pickled_model": "model.skops",
        "code": None,
    },
    loader={
        "loader_module": "mlflow.sklearn",
        "model_path": "model.skops",
        "predict_fn": "predict",
    },
    version_key="sklearn_version",
    packages=("scikit-learn",),
    advice='Save the model with mlflow.sklearn.log_model(..., serialization_format="skops")',
    text_columns=True,
)
XGBOOST = Flavor(
    name="xgboost",
    file="model.ubj",
    entry={"model_format": "ubj", "data": "model.ubj", "code": None},
    loader={"loader_module": "mlflow.xgboost", "data": "model.ubj"},
    version_key="xgb_version",
    packages=("xgboost", "xgboost-cpu"),
    advice=(
        "Save an XGBClassifier or XGBRegressor with "
        'mlflow.xgboost.log_model(..., model_format="ubj")'
    ),
    model_classes={
        "xgboost.sklearn.XGBClassifier": CLASSIFICATION,
        "xgboost.sklearn.XGBRFClassifier": CLASSIFICATION,
        "xgboost.sklearn.XGBRegressor": REGRESSION,
        "xgboost.sklearn.XGBRFRegressor": REGRESSION,
    },
)
LIGHTGBM = Flavor(
    name="lightgbm",
    file="model.skops",
    entry={"serialization_format": "skops", "data": "model.skops", "code": None},
    loader={"loader_module": "mlflow.lightgbm", "data": "model.skops"},
    version_key="lgb_version",
    packages=("lightgbm",),
    advice=(
        "Save an LGBMClassifier or LGBMRegressor with "
        'mlflow.lightgbm.log_model(..., serialization_format="skops")'
    ),
    model_classes={
        "lightgbm.sklearn.LGBMClassifier": CLASSIFICATION,
        "lightgbm.sklearn.LGBMRegressor": REGRESSION,
    },
    trusted_types=frozenset(
        {
            "collections.OrderedDict",
            "lightgbm.basic.Booster",
            "lightgbm.sklearn.LGBMClassifier",
            "lightgbm.sklearn.LGBMRegressor",
        }
    ),
)
FLAVORS = {flavor.name: flavor for flavor in (SKLEARN, XGBOOST, LIGHTGBM)}


def flavor_of(model: mlflow.models.Model) -> Flavor:
    """Return the flavor of a model from its MLmodel.

    Raises:
        UnreviewedContentError: it has none of the table, or more than one.
    """
    names = sorted(set(model.flavors) - {"python_function"})
    if not names:
        raise UnreviewedContentError(
            "a pyfunc model runs its own code. Save a scikit-learn, XGBoost or LightGBM model "
            "with its own flavor, such as mlflow.sklearn.log_model"
        )
    if len(names) > 1 or names[0] not in FLAVORS:
        raise UnreviewedContentError(
            f"the flavor must be one of {', '.join(FLAVORS)}, got {', '.join(names)}. "
            "Save the model with one of these, such as mlflow.sklearn.log_model"
        )
    return FLAVORS[names[0]]


def load_estimator(folder: Path) -> "BaseEstimator":
    """Return the estimator in a folder that ``policy.check_contents`` has accepted.

    Raises:
        LifecycleError: its library is not installed here.
    """
    flavor = flavor_of(mlflow.models.Model.load(str(Path(folder) / "MLmodel")))
    module = importlib.import_module(f"mlflow.{flavor.name}")
    try:
        return module.load_model(str(folder))
    except ModuleNotFoundError as error:
        raise LifecycleError(
            f"The model needs {error.name}, which is not installed here. "
            f"Install the version in the model's requirements.txt: {' or '.join(flavor.packages)}"
        ) from None


def task_of(estimator: "BaseEstimator") -> str:
    """Return "classification" or "regression".

    Raises:
        InvalidInputError: the estimator is neither a classifier nor a regressor.
    """
    if is_classifier(estimator):
        return CLASSIFICATION
    if is_regressor(estimator):
        return REGRESSION
    raise InvalidInputError(f"{type(estimator).__name__} is neither a classifier nor a regressor.")


def stored_task(folder: Path) -> str:
    """Return the task of a saved model, as `task_of` would, without loading the model.

    The class of a scikit-learn model is imported: the policy must have accepted the folder.

    Raises:
        InvalidInputError: the model is neither a classifier nor a regressor.
    """
    model = mlflow.models.Model.load(str(Path(folder) / "MLmodel"))
    flavor = flavor_of(model)
    model_class = model.flavors[flavor.name].get("model_class")
    if model_class in flavor.model_classes:
        return flavor.model_classes[model_class]
    with zipfile.ZipFile(Path(folder) / flavor.file) as archive:
        schema = json.loads(archive.read("schema.json"))
    return _task_of_node(schema)


def _task_of_node(node: dict) -> str:
    """Return the task of an estimator, from its node in the schema of a skops file."""
    estimator_class = getattr(importlib.import_module(node["__module__"]), node["__class__"])
    if issubclass(estimator_class, ClassifierMixin):
        return CLASSIFICATION
    if issubclass(estimator_class, RegressorMixin):
        return REGRESSION
    attributes = node.get("content", {}).get("content", {})
    if "steps" in attributes:
        name_and_estimator = attributes["steps"]["content"][-1]
        return _task_of_node(name_and_estimator["content"][1])
    for name in INNER_ESTIMATORS:
        if name in attributes:
            return _task_of_node(attributes[name])
    raise InvalidInputError(f"{node['__class__']} is neither a classifier nor a regressor.")
