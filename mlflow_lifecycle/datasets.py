"""Tables of rows: read one from a CSV file, refuse one that cannot give a fair comparison, recognise one again.

scikit-learn and MLflow take a table that is unfit for it, and answer with an error in the middle of a run, or not at
all. MLflow's digest of a dataset covers the first 10,000 rows, and skips some columns.
"""

import csv
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mlflow_lifecycle.exceptions import InvalidInputError

if TYPE_CHECKING:
    from mlflow.data.pandas_dataset import PandasDataset
    from mlflow.entities import Run


def verified_file(
    address: str,
    sha256: str,
    variable: str,
    *,
    cache: Path | None = None,
    timeout_seconds: float = 10,
) -> Path:
    """Return the path of a file with the SHA-256 ``sha256``, downloaded once.

    Args:
        address: where the file is to be had, an address that begins with ``http``.
        sha256: in hexadecimal. It does not matter who serves the file: these bytes, or an error.
        variable: the environment variable that may name another address, or the path of a copy on this machine.
        cache: the folder that keeps a download; by default one for this user.
        timeout_seconds: for how long a server may be silent.

    Raises:
        ValueError: the file cannot be had, or is another one; with the remedy, and without passwords and tokens.
    """
    import pooch

    address = os.environ.get(variable) or address
    remedy = f"Check the connection, or set {variable} to the path or the address of a copy."
    try:
        if not address.startswith("http"):
            if pooch.file_hash(address) == sha256:
                return Path(address)
            raise InvalidInputError(f"its SHA-256 is not {sha256}, so it is another file")
        pooch.get_logger().setLevel("WARNING")
        downloader = pooch.HTTPDownloader(timeout=timeout_seconds)
        name, folder = (
            re.split("[?#]", address)[0].rpartition("/")[2],
            cache or pooch.os_cache("mlflow_quickstart"),
        )
        return Path(
            pooch.retrieve(
                address, f"sha256:{sha256}", fname=name, path=folder, downloader=downloader
            )
        )
    except (OSError, ValueError) as error:
        told = re.sub(r"(//)\S*@|[?]\w\S*", r"\1", f"Cannot use the data at {address} : {error}")
        raise InvalidInputError(f"{told}\n{remedy}") from None


def read_table(path: str | Path) -> pd.DataFrame:
    """Return the rows of the CSV or Parquet file at ``path``, as pandas reads them.

    Raises:
        ValueError: there is no such file, it is neither Parquet nor CSV in UTF-8, or a column name stands there twice.
    """
    if Path(path).suffix == ".parquet":
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"Cannot use {path}: {error}") from None
    try:
        names = pd.read_csv(path, header=None, nrows=1, dtype=str).fillna("").iloc[0].tolist()
        rows = pd.read_csv(
            path, float_precision="round_trip"
        )  # by default the last bit of a number may be another
    except FileNotFoundError:
        raise InvalidInputError(
            f"Cannot use {path}: there is no such file (looked for {Path(path).resolve()})"
        ) from None
    except pd.errors.EmptyDataError:
        raise InvalidInputError(f"Cannot use {path}: the file is empty") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise InvalidInputError(
            f"Cannot use {path}: this is not a CSV file in UTF-8: {str(error).strip()}"
        ) from None
    if not isinstance(rows.index, pd.RangeIndex):
        raise InvalidInputError(f"Cannot use {path}: its lines have more fields than its header")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(
            f"Cannot use {path}: these column names are there more than once: {', '.join(repeated)}"
        )
    return rows


def check_table(
    rows: pd.DataFrame, target: str, *, test_share: float = 0.2, folds: int = 5
) -> None:
    """Refuse ``rows`` that cannot be split by class into a test part, and the rest into folds.

    Args:
        rows: a row per example.
        target: the column of classes.
        test_share: the share of the rows that is held back, between 0 and 1.
        folds: into how many parts cross-validation splits the others.

    Raises:
        ValueError: with the reason, and what to do.
    """
    if rows.empty or rows.shape[1] < 2:
        raise InvalidInputError(
            "There must be rows, and columns beside the target, separated by commas."
        )
    if target not in rows:
        raise InvalidInputError(
            f"There is no column {target!r}. The columns are: {', '.join(map(str, rows))}"
        )
    if missing := int(rows[target].isna().sum()):
        raise InvalidInputError(
            f"The target {target!r} is missing in {missing} of {len(rows)} rows (NA counts as missing)."
        )
    if endless := [name for name in rows.select_dtypes("float") if np.isinf(rows[name]).any()]:
        raise InvalidInputError(f"These columns have infinite values: {', '.join(endless)}")
    counts = rows[target].value_counts()
    if len(counts) < 2:
        raise InvalidInputError(f"The target {target!r} has one class only: {counts.index[0]}")
    if (counts * (1 - test_share)).min() < folds:
        few = f"Class {counts.index[-1]} of {target!r} has {counts.iloc[-1]} rows, too few for {folds} folds"
        raise InvalidInputError(
            f"{few} of {1 - test_share:.0%} of them. Take fewer folds, or a target with fewer classes."
        )
    if len(rows) * test_share < len(counts):
        raise InvalidInputError(
            f"A test share of {test_share} of {len(rows)} rows is too small for {len(counts)} classes."
        )


def in_markdown(value: object) -> str:
    """Return a value from the store so that Markdown shows it: in one line, ending no cell and beginning no HTML."""
    return (
        " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|")
    )


def as_text(column: pd.Series) -> pd.Series:
    """Return the values as text, and gaps as they are. 1 and 1.0 are the same: one gap makes whole numbers decimal."""
    return column.astype(object).map(
        lambda value: re.sub(r"^(-?\d+)\.0$", r"\1", str(value)), na_action="ignore"
    )


def as_classes(known: pd.Series, column: pd.Series) -> pd.Series:
    """Return labels or answers, as the classes of the training rows are written where they are text; gaps as they are.

    Args:
        known: the classes of the training rows, one per row.
        column: the labels or answers.
    """
    if known.dtype != object:
        return column
    classes = pd.Series(known.unique())
    written = dict(zip(as_text(classes), classes, strict=True))
    return as_text(column).map(lambda text: written.get(text, text), na_action="ignore")


def fingerprint(rows: pd.DataFrame) -> str:
    """Return the SHA-256, in hexadecimal, of the whole table: names and values of all columns, row by row, in order.

    MLflow's digest is short, covers the first 10,000 rows, and leaves out text columns with gaps, and truth values. The
    index does not count, and neither does how a gap is written: None, NaN and NA are the same. A text such as "1" and
    the number are not the same.
    """
    text = rows.to_csv(index=False, na_rep="\0", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def runs_with(dataset: "PandasDataset") -> "list[Run]":
    """Return the runs, of all experiments of the active store, whose inputs have the very rows of ``dataset``.

    A run that kept the fingerprint of its rows, as the tag ``sha256`` of that input, is recognised by it. Of any other
    run there is only MLflow's digest.
    """
    import mlflow

    sha256 = fingerprint(dataset.df)
    filter_string = f"dataset.digest = '{dataset.digest}'"
    found = mlflow.search_runs(
        search_all_experiments=True, filter_string=filter_string, output_format="list"
    )
    runs = []
    for run in found:
        inputs = [
            item for item in run.inputs.dataset_inputs if item.dataset.digest == dataset.digest
        ]
        kept = {tag.value for item in inputs for tag in item.tags if tag.key == "sha256"}
        if sha256 in (kept or {sha256}):
            runs.append(run)
    return runs
