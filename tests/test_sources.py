"""Readers of a user's CSV and of publishers' archives, on small files and on the real ones where available."""

import functools
import hashlib
import http.server
import os
import re
import threading
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from ilora.data import Sequences, llara_files, load, readers, sequences
from ilora.errors import UserError

REAL = Path(os.environ.get("ILORA_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set ILORA_DATA to the folder that holds it")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# ---------------------------------------------------------------- a user's CSV files


def write_csv(folder: Path, items: str | None = None, events: str | None = None) -> Path:
    """Thirty items and twelve users of six events; either file may be replaced."""
    if items is None:
        items = "id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(30))
    if events is None:
        events = "user,item,time\n" + "".join(
            f"u{user},i{(user + n) % 30},{100 * user + n}\n" for n in reversed(range(6)) for user in range(12)
        )
    folder.mkdir(exist_ok=True)
    (folder / "items.csv").write_text(items)
    (folder / "events.csv").write_text(events)
    return folder


def test_a_users_csv_files_become_a_data_set(tmp_path):
    dataset = load("csv", str(write_csv(tmp_path / "csv")))
    assert list(dataset.users["split"]) == ["train"] * 9 + ["validation"] + ["test"] * 2
    assert list(dataset.users["source_id"]) == [f"u{n}" for n in range(12)]
    assert list(dataset.events["item"][dataset.events["user"] == 3]) == [3, 4, 5, 6, 7, 8]
    assert dataset.items.loc[4].to_dict() == {"id": 4, "title": "Title 4", "text": "", "source_id": "i4"}


def test_saved_files_are_themselves_readable_as_csv(tmp_path):
    world = load(users=50)
    world.save(tmp_path / "copy")
    again = load("csv", str(tmp_path / "copy"))
    pd.testing.assert_frame_equal(again.events, world.events)
    assert list(again.items["title"]) == list(world.items["title"])


def test_ids_are_text(tmp_path):
    items = "id,title\n" + "".join(f"{n},A {n}\n0{n},B {n}\n" for n in range(20))
    events = "user,item,time\n" + "".join(f"{u},{u % 2 * '0'}{n},{n}\n" for u in range(12) for n in range(5))
    dataset = load("csv", str(write_csv(tmp_path / "csv", items, events)))
    assert list(dataset.items["title"][dataset.events["item"][4:6]]) == ["A 4", "B 0"]


def test_iso_dates_order_events(tmp_path):
    dates = ["2024-01-03T00:00Z", "2024-01-01T12:00:00Z", "2024-01-01T12:00:00.5+02:00", "2024-01-02 08:00+0000"]
    dates.append("2024-01-02 10:30+02")
    events = "user,item,time\n" + "".join(
        f"u{user},i{n},{date}\n" for user in range(12) for n, date in enumerate(dates)
    )
    dataset = load("csv", str(write_csv(tmp_path / "csv", events=events)))
    assert list(dataset.events["item"][:5]) == [2, 1, 3, 4, 0]
    assert dataset.events["time"][1] - dataset.events["time"][0] == 7_200_000_000 - 500_000  # microseconds


HEAD = "id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(30))  # lines 1 to 31
EVENTS = "user,item,time\n" + "".join(f"u{u},i{n},{n}\n" for u in range(12) for n in range(6))  # lines 1 to 73


@pytest.mark.parametrize(
    ("items", "events", "says"),
    [
        ("id,name\n1,A\n", None, r"items.csv needs one column 'title' but has id, name"),
        (None, "user,item\nu1,i1\n", r"events.csv needs one column 'time' but has user, item"),
        (HEAD + "i3,Another\n", None, r"items.csv, line 32: id 'i3' is on line 5 too"),
        (HEAD + ",Another\n", None, r"items.csv, line 32: the id is empty"),
        (HEAD + "i99, \n", None, r"items.csv, line 32: the title of item 'i99' is empty; give it one"),
        (
            HEAD + "i99,title  4\n",
            None,
            r"items.csv, line 32: title 'title  4' is on line 6 too .* make them differ",
        ),
        (None, EVENTS + "u1,i77,5\n", r"events.csv, line 74: item 'i77' is not in items.csv; add it"),
        (None, EVENTS + ",i7,5\n", r"events.csv, line 74: the user is empty"),
        (
            None,
            EVENTS + "u1,i7,yesterday\n",
            r"events.csv, line 74: time 'yesterday' is neither .* write 2024-05-31",
        ),
        (None, EVENTS + "u1,i7,\n", r"events.csv, line 74: time '' is neither"),
        (None, EVENTS + "u1,i7,2.5\nu1,i8,1.5\n", r"events.csv, line 74: time '2.5' .*\(2 such lines\)"),
        (
            None,
            EVENTS.replace(",0\n", ",2024-01-01\n"),
            r"events.csv, line 3: time '1' is not written like '2024-01-01'",
        ),
        ("", None, r"items.csv needs one column 'id' but has no text: name each once in line 1"),
        (None, "user,item,time\n", r"csv has 0 users, 0 of them .* none of them in its train split"),
        (
            None,
            EVENTS.split("u4")[0],
            r"csv has 4 users, 4 of them .* none of them in its validation",
        ),
        (
            None,
            "user,item,time\n" + "".join(f"u{u},i{n},{n}\n" for u in range(40) for n in range(3)),
            r"csv has 40 users, 0 of them with at least 4 events",
        ),
        (
            "id,title\n" + "".join(f"i{n},T{n}\n" for n in range(19)),
            None,
            r"csv has 19 items, .* offers 20: add items",
        ),
    ],
)
def test_bad_csv_is_refused_with_line_and_remedy(tmp_path, home, items, events, says):
    folder = write_csv(tmp_path / "csv", items, events)
    if items and "T18" in items:
        write_csv(folder, items, EVENTS)
    with pytest.raises(UserError, match=says) as refused:
        load("csv", str(folder))
    assert "\n" not in str(refused.value)
    assert not list(home.glob("data/*"))  # nothing half made is left


@pytest.mark.parametrize(
    ("items", "events", "says"),
    [
        (
            HEAD.replace("Title 0", "Good, the Bad"),
            None,
            r"items.csv, line 2: 3 fields, the first line has 2; a field with a comma needs quotes",
        ),
        (HEAD + "i99,Good, the Bad\n", None, r"items.csv, line 32: 3 fields"),
        (HEAD + "i99\n", None, r"items.csv, line 32: 1 fields"),
        (HEAD.replace("\n", ",\n").replace("Title 7,", "Title 7,the Bad"), None, r"items.csv, line 9: a field without"),
        (
            HEAD.replace("\n", ",\n").replace("title,", "title"),
            None,
            r"items.csv, line 2: 3 fields, .*\(30 such lines\)",
        ),
        (None, EVENTS.replace("u0,i0,0", "u0,i0,2,0"), r"events.csv, line 2: 4 fields, the first line has 3"),
        (None, EVENTS + "u1,i7\n", r"events.csv, line 74: 2 fields"),
        (None, EVENTS + 'u1,"i7,5\n', r"events.csv, line 74: not CSV \(unexpected end of data\)"),
        (HEAD + 'i98,"Good\ni99,Bad\n', None, r"items.csv, line 32: not CSV"),
        (HEAD + 'i98,"Good" Bad\n', None, r"items.csv, line 32: not CSV .*double its quotes"),
        (HEAD + 'i98,"The Good, the Bad\ni99,Ugly"\n', None, r"items.csv, line 32: .*look like rows"),
        (HEAD + 'i98,"A title\ni99,has, two, commas"\n', None, r"items.csv, line 32: .*look like rows"),
        (
            HEAD.replace("Title 3\n", '"Title 3\n').replace("Title 5\n", 'Title 5"\n'),
            None,
            "line 5: .* look like rows",
        ),
        (
            HEAD.replace("\n", ",\n").replace("Title 3,", '"Title 3,').replace("Title 5,", 'Title 5",'),
            None,
            r"items.csv, line 5: .*a quoted field goes on over lines that look like rows\); use commas, close",
        ),
        (None, EVENTS + "u1,i7\0,5\n", r"events.csv, line 74: a byte that no text file in UTF-8 has"),
        (HEAD.replace("id,title", "id,title,title").replace("\n", ",x\n"), None, r"'title' but has id, title, title"),
        (
            HEAD.replace(",", ";"),
            None,
            r"items.csv needs one column 'id' but has id;title: .* separate them by commas",
        ),
        (None, EVENTS.replace(",", "\t"), "separate them by commas"),
        (
            re.sub(r"[^,\n]+", r'"\g<0>"', HEAD).replace(",", ";"),
            None,
            r"items.csv, line 1: not CSV \(',' expected after '\"'\); use commas, close",
        ),
        (None, EVENTS.replace(",", "::"), "separate them by commas"),
        # line numbers are those of the file
        (HEAD + "\n\n  \ni99,\n", None, r"items.csv, line 35: the title of item 'i99' is empty"),
        ("id,title\n" + 'a,"Alien\nResurrection"\n\nb,"A\r\n\r\nB"\n,C\n', None, r"items.csv, line 8: the id is empty"),
        (HEAD + 'i98,"Title\n4"\n', None, r"items.csv, line 32: title 'Title\\n4' is on line 6 too"),
        (HEAD + "i98,Cafe\u0301\ni99,CAF\u00c9\n", None, r"items.csv, line 33: title 'CAF\u00c9' is on line 32 too"),
        # times that cannot be compared without loss
        (
            None,
            EVENTS + "u1,i7,1.71717E+12\n",
            r"events.csv, line 74: time '1.71717E\+12' is neither .* with all digits",
        ),
        (None, EVENTS.replace(",3\n", ",1e12\n"), r"events.csv, line 5: time '1e12' is neither .*\(12 such lines\)"),
        (None, EVENTS + "u1,i7,1717171717.0\n", r"line 74: time '1717171717.0' is neither"),
        (
            None,
            EVENTS + "u1,i7,9223372036854775808\n",
            r"line 74: time '9223372036854775808' is not a whole number of at most 64",
        ),
        (None, EVENTS + f"u1,i7,{10**30}\n", r"line 74: time '10{30}' is neither"),
        (None, re.sub(r",(\d)\n", r",0\g<1>022024\n", EVENTS), r"line 2: time '00022024' is neither"),
        (None, EVENTS + "u1,i7,\u0661\n", r"line 74: time '\u0661' is neither"),
        (
            None,
            EVENTS + "u1,i7,1717171717\nu1,i8,1717171717000\n",
            r"line 75: time 1717171717000 is in another unit than 17",
        ),
        (None, EVENTS.replace(",0\n", ",2024-5-1\n"), r"line 2: time '2024-5-1' is neither"),
        (None, EVENTS.replace(",0\n", ",31-05-2024\n"), r"line 2: time '31-05-2024' is neither"),
        (None, re.sub(r",\d\n", ",2024-02-30\n", EVENTS), r"line 2: time '2024-02-30' is no day and time that exists"),
        (
            None,
            re.sub(r",(\d)\n", r",2024-01-0\1T10:00:00.1234567\n", EVENTS),
            r"line 2: time '2024-01-00T10.* neither",
        ),
        (
            None,
            re.sub(r",[1-5]\n", ",2024-01-01\n", EVENTS).replace(",0\n", ",2024-01-01T10:00\n"),
            r"line 3: .*not written",
        ),
        (
            None,
            re.sub(r",[1-5]\n", ",2024-01-01 10:00\n", EVENTS).replace(",0\n", ",2024-01-01 10:00Z\n"),
            r"line 3: time '2024-01-01 10:00' is not written like '2024-01-01 10:00Z'",
        ),
    ],
)
def test_a_csv_that_could_be_read_in_two_ways_is_refused_with_its_line(tmp_path, home, items, events, says):
    folder = write_csv(tmp_path / "csv")
    for name, text in (("items.csv", items), ("events.csv", events)):
        if text is not None:
            (folder / name).write_bytes(text.encode())
    with pytest.raises(UserError, match=says) as refused:
        load("csv", str(folder))
    assert "\n" not in str(refused.value)
    assert not list(home.glob("data/*"))


@pytest.mark.parametrize(
    ("change", "title"),
    [
        (lambda text: "\ufeff" + text.replace("\n", "\r\n"), "Title 4"),
        (lambda text: text.replace("id,title", '"id", "title"'), "Title 4"),
        (lambda text: text.replace("\n", ",\n"), "Title 4"),
        (lambda text: text.replace("\n", "\n\n"), "Title 4"),
        (lambda text: text.replace("Title 4", '"Title, 4"'), "Title, 4"),
        (lambda text: text.replace("Title 4", '"Title ""4"""'), 'Title "4"'),
        (lambda text: text.replace("Title 4", 'Title 4" disk'), 'Title 4" disk'),
        (lambda text: text.replace("Title 4", '"Title\n\n4"'), "Title 4"),
        (lambda text: text.replace("Title 4", '"Title,\nor ""4"""'), 'Title, or "4"'),
        (lambda text: text.replace("i4,Title 4", " i4 , Tit\u2028le\u00a0 4\t"), "Tit le 4"),
        (lambda text: text.replace("Title 4", "Tit\u006c\u0065\u0301"), "Titl\u00e9"),
    ],
    ids=[
        "BOM and CRLF",
        "quoted header",
        "last comma",
        "blank lines",
        "comma",
        "quotes",
        "inch",
        "lines",
        "both",
        "spaces",
        "NFD",
    ],
)
def test_a_csv_that_can_be_read_in_one_way_is_read(tmp_path, change, title):
    folder = write_csv(tmp_path / "csv")
    text = (folder / "items.csv").read_text()
    (folder / "items.csv").write_bytes(change(text).encode())
    dataset = load("csv", str(folder))
    assert list(dataset.items["title"]) == [f"Title {n}" if n != 4 else title for n in range(30)]
    assert list(dataset.events["item"][dataset.events["user"] == 3]) == [3, 4, 5, 6, 7, 8]


def test_ids_of_users_and_items_lose_spaces_and_nothing_else(tmp_path):
    events = "user, item ,time\n" + "".join(
        f"{' ' * (n % 2)}0{user}{' ' * (n % 3)},i{n} ,{5 + n}\n" for user in range(12) for n in range(5)
    )
    dataset = load("csv", str(write_csv(tmp_path / "csv", events=events + "ANNA,i1,0\nanna,i1,0\n")))
    assert list(dataset.users["source_id"]) == [f"0{user}" for user in range(12)] + ["ANNA", "anna"]


@pytest.mark.parametrize("first", [-(2**63), 0, 1_717_171_717, 1_717_171_717_000_000_001, 2**63 - 6])
def test_whole_numbers_are_exact_times(tmp_path, first):
    events = "user,item,time\n" + "".join(f"u{u},i{n},{first + n}\n" for n in range(5, -1, -1) for u in range(12))
    dataset = load("csv", str(write_csv(tmp_path / "csv", events=events)))
    assert list(dataset.events["time"][:6]) == [first + n for n in range(6)]
    assert list(dataset.events["item"][:6]) == list(range(6)) and dataset.notes == ()


def test_times_that_run_through_many_digits_are_no_mixture_of_units(tmp_path):
    times = [10**digits for digits in range(8, 14)]
    events = "user,item,time\n" + "".join(f"u{u},i{n},{time}\n" for n, time in enumerate(times) for u in range(12))
    assert list(load("csv", str(write_csv(tmp_path / "csv", events=events))).events["time"][:6]) == times


@pytest.mark.parametrize("name", ["events.csv.gz", "Events.csv", "events.tsv", "events.xlsx"])
def test_a_missing_file_names_a_similar_one(tmp_path, name):
    folder = write_csv(tmp_path / "csv")
    (folder / "events.csv").rename(folder / name)
    with pytest.raises(UserError, match=rf"events.csv is missing: .*; unpack or export {name} as events.csv"):
        load("csv", str(folder))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mvielens",), "there is no data set 'mvielens': choose among world, movielens, lastfm"),
        (
            ("movielens", "nowhere/at/all"),
            "needs data_dir, the folder with its files, not 'nowhere/at/all'",
        ),
        (("csv",), "data set 'csv' needs data_dir"),
        (("steam",), "needs data_dir, the folder with its files, not ''; LLaRA's are at https"),
        (("lastfm",), "data set 'lastfm' needs data_dir, .* LLaRA's are at https://huggingface.co/datasets/.*/LLaRA"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(UserError, match=says):
        load(*arguments)


@pytest.mark.parametrize("name", ["movielens", "lastfm", "steam", "llara", "csv"])
def test_an_empty_folder_says_what_is_missing(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is missing: put it there, or name another folder"):
        load(name, str(tmp_path / "empty"))


def test_text_in_another_encoding_is_refused(tmp_path):
    folder = write_csv(tmp_path / "csv")
    (folder / "items.csv").write_bytes(HEAD.encode() + "i99,Café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"items.csv, line 32: a byte that .* UTF-8 has; export the file again"):
        load("csv", str(folder))


# ---------------------------------------------------------------- MovieLens in small


def test_titles_of_films(tmp_path):
    raw = ["Toy Story (1995)", "Ice Storm, The (1997)", "Affair to Remember, An (1957)", "Cape Fear (1991)"]
    raw += ["Cape Fear (1962)", "Chasing Amy (1997)", "Chasing Amy (1997)", "unknown", "Land III (1995) (V)"]
    raw += ["Horseman on the Roof, The (Hussard sur le toit, Le) (1995)", "Misérables, Les (1995)"]
    flags = "|0|0|0|1|1|1" + "|0" * 13
    lines = [f"{n}|{title}|01-Jan-1995||url{flags}" for n, title in enumerate(raw, start=1)]
    (tmp_path / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")
    items = readers._read_u_item(tmp_path / "u.item")
    assert list(items["title"]) == [
        *("Toy Story", "The Ice Storm", "An Affair to Remember", "Cape Fear (1991)", "Cape Fear (1962)"),
        *("Chasing Amy", "Chasing Amy (2)", "unknown", "Land III"),
        *("The Horseman on the Roof (Hussard sur le toit, Le)", "Misérables, Les"),
    ]


def test_a_list_of_films_that_was_converted_to_utf_8_is_read_as_that(tmp_path):
    flags = "|" + "|".join("0" * 19)
    line = f"1|Misérables, Les (1995)|01-Jan-1995||url{flags}\n"
    for encoding in ("latin-1", "utf-8", "utf-8-sig"):
        (tmp_path / "u.item").write_text(line, encoding=encoding)
        assert list(readers._read_u_item(tmp_path / "u.item")["title"]) == ["Misérables, Les"]


def archive_files(folder: Path) -> dict[str, str]:
    """A tiny MovieLens: 30 films, 20 users of six ratings, one of them too low."""
    flags = "|0" * 19
    films = "".join(f"{n}|Film {n} (1990)|01-Jan-1990||{flags}\n" for n in range(1, 31)).replace("||" + "|", "|||")
    ratings = "".join(
        f"{user}\t{1 + (user + n) % 30}\t{2 if n == 5 else 4}\t{1000 * user + n}\n"
        for user in range(1, 21)
        for n in range(6)
    )
    return {"u.item": films, "u.data": ratings}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def test_movielens_keeps_ratings_of_three_and_more(tmp_path):
    dataset = load("movielens", str(write(tmp_path / "ml-100k", archive_files(tmp_path)).parent))
    assert len(dataset.events) == 20 * 5
    assert list(dataset.users["split"]) == ["train"] * 16 + ["validation"] * 2 + ["test"] * 2
    assert dataset.notes == ("u.data has 120 ratings, as published it has 100000",)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("u.data", lambda text: text[:-7] + "x\n", r"u.data, line 120: not four whole numbers .* but '20.*; fetch"),
        (
            "u.data",
            lambda text: text.replace("\t4\t", "\tfour\t", 1),
            r"u.data, line 1: not four whole .* but '1.*four",
        ),
        ("u.data", lambda text: "\n" + text + "1\t1\t4\t5.5\n", r"u.data, line 122: not four whole numbers"),
        ("u.item", lambda text: text.replace("|Film 9 (1990)|", "||"), r"u.item, line 9: not film 9 in 24 fields"),
        ("u.item", lambda text: text.replace("\n7|", "\n\n\nseven\n7|"), r"u.item, line 9: not film 7 in 24 fields"),
        (
            "u.data",
            lambda text: text + "1\t31\t4\t5\n",
            r"u.data, line 121: no film 31 in u.item; use one archive",
        ),
        ("u.item", lambda text: text.replace("\n7|", "\n8|"), r"u.item, line 7: not film 7 in 24 fields"),
        ("u.item", lambda text: text.replace("Film 5", "Caf\xc3\xa9") + "\xe9", r"u.item, line 5: .* another encoding"),
        ("u.item", lambda text: text.replace("Film 5", "Star \x96 Trek"), r"u.item, line 5: a title in another"),
        ("u.item", lambda text: text[:-30], r"u.item, line 30: not film 30 in 24 fields"),
    ],
)
def test_damaged_movielens(tmp_path, name, change, says):
    files = archive_files(tmp_path)
    with pytest.raises(UserError, match=says):
        load("movielens", str(write(tmp_path / "ml", files | {name: change(files[name])})))


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A server that stands in for GroupLens; returns a function that publishes an archive and damages it."""
    site = tmp_path / "site"
    site.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def publish(damage: bool = False) -> None:
        archive = site / "ml-100k.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name, text in archive_files(tmp_path).items():
                file.writestr(f"ml-100k/{name}", text.encode("latin-1"))
        checksum = "md5:" + hashlib.md5(archive.read_bytes()).hexdigest()
        if damage:
            archive.write_bytes(archive.read_bytes()[:-100])
        url = f"http://127.0.0.1:{server.server_port}/ml-100k.zip"
        monkeypatch.setattr(readers, "_ARCHIVE", (url, checksum))

    yield publish
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_shows_the_licence_and_happens_once(publisher, capsys):
    publisher()
    first = load("movielens")
    assert "Licence: for research" in capsys.readouterr().out
    assert load("movielens").key == first.key and len(first.users) == 20
    assert "Licence" not in capsys.readouterr().out


def test_damaged_download_is_refused(publisher, home):
    publisher(damage=True)
    with pytest.raises(UserError, match=r"ml-100k.zip arrived damaged .* try again, or unpack http.* by hand"):
        load("movielens")
    assert not (home / "downloads" / "ml-100k.zip").exists()


def test_no_network(monkeypatch):
    url = "http://127.0.0.1:9/ml-100k.zip"  # the discard port: nothing listens there
    monkeypatch.setattr(readers, "_ARCHIVE", (url, "md5:0"))
    with pytest.raises(UserError, match=r"could not be downloaded \(ConnectionError\): try again, or unpack"):
        load("movielens")


# ---------------------------------------------------------------- the real files


def rows(file: Path, padding: int) -> list[tuple]:
    """LLaRA's rows with three items of history or more, as (history..., target)."""
    return [tuple(row) for row in llara_files.read_rows(file, padding)[0] if len(row) > 3]


def as_rows(windows: Sequences) -> list[tuple]:
    return [
        (*(int(item) for item in history[10 - n :]), int(target))
        for history, n, target in zip(windows.history, windows.length, windows.target, strict=True)
    ]


@real
def test_real_movielens_gives_llaras_rows():
    dataset = load("movielens", str(REAL))
    assert len(dataset.items) == 1682 and dataset.items["title"].is_unique
    assert dataset.users["split"].value_counts().to_dict() == {"train": 754, "test": 95, "validation": 94}
    for split, name in (("validation", "Val_data.df"), ("test", "Test_data.df")):
        published = rows(REAL / "llara" / "movielens" / name, 1682)
        assert sorted(as_rows(sequences(dataset, split, windows="last"))) == sorted(published)


@real
def test_real_movielens_ratings_alone_identify_the_users_of_llaras_rows():
    """u.data alone: a row's items are, equal times aside, the last events of one user of its split."""
    dataset = load("movielens", str(REAL / "ml-100k"))
    histories = {
        split: [group for _, group in dataset.events[dataset.events["user"].isin(ids)].groupby("user")]
        for split, ids in dataset.users.groupby("split")["user"]
    }
    for split, name, n in (("validation", "Val_data.df", 94), ("test", "Test_data.df", 95)):
        users = set()
        for row in rows(REAL / "llara" / "movielens" / name, 1682):
            for history in histories[split]:
                in_row = history[history["item"].isin(row)] if set(row) <= set(history["item"]) else []
                if len(in_row) == len(row) and list(in_row["time"]) == list(history["time"])[-len(row) :]:
                    users.add(int(history["user"].iat[0]))
        assert len(users) == n


@real
def test_real_lastfm_windows_are_the_files_windows():
    dataset = load("lastfm", str(REAL))
    folder = REAL / "llara" / "lastfm"
    assert dataset.users["split"].value_counts().to_dict() == {"train": 976, "validation": 122, "test": 122}
    assert sorted(as_rows(sequences(dataset, "train"))) == sorted(rows(folder / "train_data.df", 4606))
    assert as_rows(sequences(dataset, "validation", windows="last")) == rows(folder / "Val_data.df", 4606)
    assert as_rows(sequences(dataset, "test", windows="last")) == rows(folder / "Test_data.df", 4606)


@real
def test_real_lastfm_is_in_one_global_order():
    """As ilora.data.loading says: no two of LLaRA's LastFM histories disagree about the order of two artists."""
    events = load("lastfm", str(REAL)).events
    following = pd.DataFrame({"a": events["item"], "b": events["item"].shift(-1)})[
        events["user"] == events["user"].shift(-1)
    ]
    remaining = following.drop_duplicates()
    while len(remaining):  # Kahn's algorithm: remove artists that none precedes
        keep = remaining["a"].isin(remaining["b"])
        assert not keep.all(), "the order has a cycle"
        remaining = remaining[keep]


@real
def test_real_steam():
    dataset = load("steam", str(REAL))
    folder = REAL / "llara" / "steam"
    assert len(dataset.items) == 3581 and "train_sample_1000.df" in dataset.notes[0]
    assert not dataset.items["title"].str.contains("&amp;").any()
    for split, name in (
        ("train", "train_sample_1000.df"),
        ("validation", "Val_data.df"),
        ("test", "Test_data.df"),
    ):
        assert as_rows(sequences(dataset, split, windows="last")) == rows(folder / name, 3581)
