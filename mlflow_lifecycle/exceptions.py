"""The errors that callers may catch. Each message says what is wrong, and what to do.

The command prints these in one line. Any other error is a fault of this package, and keeps its
traceback.
"""


class LifecycleError(Exception):
    """What was asked for cannot be done; the base class of all errors below."""


class InvalidInputError(LifecycleError, ValueError):
    """An argument, a file or a table is invalid."""


class StoreUnusableError(LifecycleError):
    """The MLflow store cannot be used. The message contains no secret."""

    def __init__(self, problem: str, remedy: str) -> None:
        """Keep the problem and the remedy, for callers that show them apart."""
        super().__init__(f"{problem} {remedy}".rstrip())
        self.problem = problem
        self.remedy = remedy


class KeyRefusedError(LifecycleError):
    """A key cannot be used."""


class UnreviewedContentError(LifecycleError):
    """A model holds files, entries or types that may not be loaded."""


class NotVerifiedError(LifecycleError):
    """A version must not be loaded."""


class GateClosedError(LifecycleError):
    """A version may not be released. The message names the checks that failed."""


class TagRefusedError(LifecycleError):
    """The commit cannot be tagged. Nothing was changed."""


class EnvironmentNotBuiltError(LifecycleError):
    """The environment of a model cannot be built as it was recorded."""


class PredictionFailedError(LifecycleError):
    """A model gave no predictions in its environment."""


class ServingFailedError(LifecycleError):
    """A server did not start, or has ended."""


class SearchFailedError(LifecycleError):
    """A search has no result, or its queue cannot be used."""


class SparkFailedError(LifecycleError):
    """Spark could not be started, or its job failed."""


class NotAuditedError(LifecycleError):
    """Packages were not looked up. It does not mean that nothing would be found."""


class NotRenewedError(LifecycleError):
    """A version would answer otherwise with the new packages. Nothing was registered."""
