"""Write a store with whatever MLflow runs this file, and read a store as plain values.

Usage: python store_content.py FILE

The store is the one that MLFLOW_TRACKING_URI names. FILE becomes what this MLflow then reads from it, as JSON.
Only what MLflow 2.22 and today's have in common is used, so that both can run it.
"""

import json
import sys
from pathlib import Path

import mlflow
import sklearn
from mlflow.models import infer_signature
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

NAME = "iris"
EXPERIMENT = "before the upgrade"


def write() -> None:
    """Log two runs, each with a model, and register the models as versions 1 and 2."""
    features, target = load_iris(return_X_y=True, as_frame=True)
    client = mlflow.MlflowClient()
    mlflow.set_experiment(EXPERIMENT)
    mlflow.set_experiment_tag("purpose", "to be upgraded")
    for strength in (1.0, 0.01):
        model = LogisticRegression(C=strength, max_iter=1000).fit(features, target)
        with mlflow.start_run(run_name=f"C={strength}"):
            mlflow.log_params(model.get_params())
            mlflow.set_tag("reviewed by", "Zoë")
            for step, loss in enumerate([0.9, 0.5, float("nan")]):
                mlflow.log_metric("loss", loss, step=step)
            mlflow.log_input(mlflow.data.from_pandas(features, name="iris rows"), context="training")
            mlflow.log_text(f"Zoë's, with C={strength}", "a folder/notes.txt")
            mlflow.sklearn.log_model(
                model,
                "model",  # named artifact_path in 2.22, and name in 3.x
                signature=infer_signature(features, model.predict_proba(features)),
                registered_model_name=NAME,
                pip_requirements=[f"mlflow=={mlflow.__version__}", f"scikit-learn=={sklearn.__version__}"],
                pyfunc_predict_fn="predict_proba",
            )
    client.update_registered_model(NAME, "Two models of Iris.")
    client.set_registered_model_tag(NAME, "owner", "ana")
    client.set_registered_model_alias(NAME, "champion", "2")
    client.set_model_version_tag(NAME, "1", "kept", "yes")
    client.update_model_version(NAME, "1", "The first.")


def read_run(client: mlflow.MlflowClient, run_id: str) -> dict:
    """Return what the store has of a run, its artifacts included."""
    run = client.get_run(run_id)
    info = {name: getattr(run.info, name) for name in ("run_name", "status", "start_time", "end_time", "user_id")}
    history = [
        [metric.step, repr(metric.value), metric.timestamp] for metric in client.get_metric_history(run_id, "loss")
    ]
    inputs = [
        [entry.dataset.name, entry.dataset.digest, entry.dataset.schema, {tag.key: tag.value for tag in entry.tags}]
        for entry in run.inputs.dataset_inputs
    ]
    notes = mlflow.artifacts.load_text(f"runs:/{run_id}/a folder/notes.txt")
    data = {"params": run.data.params, "tags": run.data.tags, "metrics": sorted(run.data.metrics)}
    return {"info": info, "history": history, "inputs": inputs, "notes": notes} | data


def read() -> dict:
    """Return what `write` has written, from the active store."""
    client = mlflow.MlflowClient()
    features = load_iris(as_frame=True).data
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    model = client.get_registered_model(NAME)
    versions = [client.get_model_version(NAME, number) for number in ("1", "2")]
    fields = ("run_id", "status", "description", "tags", "creation_timestamp")
    addresses = [f"models:/{NAME}/1", f"models:/{NAME}/2", f"models:/{NAME}@champion"]
    content = {
        "experiment": [experiment.experiment_id, experiment.tags, experiment.creation_time],
        "runs": {run.info.run_id: read_run(client, run.info.run_id) for run in runs},
        "model": [model.description, model.tags, {alias: str(at) for alias, at in model.aliases.items()}],
        "versions": [{name: getattr(version, name) for name in fields} for version in versions],
        "predictions": {at: mlflow.pyfunc.load_model(at).predict(features).tolist() for at in addresses},
    }
    return json.loads(json.dumps(content))


if __name__ == "__main__":
    write()
    Path(sys.argv[1]).write_text(json.dumps(read()))
