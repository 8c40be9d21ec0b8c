"""The MLflow calls of project.ipynb, and nothing else: what MLflow itself costs. The peer in quickstart.py."""

import os
from pathlib import Path

import mlflow
from mlflow.models import infer_signature
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NAME = "tracking_quick_start"

mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
if mlflow.get_experiment_by_name(NAME) is None:
    tags = {"mlflow.note.content": "Two configurations on Iris.", "dataset": "iris"}
    mlflow.create_experiment(NAME, Path("mlruns").resolve().as_uri(), tags)
mlflow.set_experiment(NAME)

features, target = load_iris(return_X_y=True, as_frame=True)
target = target.astype(str)
features_train, features_test, target_train, target_test = train_test_split(
    features, target, test_size=0.2, stratify=target, random_state=42
)
dataset_train = mlflow.data.from_pandas(features_train.assign(species=target_train), targets="species")
dataset_test = mlflow.data.from_pandas(features_test.assign(species=target_test), targets="species")

configurations = [
    {"solver": "lbfgs", "max_iter": 1000, "random_state": 8888, "C": 1.0},
    {"solver": "newton-cg", "max_iter": 1000, "random_state": 1000, "warm_start": True, "C": 0.01},
]
run_ids, versions = [], []
for parameters in configurations:
    model = make_pipeline(StandardScaler(), LogisticRegression(**parameters)).fit(features_train, target_train)
    metrics = {
        "accuracy": accuracy_score(target_test, model.predict(features_test)),
        "f1_macro": f1_score(target_test, model.predict(features_test), average="macro"),
        "log_loss": log_loss(target_test, model.predict_proba(features_test)),
    }
    with mlflow.start_run(run_name=parameters["solver"], tags={"configuration": parameters["solver"]}) as run:
        mlflow.log_params(parameters)
        mlflow.log_input(dataset_train, context="training")
        mlflow.log_input(dataset_test, context="evaluation")
        logged = mlflow.sklearn.log_model(
            model,
            name="logistic_regression",
            signature=infer_signature(features_train, target_train),
            input_example=features_train.head(3),
            pip_requirements="model_requirements.txt",
            registered_model_name=NAME,
        )
        mlflow.log_metrics(metrics, model_id=logged.model_id, dataset=dataset_test)
    run_ids.append(run.info.run_id)
    versions.append(logged.registered_model_version)

mlflow.search_runs(experiment_names=[NAME], order_by=["metrics.accuracy DESC"])
mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", versions[0])
for version in versions:
    mlflow.pyfunc.load_model(f"models:/{NAME}/{version}").predict(features_test)
mlflow.pyfunc.load_model(f"models:/{NAME}@champion").predict(features_test)
mlflow.sklearn.load_model(f"models:/{NAME}@champion").predict_proba(features_test)
mlflow.artifacts.load_text(f"models:/{NAME}@champion/requirements.txt")
