"""The server of a model, which runs in the model's own environment.

``python -I FOLDER/server settings.json`` starts it, by the Python of that environment. It imports
only what is in the environment of every model, and nothing else of ``mlflow_lifecycle``.
``mlflow_lifecycle.serving`` writes the settings and starts it, for a model that is verified.
"""
