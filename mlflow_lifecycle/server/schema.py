"""The rows of a request: read from its body, and checked by the model's signature.

No message repeats a value of the request, because refusals are recorded.
"""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Annotated, NotRequired

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from pydantic import (
    AfterValidator,
    FailFast,
    Field,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import TypedDict

TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?)?")
Table = dict[str, list]  # the values of each column
Limits = dict[str, tuple[float, float]]  # the lowest and the highest value of columns with numbers
FLOAT32 = float(np.finfo("float32").max)


class RefusedError(Exception):
    """A request is refused, with this status and message."""

    def __init__(self, status: int, message: str):
        """Keep the message in one line: names of columns in it come from the client."""
        super().__init__(" ".join(message.split())[:500])
        self.status = status


def check_time(value: str) -> str:
    """Return a time in ISO 8601 that fits into datetime64[ns], as it is."""
    if not TIME.fullmatch(value) or not "1678" <= value[:4] <= "2261":
        raise ValueError("Input should be a time such as 2026-01-31T23:59:59, without a time zone")
    np.datetime64(value)
    return value


# For each type of MLflow: the rule for a value in JSON, and the dtype of a column that is required
# and of one that is optional. A minimum length makes pydantic refuse half a surrogate pair.
TYPES = {
    "double": (
        Annotated[float, Field(strict=True, allow_inf_nan=False)],
        "float64",
        "float64",
    ),
    "float": (
        Annotated[float, Field(strict=True, ge=-FLOAT32, le=FLOAT32)],
        "float32",
        "float32",
    ),
    "long": (
        Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)],
        "int64",
        "Int64",
    ),
    "integer": (
        Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)],
        "int32",
        "Int32",
    ),
    "boolean": (
        StrictBool,
        "bool",
        "boolean",
    ),
    "string": (
        Annotated[str, Field(strict=True, min_length=0)],
        "object",
        "object",
    ),
    "datetime": (
        Annotated[StrictStr, AfterValidator(check_time)],
        "datetime64[ns]",
        "datetime64[ns]",
    ),
}
NUMBERS = ("double", "float", "long", "integer")


class Columns:
    """The columns of a signature."""

    def __init__(self, signature: ModelSignature | None, limits: Limits):
        """Make the rules for a table.

        Args:
            signature: the model's.
            limits: values outside them are refused.

        Raises:
            ValueError: the signature has no named columns, or a limit is invalid.
        """
        self.limits = limits
        self.dtypes = {}
        numeric = set()
        fields = {}
        for spec in signature.inputs if signature and signature.inputs else []:
            kind = getattr(spec.type, "name", "")
            if not isinstance(spec.name, str) or kind not in TYPES:
                continue
            rule, dtype, optional_dtype = TYPES[kind]
            if spec.required:
                self.dtypes[spec.name] = dtype
                fields[spec.name] = Annotated[list[rule], FailFast()]
            else:
                self.dtypes[spec.name] = optional_dtype
                fields[spec.name] = NotRequired[Annotated[list[rule | None], FailFast()]]
            if kind in NUMBERS:
                numeric.add(spec.name)
        if not fields or len(fields) < len(signature.inputs.inputs):
            raise ValueError(
                "The model has no signature of named columns with numbers, strings, booleans or "
                "times. Log it with signature=infer_signature(rows, predictions)."
            )
        for name, (low, high) in limits.items():
            if name not in numeric:
                raise ValueError(f"limits must name columns with numbers, got {name!r}")
            if not low <= high:  # NaN fails this comparison
                raise ValueError(
                    f"limits must be numbers with low <= high, got {(low, high)} for {name!r}"
                )
        self.rules = TypeAdapter(TypedDict("Table", fields))

    def check(self, table: Table) -> Table:
        """Return the columns of the signature, in its order.

        Missing optional columns are filled with null. Other columns are left out.

        Raises:
            RefusedError: a column is missing, or a value has the wrong type.
        """
        rows = len(next(iter(table.values()), []))
        if not rows:
            raise RefusedError(400, "there must be at least one row")
        try:
            checked = self.rules.validate_python(table)
        except ValidationError as error:
            first = error.errors()[0]
            name, *row = first["loc"]
            where = f", row {row[0] + 1} of {rows}" if row else ""
            reason = first["msg"].removeprefix("Value error, ")
            raise RefusedError(400, f"column {name!r}{where}: {reason}") from None
        return {name: checked.get(name, [None] * rows) for name in self.dtypes}

    def frame(self, table: Table) -> pd.DataFrame:
        """Return a checked table as the DataFrame that the model takes.

        Null becomes NaN, NA or NaT, as in training.

        Raises:
            RefusedError: a value is outside the limits.
        """
        if set(self.dtypes.values()) == {"float64"}:  # several times faster than by column
            values = np.array([*table.values()], dtype="float64")
            rows = pd.DataFrame(values.T, columns=[*table], copy=False)
        else:
            arrays = {}
            for name, dtype in self.dtypes.items():
                values = table[name]
                if dtype == "object":
                    values = [np.nan if value is None else value for value in values]
                arrays[name] = pd.array(values, dtype=dtype)
            rows = pd.DataFrame(arrays)
        if self.limits:
            self._refuse_outside(rows)
        return rows

    def _refuse_outside(self, rows: pd.DataFrame) -> None:
        names = [*self.limits]
        values = rows[names].to_numpy("float64", na_value=np.nan)
        low, high = np.array([*self.limits.values()], dtype="float64").T
        outside = np.argwhere((values < low) | (values > high))
        if len(outside):
            row, column = outside[0]
            name = names[column]
            where = f"column {name!r}, row {row + 1} of {len(rows)}"
            limits = "from {} to {}".format(*self.limits[name])
            raise RefusedError(400, f"{where}: Input should be {limits}")


def read_table(body: bytes) -> Table:
    """Return the columns that a body holds in one of MLflow's forms, all of the same length.

    Raises:
        RefusedError: the body is invalid.
    """
    try:
        payload = json.loads(body.decode(), object_pairs_hook=make_object)
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RefusedError(400, f"the body is not valid UTF-8 JSON: {error}") from None
    if not isinstance(payload, dict) or len(payload) != 1:
        payload = {None: None}
    form, table = payload.popitem()
    read = READERS.get((form, type(table)))
    if read is None:
        raise RefusedError(
            400,
            "the body must be an object with one key: dataframe_split with an object, "
            "dataframe_records with a list, or inputs or instances with either",
        )
    return read(table)


def make_object(pairs: Iterable[tuple[str, object]]) -> dict:
    """Return a JSON object as a dictionary; refuse a repeated key, whose value would be lost."""
    result = {}
    for name, value in pairs:
        if name in result:
            raise RefusedError(400, f"column or key {name!r} is repeated")
        result[name] = value
    return result


def from_records(rows: list) -> Table:
    """Return the columns of rows that are objects."""
    if not all(isinstance(row, dict) for row in rows):
        raise RefusedError(400, "each row must be an object, with the names of the columns as keys")
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    for number, row in enumerate(rows, 1):
        if len(row) < len(names):
            missing = next(name for name in names if name not in row)
            raise RefusedError(400, f"column {missing!r}, row {number} of {len(rows)}: missing")
    return {name: [row[name] for row in rows] for name in names}


def from_split(table: dict) -> Table:
    """Return the columns of a table with ``columns`` and ``data``, and maybe ``index``."""
    names = table.get("columns")
    rows = table.get("data")
    are_lists = isinstance(names, list) and isinstance(rows, list)
    if not are_lists or not table.keys() <= {"columns", "data", "index"}:
        raise RefusedError(400, "dataframe_split must hold the lists columns and data")
    if not all(isinstance(name, str) for name in names):
        raise RefusedError(400, "the names of columns must be strings")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(names):
            where = f"row {number} of {len(rows)}"
            raise RefusedError(400, f"{where}: must be a list of {len(names)} values")
    columns = map(list, zip(*rows, strict=True))
    return make_object(zip(names, columns, strict=False))  # without rows there are no columns


def from_columns(table: dict) -> Table:
    """Return a table whose columns are lists."""
    for name, values in table.items():
        if not isinstance(values, list):
            raise RefusedError(400, f"column {name!r}: must be a list of values")
        if len(values) != len(next(iter(table.values()))):
            raise RefusedError(400, f"column {name!r}: must have as many values as the first one")
    return table


READERS = {
    ("dataframe_split", dict): from_split,
    ("dataframe_records", list): from_records,
    ("inputs", list): from_records,
    ("inputs", dict): from_columns,
    ("instances", list): from_records,
    ("instances", dict): from_columns,
}
