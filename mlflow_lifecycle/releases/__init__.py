"""The gate that a version must pass, and its release, rollback, promotion and model card."""
