"""The rows of a request: read from its body, and checked by the model's signature."""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, NotRequired

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from pydantic import AfterValidator, FailFast, Field, FiniteFloat, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

Table = dict[str, list]  # the values of each column
FORMS = (
    "the body must be an object with one key: dataframe_split with columns and data, where each "
    "row has a value for each column; dataframe_records with a list of rows, where each row is an "
    "object with the names of the columns as keys; inputs or instances with such a list, or with "
    "an object of columns"
)


def check_time(value: str) -> str:
    """Return a time in ISO 8601 as it is."""
    if datetime.fromisoformat(value).tzinfo:
        raise ValueError("a time must not have a time zone")
    return value


# The rule for a value in JSON, for each type of MLflow. A minimum length makes pydantic refuse
# half a surrogate pair.
RULES = {
    "double": FiniteFloat,
    "float": Annotated[float, Field(ge=-3.4028234663852886e38, le=3.4028234663852886e38)],
    "long": Annotated[int, Field(ge=-(2**63), lt=2**63)],
    "integer": Annotated[int, Field(ge=-(2**31), lt=2**31)],
    "boolean": bool,
    "string": Annotated[str, Field(min_length=0)],
    "datetime": Annotated[str, AfterValidator(check_time)],
}
NUMBERS = ("double", "float", "long", "integer")
OPTIONAL_DTYPES = {"long": "Int64", "integer": "Int32", "boolean": "boolean"}


class Columns:
    """The columns of a signature."""

    def __init__(self, signature: ModelSignature | None, limits: dict):
        """Make the rules for a table.

        Args:
            signature: the model's.
            limits: the lowest and the highest value of columns with numbers.

        Raises:
            ValueError: the signature has no named columns, or a limit is invalid.
        """
        self.limits = limits
        self.dtypes = {}
        fields = {}
        numbers = set()
        for spec in getattr(signature, "inputs", None) or []:
            kind = getattr(spec.type, "name", "")
            if not isinstance(spec.name, str) or kind not in RULES:
                fields.clear()
                break
            dtype = spec.type.to_pandas()
            rule = RULES[kind]
            field = Annotated[list[rule], FailFast()]
            if not spec.required:
                dtype = OPTIONAL_DTYPES.get(kind, dtype)
                field = NotRequired[Annotated[list[rule | None], FailFast()]]
            self.dtypes[spec.name] = dtype
            fields[spec.name] = field
            if kind in NUMBERS:
                numbers.add(spec.name)
        if not fields:
            raise ValueError(
                "The model has no signature of named columns with numbers, strings, booleans or "
                "times. Log it with signature=infer_signature(rows, predictions)."
            )
        for name, (low, high) in limits.items():
            if name not in numbers or not low <= high:  # NaN fails this comparison
                raise ValueError(
                    "limits must be low <= high for columns of the signature with numbers, "
                    f"got {(low, high)} for {name!r}"
                )
        self.rules = TypeAdapter(TypedDict("Table", fields))

    def check(self, table: Table | list[dict]) -> Table:
        """Return the columns of the signature, in its order.

        Missing optional values are filled with null. Other columns are left out.

        Args:
            table: columns or rows.

        Raises:
            HTTPException: a column is missing, or a value has the wrong type.
        """
        rows = None
        if isinstance(table, list):
            rows = table
            table = {}
            for name in self.dtypes:
                table[name] = [row.get(name) for row in rows]
        try:
            checked = self.rules.validate_python(table, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name, *row = first["loc"]
            where = f"column {name!r}"
            reason = first["msg"]
            if row:
                where += f", row {row[0] + 1} of {len(table[name])}"
                if rows and name not in rows[row[0]]:
                    reason = "Field required"
            raise HTTPException(400, f"{where}: {reason}") from None
        count = max(map(len, checked.values()), default=0)
        for values in checked.values():
            if not count or len(values) < count:
                message = "there must be at least one row, and as many values in each column"
                raise HTTPException(400, message)
        result = {}
        for name in self.dtypes:
            result[name] = checked.get(name, [None] * count)
        return result

    def frame(self, table: Table) -> pd.DataFrame:
        """Return a checked table as the DataFrame that the model takes.

        Null becomes NaN, NA or NaT, as in training.

        Raises:
            HTTPException: a value is outside the limits.
        """
        if set(self.dtypes.values()) == {np.dtype("float64")}:  # several times faster
            values = np.array([*table.values()], dtype="float64")
            rows = pd.DataFrame(values.T, columns=[*table])
        else:
            arrays = {}
            for name, dtype in self.dtypes.items():
                values = table[name]
                if dtype is object:
                    values = [np.nan if value is None else value for value in values]
                arrays[name] = pd.array(values, dtype=dtype)
            rows = pd.DataFrame(arrays)
        for name, (low, high) in self.limits.items():
            values = rows[name].to_numpy("float64", na_value=np.nan)
            outside = (values < low) | (values > high)
            if outside.any():
                where = f"column {name!r}, row {outside.argmax() + 1} of {len(rows)}"
                raise HTTPException(400, f"{where}: Input should be from {low} to {high}")
        return rows


def read_table(body: bytearray) -> Table | list[dict]:
    """Return the columns or the rows that a body holds in one of MLflow's forms.

    Raises:
        HTTPException: the body is invalid.
    """
    try:
        payload = json.loads(body.decode(), object_pairs_hook=make_object)
    except ValueError as error:
        raise HTTPException(400, f"the body is not valid UTF-8 JSON: {error}") from None
    except RecursionError:  # whose text depends on the version of Python
        raise HTTPException(400, "the body is nested too deeply") from None
    if not isinstance(payload, dict) or len(payload) != 1:
        raise HTTPException(400, FORMS)
    match payload.popitem():
        case "dataframe_split", {"columns": list(names), "data": list(rows)}:
            for row in rows:
                if not isinstance(row, list) or len(row) != len(names):
                    raise HTTPException(400, FORMS)
            columns = map(list, zip(*rows, strict=True)) if rows else [[] for _ in names]
            return make_object(zip(map(str, names), columns, strict=True))
        case "dataframe_records" | "inputs" | "instances", list(rows):
            if all(isinstance(row, dict) for row in rows):
                return rows
        case "inputs" | "instances", dict(columns):
            return columns
    raise HTTPException(400, FORMS)


def make_object(pairs: Iterable[tuple[str, object]]) -> dict:
    """Return a JSON object as a dictionary; refuse a repeated key, whose value would be lost."""
    result = {}
    for name, value in pairs:
        if name in result:
            raise HTTPException(400, f"column or key {name!r} is repeated")
        result[name] = value
    return result
