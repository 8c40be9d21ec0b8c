"""The MLflow calls of project.ipynb, and nothing else: what MLflow itself costs. The peer in quickstart.py."""

import os

os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, check_scoring
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NAME = "tracking_quick_start"

data = load_iris(as_frame=True).frame
data["species"] = load_iris().target_names[data.pop("target")]
data_train, data_test = train_test_split(data, test_size=0.2, stratify=data["species"], random_state=42)
features_train, target_train = data_train.drop(columns="species"), data_train["species"]
features_test, target_test = data_test.drop(columns="species"), data_test["species"]
signature = mlflow.models.infer_signature(features_train, target_train)
dataset_train = mlflow.data.from_pandas(data_train, name="iris_train")
dataset_test = mlflow.data.from_pandas(data_test, name="iris_test")

configurations = [
    {"solver": "lbfgs", "max_iter": 1000, "random_state": 8888, "C": 1.0},
    {"solver": "newton-cg", "max_iter": 1000, "random_state": 1000, "warm_start": True, "C": 0.01},
]
score = check_scoring(scoring=["accuracy", "f1_macro", "neg_log_loss"])
mlflow.set_experiment(NAME)
mlflow.set_experiment_tags({"mlflow.note.content": "Two configurations on Iris.", "dataset": "iris"})
versions = []
for parameters in configurations:
    name = parameters["solver"]
    model = make_pipeline(StandardScaler(), LogisticRegression(**parameters)).fit(features_train, target_train)
    tags = {"dataset": "iris", "configuration": name}
    with mlflow.start_run(run_name=name, tags=tags, description=f"{name} on Iris"):
        mlflow.log_params(parameters)
        mlflow.log_input(dataset_train, "training")
        mlflow.log_input(dataset_test, "evaluation")
        logged = mlflow.sklearn.log_model(
            model,
            name="model",
            signature=signature,
            input_example=features_train[:3],
            pip_requirements="model_requirements.txt",
            skops_trusted_types=[],
            registered_model_name=NAME,
        )
        metrics = score(model, features_test, target_test)
        mlflow.log_metrics(metrics, model_id=logged.model_id, dataset=dataset_test)
    versions.append(str(logged.registered_model_version))

mlflow.search_runs(
    filter_string=f"status = 'FINISHED' AND dataset.digest = '{dataset_test.digest}'",
    order_by=["metrics.accuracy DESC", "start_time ASC"],
)
mlflow.search_model_versions(filter_string=f"name = '{NAME}'")
for version in versions:
    reloaded = mlflow.sklearn.load_model(f"models:/{NAME}/{version}")
    reloaded.predict_proba(features_test)
    mlflow.artifacts.load_text(f"models:/{NAME}/{version}/requirements.txt")
predictions = mlflow.pyfunc.load_model(f"models:/{NAME}/{versions[0]}").predict(features_test)
ConfusionMatrixDisplay.from_predictions(target_test, predictions).figure_.savefig("matrix.png")
mlflow.artifacts.download_artifacts(f"models:/{NAME}/{versions[0]}")
mlflow.models.convert_input_example_to_serving_input(features_test)
mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", versions[0])
champion = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
try:
    champion.predict(features_test.drop(columns=features_test.columns[-1]))
except mlflow.MlflowException as error:
    print(error.message)
