"""Release, verify, serve and monitor MLflow models.

MLflow and scikit-learn are called directly; no function here wraps one call of theirs. Each module
says what MLflow does not have, so that it can be deleted once MLflow has it.
"""

import importlib

# The public names, by the module that defines them. Each is imported at first use, because MLflow
# takes seconds to import.
MODULES = {
    "audit": ("audit_model", "audit_pins"),
    "batch": ("score",),
    "comparison": (
        "Interval",
        "calibration_table",
        "choose",
        "detectable_difference",
        "folds_interval",
        "proportion_interval",
        "proportions",
        "rows_interval",
    ),
    "datasets": (
        "almost_unique",
        "check_table",
        "fingerprint",
        "read_table",
        "runs_with",
        "verified_file",
    ),
    "difference": ("compare_versions", "log_difference"),
    "environments": ("build_environment",),
    "exceptions": ("GateClosedError", "LifecycleError", "NotRenewedError", "NotVerifiedError"),
    "experiments": ("open_experiment", "source_tags"),
    "monitoring.batches": ("log_batch", "plot_differences", "read_batch"),
    "monitoring.drift": ("alarm_rate", "has_alarm"),
    "monitoring.judge": ("judge", "load_reference"),
    "pins": ("find_model_requirements", "locked", "read_pins"),
    "releases.card": ("make_card",),
    "releases.gate": ("DEFAULT_CHECKS", "CheckResult", "GateContext", "GateSettings"),
    "releases.promote": ("promote",),
    "releases.release": ("history", "release", "rollback"),
    "renew": ("renew_version", "replace_packages"),
    "report": ("make_report", "write_report"),
    "search": ("run_search",),
    "scoring": ("measure_of", "predict", "score_rows"),
    "serving": ("read_record", "serve", "serve_verified"),
    "splits": ("Split", "score_folds", "split_table"),
    "signing.adopt": ("sign_version",),
    "signing.keys": ("own_key", "own_public_key"),
    "signing.statement": ("register_candidate",),
    "signing.verify": ("Verified", "verified"),
}
PUBLIC = {name: module for module, names in MODULES.items() for name in names}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> object:
    """Return a public name, imported from its module."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{PUBLIC[name]}")
    return getattr(module, name)
