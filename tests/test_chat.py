"""ChatRec with `transformers serve`, and with a small HTTP server that misbehaves as each test says."""

import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilora import artifacts, data
from ilora.errors import UserError
from ilora.language import read_answer
from ilora.language.pretraining import EMBEDDED
from ilora.study import chat
from ilora.study.chat import ChatRec

pytestmark = pytest.mark.book

ROOT = Path(__file__).parents[1]
KEY = "sk-secret-4f1d"
TITLES = [
    f"The {word} of {place}"
    for word in ("Art", "Bay", "Cup", "Day", "Eye", "Fox")
    for place in ("Ur", "Rome", "Troy", "Nice", "Bonn")
]


# One message on each line, that of the system first.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return tmp_path / "home"


class Served:
    """The embedded model in `transformers serve`."""

    def __init__(self, folder):
        self.model, self.log = str(shutil.copytree(EMBEDDED, folder / "model")), folder / "log"
        Path(self.model, "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        command = [Path(sys.executable).with_name("transformers"), "serve", self.model, "--device", "cpu"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", "0"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def requests(self):
        return self.text().count('"POST /v1/chat/completions')

    @property
    def url(self):
        return re.search(r"running on (http://127.0.0.1:\d+)", self.text())[1] + "/v1"


@pytest.fixture(scope="module", autouse=True)
def starting(tmp_path_factory):
    """Starts with the first test, because it takes a while; only the last tests use it."""
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def served(starting):
    until = time.monotonic() + 120
    while "running on http" not in starting.text():
        assert starting.process.poll() is None and time.monotonic() < until, starting.text()
        time.sleep(0.1)
    return starting


# ---------------------------------------------------------------- a server that does what the test says


class Endpoint(ThreadingHTTPServer):
    """Replies what `reply(number, question)` returns: status, headers and body, or None to hang up."""

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply, self.counter = reply, itertools.count()
        self.questions, self.times, self.authorizations = [], [], []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
        number = next(self.server.counter)
        self.server.times.append(time.monotonic())
        self.server.questions.append(question)
        self.server.authorizations.append(self.headers["Authorization"])
        reply = self.server.reply(number, question)
        if reply is None:
            return
        status, headers, body = reply
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def completion(text, finish_reason="stop"):
    body = {"model": "tiny-1", "choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}
    return 200, {}, json.dumps(body).encode()


def listed(question):
    """Titles of the history and titles on offer."""
    match = re.fullmatch(r".*in order: (.*)\. The next .* one of: (.*)\. The next .* is:", question)
    return [part.split("; ") for part in match.groups()]


def answer(_, question):
    """Names the candidate in the column that is the length of the history."""
    history, offered = listed(question)
    return completion(offered[len(history)])


def error(status, message="no", **headers):
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@pytest.fixture
def serve():
    running = []

    def start(reply=answer):
        running.append(Endpoint(reply))
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def rows(number):
    """Questions with histories of 1, 2, ... items, so that `answer` names column 1, 2, ..."""
    return [(np.arange(length), np.arange(length, length + 20), length) for length in range(1, number + 1)]


def make(url, model="tiny", **options):
    options = {"retries": 2, "timeout": 30} | options
    return type("Quick", (ChatRec,), options)(url, model, TITLES, "story", "read")


def replies(home):
    """What is kept, without what describes the endpoint."""
    return [path for path in home.glob("chat/*/*.json") if path.name != "parameters.json"]


def message(system, rows):
    with pytest.raises(UserError) as caught:
        system.generate(rows)
    return str(caught.value)


# ---------------------------------------------------------------- replies


def test_the_same_question_is_sent_once(serve):
    server = serve()
    first, second = rows(2)
    assert make(server.url).generate([first, second, first]) == [1, 2, 1]
    assert len(server.questions) == 2


def test_another_model_endpoint_or_wording_is_another_question_and_another_key_is_not(serve, monkeypatch):
    server, other = serve(), serve()
    make(server.url).generate(rows(2))
    make(server.url, model="large").generate(rows(2))
    ChatRec(server.url, "tiny", TITLES, "tale", "read").generate(rows(2))
    make(other.url).generate(rows(2))
    assert (len(server.questions), len(other.questions)) == (6, 2)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    assert make(server.url).generate(rows(2)) == [1, 2]
    assert len(server.questions) == 6


@pytest.mark.parametrize(
    ("reply", "column", "kept"),
    [
        (completion(f" 1. {TITLES[3]}.\n"), 2, {"finish_reason": "stop"}),
        (completion("The Art of", finish_reason="length"), None, {"text": "The Art of", "finish_reason": "length"}),
        (completion(None), None, {"text": ""}),
        (completion("\ud83d"), None, {"text": "?"}),
    ],
    ids=["in a sentence", "cut short", "nothing", "half a character"],
)
def test_any_text_is_a_reply_and_saved(serve, home, reply, column, kept):
    assert make(serve(lambda *_: reply).url).generate(rows(1)) == [column]
    (path,) = replies(home)
    assert json.loads(path.read_text(encoding="utf-8")).items() >= kept.items()


# ---------------------------------------------------------------- stopping and going on


def test_a_killed_run_resumes_and_pays_for_no_reply_twice(serve):
    release = threading.Event()

    def reply(number, question):
        if number == 3:  # hangs until the run is killed
            release.wait(30)
            return None
        return answer(number, question)

    server = serve(reply)
    code = f"from test_chat import make, rows; make({server.url!r}, timeout=60).generate(rows(6))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        while len(server.questions) < 4:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    release.set()

    assert make(server.url).generate(rows(6)) == [1, 2, 3, 4, 5, 6]
    times_sent = Counter(server.questions)
    assert [times_sent[question] for question in server.questions[:6]] == [1, 1, 1, 2, 2, 1]
    assert len(server.questions) == 7


def test_a_damaged_reply_is_requested_again(serve, home):
    server = serve()
    make(server.url).generate(rows(3))
    broken = sorted(replies(home))[1]
    broken.write_bytes(broken.read_bytes()[:40])  # as a full disk or a hand leaves it
    (broken.parent / f".{broken.name}.x1y2").write_text('{"text": "')  # as a kill in the middle of writing leaves it
    for _ in range(2):
        assert make(server.url).generate(rows(3)) == [1, 2, 3]
        assert len(server.questions) == 4


def test_an_interrupt_keeps_the_replies_so_far(serve, home, request):
    def reply(number, question):
        if number == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # Ctrl-C
            time.sleep(0.3)
        return answer(number, question)

    server = serve(reply)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        make(server.url).generate(rows(5))
    assert len(replies(home)) == 2
    assert make(server.url).generate(rows(5)) == [1, 2, 3, 4, 5]
    assert len(server.questions) == 6


def test_simultaneous_runs_share_their_replies(serve):
    server = serve()
    with ThreadPoolExecutor(3) as pool:
        columns = list(pool.map(lambda _: make(server.url).generate(rows(5)), range(3)))
    assert columns == [[1, 2, 3, 4, 5]] * 3
    assert len(server.questions) == 5


# ---------------------------------------------------------------- failures


def test_retry_after_is_waited_for(serve):
    server = serve(lambda number, question: answer(number, question) if number else error(429, **{"Retry-After": 1}))
    assert make(server.url).generate(rows(1)) == [1]
    assert server.times[1] - server.times[0] >= 1  # without the header 0.5 or less


def test_a_server_error_is_retried_after_twice_as_long_each_time(serve):
    server = serve(lambda *_: error(500, "broken"))
    said = message(make(server.url), rows(1))
    first, second = np.diff(server.times)
    assert first >= 0.375 and second >= 0.75  # 0.5 and 1, less up to a random quarter
    assert "cannot answer (Error code: 500" in said and "try again later; replies are saved in" in said
    assert len(server.questions) == 3


def test_a_server_that_wants_hours_is_quoted_and_not_waited_for(serve):
    server = serve(lambda *_: error(429, "quota", **{"Retry-After": 7200}))
    assert "quota" in message(make(server.url), rows(1))
    assert len(server.questions) == 1


@pytest.mark.parametrize("kind", ["silent", "hangs up", "cut short"])
def test_a_failing_connection_is_retried(serve, kind):
    release = threading.Event()

    def reply(number, question):
        if number:
            return answer(number, question)
        if kind == "silent":
            release.wait(60)
        _, _, body = answer(number, question)
        return (200, {"Content-Length": len(body) + 9}, body) if kind == "cut short" else None

    server = serve(reply)
    started = time.monotonic()
    assert make(server.url, timeout=1).generate(rows(1)) == [1]
    assert time.monotonic() - started < 30
    release.set()
    assert len(server.questions) == 2


def test_a_server_that_is_not_there_or_stays_silent_is_named(serve):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        said = message(make(url, retries=1), rows(1))
    assert f"{url} does not answer (Connection error): check that it runs" in said
    release = threading.Event()
    server = serve(lambda *_: release.wait(10) and None)
    assert "does not answer (Request timed out)" in message(make(server.url, timeout=0.3, retries=0), rows(1))
    release.set()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_ends_the_run_at_once(serve, status):
    server = serve(lambda *_: error(status, "why not"))
    said = message(make(server.url), rows(5))
    assert len(server.questions) == 1
    if status in (401, 403):
        assert f"refuses the key (error {status}): set OPENAI_API_KEY" in said
    else:
        assert f"Error code: {status}" in said and "why not" in said and "correct base_url or model" in said


@pytest.mark.parametrize(
    "body",
    [
        "<html>gateway</html>", "", "null", "[]", '"text"', "{}", '{"choices": []}', '{"choices": ["x"]}', '{"choices',
        '{"error": {"message": "no"}}', '{"choices": [{"message": {"content": [1]}}]}',
        '{"choices": [{"message": null}]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_what_is_no_chat_completion_is_not_saved(serve, home, body, kind):
    server = serve(lambda *_: (200, {"Content-Type": kind}, body.encode()))
    assert "sends what is no chat completion: check base_url" in message(make(server.url), rows(2))
    assert len(server.questions) == 1
    assert not replies(home)


def test_bytes_that_are_no_text_are_no_chat_completion(serve):
    server = serve(lambda *_: (200, {}, b'{"choices": "\xff\xfe"}'))
    assert "no chat completion" in message(make(server.url), rows(1))


def test_a_failure_stops_the_other_questions_and_keeps_earlier_replies(serve, home):
    server = serve(lambda number, question: answer(number, question) if number < 2 else error(401))
    said = message(make(server.url), rows(5))
    assert f"replies are saved in {home}" in said and "the same call resumes from there" in said
    assert len(server.questions) == 3
    assert len(replies(home)) == 2


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_written_nowhere(serve, home, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    statuses = [400, 401, 403, 404, 429, 500]
    server = serve(lambda number, question: error(statuses[number], f"key {KEY} and {'x' * 500}"))
    shown = []
    for _ in statuses:
        try:
            make(server.url, retries=0).generate(rows(1))
        except UserError as caught:
            shown += ["".join(traceback.format_exception(caught)), repr(caught)]
    assert len(shown) == 2 * len(statuses)
    working = serve()
    system = make(working.url)
    system.generate(rows(3))
    assert set(server.authorizations + working.authorizations) == {f"Bearer {KEY}"}
    written = [path.read_text(encoding="utf-8") for path in home.rglob("*") if path.is_file()]
    assert len(written) > 3 and "openai" in {record.name.split(".")[0] for record in caplog.records}
    captured = capfd.readouterr()
    names = [str(path) for path in home.rglob("*")]
    public = [*shown, *written, *names, caplog.text, captured.out, captured.err, repr(system), str(vars(system))]
    assert not [text for text in public if KEY in text]


def test_a_server_without_keys_needs_none(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve()
    assert make(server.url).generate(rows(1)) == [1]
    assert server.authorizations == ["Bearer no-key"]


def test_a_line_break_of_a_key_is_removed_and_a_strange_key_is_refused_without_showing_it(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    make(server.url).generate(rows(1))
    assert server.authorizations == [f"Bearer {KEY}"]
    for strange in (f"{KEY}\u2026", f"{KEY}\n{KEY}"):
        monkeypatch.setenv("OPENAI_API_KEY", strange)
        with pytest.raises(UserError, match=r"^OPENAI_API_KEY has a character that no key has: copy it again$"):
            make(server.url)


# ---------------------------------------------------------------- bad parameters


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "localhost:8000/v1"}, "base_url must be"),
        ({"url": f"http://me:{KEY}@localhost/v1"}, "base_url must be"),
        ({"url": f"http://localhost/v1?key={KEY}"}, "base_url must be"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, said, home):
    with pytest.raises(UserError, match=said) as caught:
        make(**{"url": "http://localhost:1/v1"} | options)
    assert KEY not in str(caught.value)
    assert not home.exists()


def test_without_openai_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # what Python does for a package that is not there
    spec = importlib.util.spec_from_file_location("chat_alone", chat.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    with pytest.raises(UserError, match=r"pip install -e '.\[chat\]'"):
        alone.ChatRec("http://localhost:1/v1", "tiny", TITLES, "story", "read")


# ---------------------------------------------------------------- a real model


def directly(folder, questions):
    """For each user's message the model's greedy text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    system = "Answer with one of the offered titles, exactly as it is written, and with nothing else."
    for question in questions:
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        yield tokenizer.decode(output, skip_special_tokens=True)


def test_the_example_of_the_page_gives_what_the_model_itself_says(served):
    section = (ROOT / "book" / "own_gpus.md").read_text(encoding="utf-8").split("## A chat model as recommender")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    names, before = {}, served.requests()
    exec(code.replace("http://localhost:8000/v1", served.url).replace("MODEL", served.model), names)
    source, columns, system = (names[name] for name in ("source", "columns", "model"))
    questions = data.questions(source, "test", limit=20)
    rows = [questions[i] for i in range(20)]
    assert served.requests() - before == 20

    titles = source.items["title"]
    offered = [list(titles[candidates]) for _, candidates, _ in rows]
    questions = [
        f"Each story this person read, in order: {'; '.join(titles[history[history < len(titles)]])}. "
        f"The next story is one of: {'; '.join(named)}. The next story is:"
        for (history, _, _), named in zip(rows, offered, strict=True)
    ]
    said = list(directly(served.model, questions))
    expected = [read_answer(text, named) for text, named in zip(said, offered, strict=True)]
    assert columns == expected
    assert len(set(expected) - {None}) > 5  # it names titles, in different places

    for (history, candidates, _), text in zip(rows, said, strict=True):
        digest = artifacts.digest({"messages": system.messages(history, candidates)})
        kept = json.loads((system.folder / f"{digest}.json").read_text(encoding="utf-8"))
        assert kept["text"] == text
        assert kept["model"].startswith(served.model) and kept["date"].startswith("20")

    again = ChatRec(served.url + "/", served.model, titles, source.noun, source.verb)
    assert again.generate(rows[::-1]) == expected[::-1]
    assert served.requests() - before == 20


@pytest.mark.parametrize(("path", "model", "status"), [("", "another", 400), ("/not/there", None, 404)])
def test_a_refusal_of_a_real_server_is_reported_and_not_retried(served, path, model, status):
    before = served.requests()
    said = message(make(served.url + path, model=model or served.model), rows(1))
    assert f"refuses the request (Error code: {status}" in said and "correct base_url or model" in said
    assert served.requests() - before == (not path)  # which counts those to the right path
