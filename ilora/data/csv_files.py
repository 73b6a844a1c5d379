"""A user's CSV files, read strictly: a file that could be read in two ways is refused."""

import csv
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd

from ilora.data.dataset import Dataset, assemble, item_table, refuse_rows, title_key
from ilora.errors import UserError

_TIME = (
    r"(?P<number>[+-]?(?:0|[1-9]\d{0,18}))|"  # without a zero in front, which is for a day or an hour, as in 01022024
    r"(?P<date>\d{4}-\d\d-\d\d)(?P<clock>[T ]\d\d:\d\d(?::\d\d(?:[.]\d{1,6})?)?(?P<zone>Z|[+-]\d\d(?::?\d\d)?)?)?"
)


def read_csv(files: list[Path]) -> Dataset:
    """events.csv (user, item, time) and items.csv (id, title, and optionally text)."""
    event_file, item_file = files
    items = _read_columns(item_file, "id", "title")
    ids, titles = items["id"], items["title"]
    refuse_rows(item_file, ids == "", "the id is empty; give the item one")
    refuse_rows(item_file, titles == "", "the title of item {!r} is empty; give it one", ids)
    _refuse_repeats(item_file, ids, "id {!r} is on line {} too; keep one of them", ids)
    message = "title {!r} is on line {} too (case and spaces do not count) and a prediction is matched by its title; "
    _refuse_repeats(item_file, titles.map(title_key), message + "make them differ, by a year for example", titles)
    events = _read_columns(event_file, "user", "item", "time")
    item = pd.Series(pd.Index(ids).get_indexer(events["item"]), events.index)  # as text: "01" and "1" are two items
    refuse_rows(event_file, events["user"] == "", "the user is empty; name one or drop the line")
    refuse_rows(event_file, item < 0, "item {!r} is not in items.csv; add it", events["item"])
    time = _parse_times(event_file, events["time"])
    user, source_users = pd.factorize(events["user"])  # in order of appearance
    return assemble(item_table(titles, items.get("text", ""), ids), user, item.to_numpy(), time, source_users)


def decode(file: Path, encodings: tuple[str, ...] = ("utf-8-sig",)) -> str:
    """The text of a file in the first of the encodings in which it is valid."""
    content = file.read_bytes()
    wrong = content.find(b"\0")
    for encoding in encodings if wrong < 0 else ():
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            wrong = error.start
    line = content.count(b"\n", 0, wrong) + 1
    raise UserError(f"{file}, line {line}: a byte that no text file in UTF-8 has; export the file again as UTF-8 text")


def _records(file: Path) -> pd.Series:
    """Lists of fields, without blank lines, by the number of each record's first line.  Raises UserError for quotes."""
    lines = list(io.StringIO(decode(file), newline=""))
    reader, rows, line = csv.reader(lines, strict=True, skipinitialspace=True), {}, 1
    try:
        for fields in reader:
            if len(fields) > 1 or any(map(str.strip, fields)):
                rows[line] = fields
                separators = len(next(iter(rows.values()))) - 1  # in a row: an open quote would take the next rows in
                if any(part.count(",") >= max(separators, 1) for part in lines[line : reader.line_num]):
                    raise csv.Error("a quoted field goes on over lines that look like rows")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not CSV ({error}); use commas, close and double its quotes") from error
    return pd.Series(rows, dtype=object)


def _refuse_repeats(file: Path, keys: pd.Series, message: str, values: pd.Series) -> None:
    """Raise UserError for the first repeated key; its value and the line of the earlier row fill the message."""
    first_line = keys.index.to_series().groupby(keys.to_numpy()).transform("first")
    refuse_rows(file, keys.duplicated(), message, values, first_line)


def _read_columns(file: Path, *columns: str) -> pd.DataFrame:
    """The text of these columns, and of `text` if it is there; the index holds line numbers."""
    rows = _records(file)
    header = [name.strip() for name in rows.iloc[0]] if len(rows) else []
    columns += ("text",) * ("text" in header)
    if wrong := [column for column in columns if header.count(column) != 1]:
        has, remedy = ", ".join(header) or "no text", "name each once in line 1 and separate them by commas"
        raise UserError(f"{file} needs one column {wrong[0]!r} but has {has}: {remedy}")
    width = rows.map(len)
    message = f'{{}} fields, the first line has {len(header)}; a field with a comma needs quotes, "Good, the Bad"'
    refuse_rows(file, width != len(header), message, width)
    table = pd.DataFrame(rows.tolist(), rows.index, header, dtype=str)[1:].apply(lambda each: each.str.strip())
    unnamed = (table.loc[:, [not name for name in header]] != "").any(axis=1)  # a comma may end each line
    refuse_rows(file, unnamed, "a field without a column name; name it in line 1")
    return table[[*columns]]


def _parse_times(file: Path, text: pd.Series) -> np.ndarray:
    """int64: whole numbers as they are, ISO dates as microseconds since 1970 (UTC where they name no zone).

    Raises UserError for other forms, for more than 64 bits, and for seconds since 1970 among milliseconds.
    """
    has = text.str.extract(f"^(?:{_TIME})$", flags=re.ASCII).notna()  # number, date, clock, zone
    remedy = "write 2024-05-31, 2024-05-31T18:00:00 or seconds since 1970, with all digits and all lines in one way"
    refuse_rows(file, ~has.any(axis=1), f"time {{!r}} is neither a whole number nor an ISO date; {remedy}", text)
    differs = (has != has.to_numpy()[:1]).any(axis=1)
    refuse_rows(file, differs, f"time {{!r}} is not written like {next(iter(text), '')!r}; {remedy}", text)
    if not has["number"].all():
        values = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce").dt.as_unit("us")
        refuse_rows(file, values.isna(), "time {!r} is no day and time that exists; correct it", text)
        return values.astype(np.int64).to_numpy()
    values = pd.Series([int(number) for number in text], text.index, dtype=object)
    fits = values.between(-(2**63), 2**63 - 1)
    refuse_rows(file, ~fits, "time {!r} is not a whole number of at most 64 bits; correct it", text)
    digits = text.str.lstrip("+-0").str.len()  # 9 or 10 in seconds, 12 or 13 in milliseconds, 15 or 16, 18 or 19
    for few, many in itertools.pairwise(sorted(digits.unique())):
        if few >= 9 and many - few > 1 and few % 3 < 2 and many % 3 < 2:
            message = f"time {{}} is in another unit than {text[digits == few].iloc[0]}; use one"
            refuse_rows(file, digits == many, message, text)
    return values.astype(np.int64).to_numpy()
