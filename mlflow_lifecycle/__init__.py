"""What MLflow lacks for model versions that a team can trust, one noun per module.

What MLflow and scikit-learn have is called directly; no function here wraps a call of theirs. Each module says which
lack it fills, so that it can be deleted on the day MLflow has it.
"""
