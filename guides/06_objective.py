"""The objective of the search in guide 06. To search something else, write such a function of your own.

`lifecycle search-worker` calls it with an Optuna trial, and logs the settings that it asks for and the value that it
returns.
"""

import optuna
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

digits = load_digits()


def cv_accuracy(trial: optuna.Trial) -> float:
    """Score a forest on handwritten digits by cross-validation."""
    forest = RandomForestClassifier(
        max_features=trial.suggest_float("max_features", 0.03, 0.3, log=True),
        min_samples_leaf=trial.suggest_int("min_samples_leaf", 1, 8),
        random_state=0,
    )
    return cross_val_score(forest, digits.data, digits.target, cv=3).mean()
