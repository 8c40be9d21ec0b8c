"""Read tables, refuse unfit ones, and recognise their rows again.

scikit-learn and MLflow report an unfit table in the middle of a run, or not at all. MLflow's digest
of a dataset covers the first 10,000 rows, and skips some columns.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.data.pandas_dataset import PandasDataset
from mlflow.entities import Run
from numpy.typing import ArrayLike

from mlflow_lifecycle.exceptions import InvalidInputError


def verified_file(
    address: str,
    sha256: str,
    variable: str,
    cache: Path | None = None,
) -> Path:
    """Return the path of a file with a known SHA-256, which is downloaded once.

    Args:
        address: where to download the file, an address that begins with ``http``.
        sha256: of the file, in hexadecimal.
        variable: the environment variable that may name another address, or the path of a copy.
        cache: the folder that keeps the download; by default one of this user.

    Raises:
        InvalidInputError: the file cannot be read, or has another SHA-256. The message contains no
            passwords and tokens.
    """
    import pooch

    address = os.environ.get(variable) or address
    try:
        if not address.startswith("http"):
            if pooch.file_hash(address) == sha256:
                return Path(address)
            raise InvalidInputError(f"its SHA-256 is not {sha256}, so it is another file")
        pooch.get_logger().setLevel("WARNING")
        path = pooch.retrieve(
            address,
            f"sha256:{sha256}",
            fname=re.split("[?#]", address)[0].rpartition("/")[2],
            path=cache or pooch.os_cache("mlflow_quickstart"),
        )
        return Path(path)
    except (OSError, ValueError) as error:
        message = re.sub(r"(//)\S*@|[?]\w\S*", r"\1", f"Cannot use the data at {address} : {error}")
        raise InvalidInputError(
            f"{message}\n"
            f"Check the connection, or set {variable} to the path or the address of a copy."
        ) from None


def read_table(path: str | Path) -> pd.DataFrame:
    """Return the rows of a CSV or Parquet file, as pandas reads them.

    Raises:
        InvalidInputError: there is no such file, it is neither Parquet nor CSV in UTF-8, or two
            columns have the same name.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(
            f"Cannot use {path}: there is no such file (looked for {path.resolve()})"
        )
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].fillna("")
        # By default the last bit of a number may change.
        rows = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"Cannot use {path}: {str(error).strip()}") from None
    if not isinstance(rows.index, pd.RangeIndex):
        raise InvalidInputError(f"Cannot use {path}: its lines have more fields than its header")
    repeated = header[header.duplicated()]
    if len(repeated):
        names = ", ".join(repeated)
        raise InvalidInputError(f"Cannot use {path}: several columns have these names: {names}")
    return rows


def check_columns(rows: pd.DataFrame, names: Iterable[str]) -> None:
    """Refuse rows without these columns.

    Raises:
        InvalidInputError: a column is missing.
    """
    missing = [str(name) for name in names if name not in rows]
    if missing:
        raise InvalidInputError(f"These columns are missing: {', '.join(missing)}")


def check_complete(rows: pd.DataFrame, name: str) -> None:
    """Refuse rows in which a value of this column is missing.

    Raises:
        InvalidInputError: with the number of rows.
    """
    missing = int(rows[name].isna().sum())
    if missing:
        raise InvalidInputError(
            f"The column {name!r} is missing in {missing} of {len(rows)} rows. "
            "The text NA counts as missing."
        )


def check_table(
    rows: pd.DataFrame,
    target: str,
    *,
    task: str = "classification",
    group: str = "",
    test_share: float = 0.2,
    folds: int = 5,
) -> None:
    """Refuse rows that cannot be split into a test set, and the rest into folds.

    Args:
        rows: one row per example.
        target: the column of classes or numbers to predict.
        task: classification or regression. For classification, each class must be in each fold.
        group: the column that says which rows belong together, so that no split divides them.
        test_share: the share of the rows in the test set, between 0 and 1.
        folds: the number of folds of the cross-validation.

    Raises:
        InvalidInputError: with the reason, and what to do.
    """
    if rows.empty or rows.shape[1] < 2:
        raise InvalidInputError(
            "There must be rows, and columns beside the target, separated by commas."
        )
    for name in filter(None, (target, group)):
        if name not in rows:
            columns = ", ".join(map(str, rows))
            raise InvalidInputError(f"There is no column {name!r}. The columns are: {columns}")
        check_complete(rows, name)
    if not 0 < test_share < 1:
        raise InvalidInputError(f"test_share must be between 0 and 1, got {test_share}.")
    numbers = rows.select_dtypes("float")
    infinite = numbers.columns[np.isinf(numbers).any()]
    if len(infinite):
        raise InvalidInputError(f"These columns have infinite values: {', '.join(infinite)}")
    units = pd.Series(rows[group] if group else rows.index, rows.index)
    kind = "groups" if group else "rows"
    if task == "regression":
        if not pd.api.types.is_numeric_dtype(rows[target]):
            raise InvalidInputError(f"The target {target!r} has values that are not numbers.")
        counts = pd.Series({"the table": units.nunique()})
    else:
        counts = units.groupby(rows[target]).nunique().sort_values(ascending=False)
        if len(counts) < 2:
            raise InvalidInputError(f"The target {target!r} has one class only: {counts.index[0]}")
    if counts.min() * (1 - test_share) < folds:
        place = "The table" if task == "regression" else f"Class {counts.index[-1]} of {target!r}"
        raise InvalidInputError(
            f"{place} has {counts.iloc[-1]} {kind}, too few for {folds} folds of "
            f"{1 - test_share:.0%} of them. Take fewer folds, or more rows."
        )


def almost_unique(rows: pd.DataFrame) -> list[str]:
    """Return the columns of text or whole numbers that differ in more than half of the rows.

    Such a column is often an id, a date or numbers that were read as text. A model can learn the
    training rows by heart from it.
    """
    names = []
    for name, column in rows.items():
        is_measured = pd.api.types.is_float_dtype(column)
        if not is_measured and column.nunique() > 0.5 * len(rows):
            names.append(str(name))
    return names


def in_markdown(value: object) -> str:
    """Return a value from the store so that Markdown shows it as it is, in one line.

    It contains no link, picture, HTML or formula, and ends no cell of a table. An underscore inside
    of a word has no meaning in Markdown and stays as it is.
    """
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]()!|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def as_text(values: ArrayLike) -> pd.Series:
    """Return the values as text; missing values stay missing.

    1 and 1.0 give the same text, because one missing value turns integers into floats.
    """
    return pd.Series(values, dtype=object).map(
        lambda value: re.sub(r"^(-?\d+)\.0$", r"\1", str(value)),
        na_action="ignore",
    )


def as_classes(known: pd.Series, column: pd.Series) -> pd.Series:
    """Return labels in the form of the known classes, if these are text.

    Args:
        known: the classes of the training rows, one per row.
        column: the labels. Missing values stay missing.
    """
    if pd.api.types.is_numeric_dtype(known):
        return column
    classes = known.unique()
    forms = pd.Series(classes, as_text(classes))
    text = as_text(column)
    return text.map(forms).fillna(text)


def fingerprint(rows: pd.DataFrame) -> str:
    """Return the SHA-256, in hexadecimal, of all names and values of a table, in order.

    The index does not count, nor how a missing value is written: None, NaN and NA are the same. The
    text "1" and the number 1 differ.
    """
    text = rows.to_csv(index=False, na_rep="\0", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def runs_with(dataset: PandasDataset) -> list[Run]:
    """Return the runs of the active store that have the rows of ``dataset`` as an input.

    A run whose input has the tag ``sha256``, from `fingerprint`, is recognised by it. Other runs
    are recognised by MLflow's digest.
    """
    sha256 = fingerprint(dataset.df)
    runs = []
    for run in mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"dataset.digest = '{dataset.digest}'",
        output_format="list",
    ):
        known = set()
        for item in run.inputs.dataset_inputs:
            if item.dataset.digest == dataset.digest:
                known |= {tag.value for tag in item.tags if tag.key == "sha256"}
        if not known or sha256 in known:
            runs.append(run)
    return runs
