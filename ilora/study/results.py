"""Results of runs: one JSON per run, read from a folder; tables of them made ready for a new JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def load_results(folder: str | Path, pattern: str = "*.json") -> dict[str, dict[str, Any]]:
    """The results in a folder by the names of their files without suffix, sorted; empty if there are none."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob(pattern))}


def without_nan(report: Any) -> Any:
    """A nested report with None in place of NaN, which JSON lacks."""
    if isinstance(report, Mapping):
        return {name: without_nan(value) for name, value in report.items()}
    return None if isinstance(report, float) and np.isnan(report) else report


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON: None in place of NaN, numbers with 15 decimals."""
    return json.loads(table.to_json(orient="records", double_precision=15))
