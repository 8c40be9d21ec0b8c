"""Read a table of rows from a CSV file, and refuse one that cannot give a fair comparison.

scikit-learn and MLflow take such tables, and answer with an error in the middle of a run, or not at all.
"""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd


def read_table(path: str | Path) -> pd.DataFrame:
    """Return the rows of the CSV file at ``path``, a column per name in its header line, as pandas reads them.

    Raises:
        ValueError: there is no such file, it is no CSV file in UTF-8, or a column name stands there twice.
    """
    try:
        names = pd.read_csv(path, header=None, nrows=1, dtype=str).fillna("").iloc[0].tolist()
        rows = pd.read_csv(path)
    except FileNotFoundError:
        raise ValueError(f"Cannot use {path}: there is no such file (looked for {Path(path).resolve()})") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"Cannot use {path}: the file is empty") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(f"Cannot use {path}: this is not a CSV file in UTF-8: {str(error).strip()}") from None
    if not isinstance(rows.index, pd.RangeIndex):
        raise ValueError(f"Cannot use {path}: its lines have more fields than its header")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Cannot use {path}: these column names are there more than once: {', '.join(repeated)}")
    return rows


def check_table(rows: pd.DataFrame, target: str, *, test_share: float = 0.2, folds: int = 5) -> None:
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
        raise ValueError("There must be rows, and columns beside the target, separated by commas.")
    if target not in rows:
        raise ValueError(f"There is no column {target!r}. The columns are: {', '.join(map(str, rows))}")
    if missing := int(rows[target].isna().sum()):
        raise ValueError(f"The target {target!r} is missing in {missing} of {len(rows)} rows (NA counts as missing).")
    if endless := [name for name in rows.select_dtypes("float") if np.isinf(rows[name]).any()]:
        raise ValueError(f"These columns have infinite values: {', '.join(endless)}")
    counts = rows[target].value_counts()
    if len(counts) < 2:
        raise ValueError(f"The target {target!r} has one class only: {counts.index[0]}")
    if (counts * (1 - test_share)).min() < folds:
        few = f"Class {counts.index[-1]} of {target!r} has {counts.iloc[-1]} rows, too few for {folds} folds"
        raise ValueError(f"{few} of {1 - test_share:.0%} of them. Take fewer folds, or a target with fewer classes.")
    if len(rows) * test_share < len(counts):
        raise ValueError(f"A test share of {test_share} of {len(rows)} rows is too small for {len(counts)} classes.")


def fingerprint(rows: pd.DataFrame) -> str:
    """Return the SHA-256, in hexadecimal, of the whole table: names and values of all columns, row by row, in order.

    MLflow's digest is short, covers the first 10,000 rows, and leaves out text columns with gaps, and truth values. The
    index does not count, and neither does how a gap is written: None, NaN and NA are the same. A text such as "1" and
    the number are not the same.
    """
    text = rows.to_csv(index=False, na_rep="\0", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()
