"""Run the command ``lifecycle`` as ``python -m mlflow_lifecycle``."""

from mlflow_lifecycle.cli import main

main()
