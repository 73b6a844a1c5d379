"""CSV files of a user, read strictly: what could be read in two ways is refused, not guessed at."""

import csv
import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ilora.data.tables import Tables, assemble, item_table, refuse_rows, same_title
from ilora.errors import UserError


def _decode(file: Path, *encodings: str) -> str:
    """The text of a file in the first of these encodings, by default UTF-8, that it is valid in."""
    content = file.read_bytes()
    for encoding in encodings or ("utf-8-sig",):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
        else:
            break
    else:
        raise UserError(f"{file}, line {line}: not text in UTF-8; export the file again as UTF-8 text")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}, line {line}: a NUL byte, so this is no text file; export it again as UTF-8 text")
    return text


def _records(file: Path, text: str, **dialect: object) -> pd.Series:
    """Lists of fields, under the number of the line on which each record begins; blank lines are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    records, lines, line = [], [], 1
    try:
        for fields in reader:
            if len(fields) > 1 or any(map(str.strip, fields)):
                records.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not a record of CSV ({error}); close and double its quotes") from error
    return pd.Series(records, lines, dtype=object)


def _check_widths(file: Path, records: pd.Series, widths: Sequence[int], says: str) -> None:
    """Raise UserError for the first record that has another number of fields than `widths` allow."""
    refuse_rows(file, ~records.map(len).isin(widths), lambda line: f"{len(records[line])} fields, {says}")


def _whole_numbers(file: Path, text: pd.Series) -> np.ndarray:
    """int64, without loss.  Raises UserError for the first text that is no whole number of 64 bits."""
    values = [int(each) if re.fullmatch("[+-]?[0-9]{1,19}", each) else None for each in text]
    wrong = [value is None or not -(2**63) <= value < 2**63 for value in values]
    says = "is not a whole number of at most 64 bits; correct it or export the file again"
    refuse_rows(file, pd.Series(wrong, text.index, dtype=bool), lambda line: f"{text[line]!r} {says}")
    return np.array(values, np.int64)


def _refuse_twice(file: Path, keys: pd.Series, say: Callable[[int, int], str]) -> None:
    """Raise for the first row with a key that an earlier row has; `say` is given its line and the earlier one."""
    refuse_rows(file, keys.duplicated(), lambda line: say(line, keys.index[keys == keys[line]][0]))


def _read_table(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The text of these columns of a CSV file, and of `text` if it is there; its index holds the lines of the file."""
    content = _decode(file)
    records = _records(file, content, skipinitialspace=True)
    header = [name.strip() for name in records.iloc[0]] if len(records) else []
    for column in columns:
        if column not in header:
            separator = next((mark for mark in ("::", *";\t|") if len(header) == 1 and mark in header[0]), None)
            remedy = f"export it with commas, not {separator!r}" if separator else "name its columns in line 1"
            raise UserError(f"{file} has no column {column!r} but {', '.join(header) or 'no text'}: {remedy}")
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise UserError(f"{file}, line {records.index[0]}: two columns are named {twice[0]!r}; rename or drop one")
    records = records.iloc[1:]
    _check_widths(
        file,
        records,
        [len(header)],
        f'the first line has {len(header)}; a field with a comma needs quotes, "Good, the Bad"',
    )
    _refuse_swallowed(file, content, records, len(header))
    table = pd.DataFrame(records.tolist(), records.index, range(len(header)), dtype=str)
    for at in [at for at, name in enumerate(header) if not name]:  # as a comma at the end of each line makes one
        refuse_rows(file, table[at].str.strip() != "", lambda line: "a field without a column name; name it in line 1")
    table = table.set_axis(header, axis=1)[[*columns, *{"text"}.intersection(header)]]
    return table.apply(lambda column: column.str.strip())


def _refuse_swallowed(file: Path, content: str, records: pd.Series, width: int) -> None:
    """Raise for a record of several lines that are records too: a quote that was never closed looks like that."""
    starts = records.index.to_numpy()
    lines = io.StringIO(content, newline=None).read().split("\n")
    ends = np.append(starts[1:], len(lines) + 1)
    swallowed = pd.Series(ends - starts > 1, records.index)
    for line, end in zip(starts[swallowed], ends[swallowed], strict=True):
        part = [text for text in lines[line - 1 : end - 1] if text.strip()]  # blank lines may follow a record
        swallowed[line] = len(part) > 1 and all(text.count(",") == width - 1 for text in part)
    says = "a quoted field goes on over lines that look like rows; close its quote, or write the field in one line"
    refuse_rows(file, swallowed, lambda line: says)


def _read_csv(files: list[Path]) -> Tables:
    """events.csv (user, item, time) and items.csv (id, title, and text if it is there)."""
    event_file, item_file = files
    items = _read_table(item_file, ("id", "title"))
    ids, titles = items["id"], items["title"]
    refuse_rows(item_file, ids == "", lambda line: "the id is empty; give the item one")
    refuse_rows(item_file, titles == "", lambda line: f"the title of item {ids[line]!r} is empty; give it one")
    _refuse_twice(item_file, ids, lambda line, first: f"id {ids[line]!r} is on line {first} too; keep one of them")
    _refuse_twice(
        item_file,
        same_title(titles),
        lambda line, first: (
            f"title {titles[line]!r} is on line {first} too (case and spaces do not count) and an answer is matched "
            "by its title; make them differ, by a year for example"
        ),
    )
    events = _read_table(event_file, ("user", "item", "time"))
    item = pd.Series(pd.Index(ids).get_indexer(events["item"]), events.index)  # as text: "01" and "1" are two items
    refuse_rows(event_file, events["user"] == "", lambda line: "the user is empty; name one or drop the line")
    refuse_rows(event_file, item < 0, lambda line: f"item {events['item'][line]!r} is not in items.csv; add it")
    time = _parse_time(event_file, events["time"])
    user, source_users = pd.factorize(events["user"])  # in order of appearance
    return assemble(item_table(titles, items.get("text", ""), ids), user, item.to_numpy(), time, source_users)


_NUMBER = r"[+-]?(?:0|[1-9]\d{0,18})"  # a zero at the front is for a day or an hour, as in 01022024


_DATE = r"\d{4}-\d\d-\d\d"
_CLOCK = r"[T ]\d\d:\d\d(?::\d\d(?:[.]\d{1,6})?)?"
_ZONE = r"(?:Z|[+-]\d\d(?::?\d\d)?)"
_FORMS = re.compile(
    rf"(?P<number>{_NUMBER})|(?P<date>{_DATE})|(?P<time>{_DATE}{_CLOCK})|(?P<zone>{_DATE}{_CLOCK}{_ZONE})",
    re.ASCII,
)
_UNITS = {9: "s", 10: "s", 12: "ms", 13: "ms", 15: "us", 16: "us", 18: "ns", 19: "ns"}  # since 1970, by digits


def _parse_time(file: Path, text: pd.Series) -> np.ndarray:
    """int64: whole numbers as they are, ISO dates as microseconds since 1970 (UTC where they name no zone)."""
    form = pd.Series([(found := _FORMS.fullmatch(each)) and found.lastgroup for each in text], text.index, dtype=object)
    remedy = "write 2024-05-31, 2024-05-31T18:00:00 or seconds since 1970, with all digits and all lines in one way"
    refuse_rows(
        file, form.isna(), lambda line: f"time {text[line]!r} is neither a whole number nor an ISO date; {remedy}"
    )
    refuse_rows(
        file,
        form != next(iter(form), None),
        lambda line: f"time {text[line]!r} is not written like {text.iloc[0]!r}; {remedy}",
    )
    if (form == "number").all():
        _refuse_mixed_units(file, text)
        return _whole_numbers(file, text)
    values = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce").dt.as_unit("us")
    refuse_rows(file, values.isna(), lambda line: f"time {text[line]!r} is no day and time that exists; correct it")
    return values.astype(np.int64).to_numpy()


def _refuse_mixed_units(file: Path, text: pd.Series) -> None:
    """Raise where some times have as many digits as seconds since 1970, others as milliseconds, none between them."""
    digits = text.str.lstrip("+-").str.lstrip("0").str.len()
    for few, many in itertools.pairwise(sorted(digits.unique())):
        if many - few > 1 and few in _UNITS and many in _UNITS:
            like = text[digits == few].iloc[0]
            says = f"time {{}} is in another unit than {like}: {_UNITS[many]} and {_UNITS[few]} since 1970; use one"
            refuse_rows(file, digits == many, lambda line, says=says: says.format(text[line]))
