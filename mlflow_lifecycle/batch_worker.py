"""Score Arrow batches with a model, in the environment of the model.

``batch.py`` runs this file by the model's Python, and Spark sends its functions to its workers. So
it imports nothing of this package.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet
from mlflow.models import ModelSignature

INTEGERS = ("int8", "int16", "int32", "int64")
TYPES = {  # a type in a signature, and the types that its column may have in a file
    "double": ("float", "double"),
    "float": ("float",),
    "long": INTEGERS,
    "integer": ("int8", "int16", "int32"),
    "string": ("string", "large_string"),
    "boolean": ("bool",),
    "datetime": ("timestamp", "date32", "date64"),
}


def check_columns(schema: pa.Schema, signature: ModelSignature | None, key: str) -> list[str]:
    """Return the names of the columns that a model takes, after a look at the types in a file.

    Raises:
        ValueError: the model has no signature, a column is missing, or it has another type.
    """
    if signature is None or signature.outputs is None or not signature.inputs.has_input_names():
        raise ValueError("the model has no signature with named columns and a prediction")
    expected = {}
    for column in signature.inputs:
        expected[column.name] = TYPES.get(column.type.name, ())
    expected[key] = INTEGERS
    problems = []
    for name, types in expected.items():
        found = "missing"
        if name in schema.names:
            found = str(schema.field(name).type).partition("[")[0]
        if found not in types:
            problems.append(f"{name} is {found}, and must be {' or '.join(types)}")
    if problems:
        raise ValueError("; ".join(problems))
    return signature.inputs.input_names()


def prediction_type(signature: ModelSignature) -> pa.DataType:
    """Return the type of the column of predictions."""
    dtype = np.dtype(signature.outputs.numpy_types()[0])
    if dtype.kind in "bif":
        return pa.from_numpy_dtype(dtype)
    return pa.string()


def score_batches(
    batches: Iterable[pa.RecordBatch], folder: str, key: str
) -> Iterator[pa.RecordBatch]:
    """Yield a batch with the key and the prediction of each row, for each batch of rows.

    Args:
        batches: they have the columns that `check_columns` accepts.
        folder: of the model.
        key: the column that identifies a row.

    Raises:
        ValueError: a value is missing or infinite.
    """
    model = mlflow.pyfunc.load_model(folder)
    signature = model.metadata.signature
    names = signature.inputs.input_names()
    optional = {column.name for column in signature.inputs if not column.required} - {key}
    for batch in batches:
        for name in (key, *names):
            check_values(name, batch.column(name), name in optional)
        rows = batch.select(names).to_pandas(date_as_object=False)
        texts = rows.select_dtypes(object).columns
        rows[texts] = rows[texts].fillna(np.nan)  # scikit-learn takes None for another value
        predictions = pa.array(np.ravel(model.predict(rows)), prediction_type(signature))
        yield pa.RecordBatch.from_arrays([batch.column(key), predictions], [key, "prediction"])


def check_values(name: str, column: pa.Array, is_optional: bool) -> None:
    """Refuse a column with an infinite value, and with a missing one unless it is optional."""
    count = 0 if is_optional else column.null_count
    if pa.types.is_floating(column.type):
        count += pc.sum(pc.is_inf(column)).as_py() or 0
        if not is_optional:
            count += pc.sum(pc.is_nan(column)).as_py() or 0
    if count:
        raise ValueError(f"{name} has {count} values that are missing or not finite")


def score_files(data: str, output: str, folder: str, key: str) -> int:
    """Score a Parquet file or a folder of them, write a file to ``output``, and return the rows.

    Memory does not grow with the rows, except for 16 bytes per key.

    Raises:
        ValueError: the rows cannot be scored, or two of them have the same key.
        OSError: a file cannot be read or written.
    """
    rows = pyarrow.dataset.dataset(data, format="parquet")
    signature = mlflow.models.Model.load(folder).signature
    columns = list(dict.fromkeys([key, *check_columns(rows.schema, signature, key)]))
    keys = np.sort(rows.to_table([key])[key].to_numpy())
    if len(keys) == 0:
        raise ValueError("there are no rows")
    if (keys[1:] == keys[:-1]).any():
        raise ValueError(f"two rows have the same {key}")
    schema = pa.schema([rows.schema.field(key), ("prediction", prediction_type(signature))])
    batches = rows.to_batches(
        columns=columns, batch_size=10_000, batch_readahead=2, fragment_readahead=1
    )
    Path(output).mkdir(parents=True)
    with pyarrow.parquet.ParquetWriter(Path(output) / "part-0.parquet", schema) as writer:
        for batch in score_batches(batches, folder, key):
            writer.write_batch(batch)
    return len(keys)


if __name__ == "__main__":
    try:
        print(score_files(*sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
