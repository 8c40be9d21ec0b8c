"""Drift, broken input and quality of what a served version was asked."""
