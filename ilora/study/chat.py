"""ChatRec: any chat endpoint that speaks OpenAI's protocol, as a recommender.

    system   Answer with one of the offered titles, exactly as it is written, and with nothing else.
    user     Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is:

The paper prints no prompt of its ChatRec row. These words are ours: the question is the text-only prompt of
prompts.py, as the language models get it, so that rows compare.

An answer is kept under `artifacts.home()/chat/` the moment it is read: a run that was stopped in whatever way goes on
from there, and does not pay again for what is kept.
"""

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from ilora import artifacts
from ilora.errors import UserError
from ilora.language.prompts import read_answer, wording

try:
    import openai
except ImportError:  # an extra; ChatRec says so
    openai = None

INSTRUCTION = "Answer with one of the offered titles, exactly as it is written, and with nothing else."
SETTINGS = {"temperature": 0, "max_tokens": 64}  # max_tokens has a newer name, which fewer servers know
TOKENS = ("prompt_tokens", "completion_tokens")
NO_KEY = "no-key"  # sent to servers that ask for none
URL = r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[^\s@?#]*)?"


class ChatRec:
    """Asks a chat endpoint for the next item.

    base_url: of the endpoint, as http://localhost:8000/v1; model: its name there. The key comes from the environment,
        OPENAI_API_KEY, and is written nowhere; a server of your own may do without.
    titles, noun, verb: as for Prompts.
    request_limit: requests of this object, each retry counted. At the limit no further request is sent; those under
        way, at most `concurrency`, are waited for and kept.
    concurrency: requests at a time.
    timeout: seconds without a sign from the server.
    retries: of one request, after a timeout, a broken connection or the status 408, 409, 429 or 5xx. The openai
        package waits 0.5 s and twice as long each time, up to 8 s, or what Retry-After says, up to 120 s.

    `requests` counts what this object sent.  Raises UserError for what cannot work.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        titles: Sequence[str],
        noun: str,
        verb: str,
        request_limit: int | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 10,
    ):
        if openai is None:
            raise UserError("ChatRec needs the package openai: pip install -e '.[chat]' in the repository")
        if not re.fullmatch(URL, base_url):  # the message does not repeat it: it may hold a password
            raise UserError("base_url must be of the form https://host/v1, without user, password and query")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise UserError("concurrency must be at least 1, timeout above 0 and retries at least 0")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds a sign that no key has: copy it again")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.titles, self.words = list(titles), (noun, verb)
        self.request_limit, self.concurrency = request_limit, concurrency
        self.requests, self._counting = 0, threading.Lock()
        self._stopped = ""  # why no further request is sent
        self._client = openai.OpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=timeout,
            max_retries=retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._count]}),
        )
        about = {"base_url": self.base_url, "model": model, "settings": SETTINGS}
        self.folder = (
            artifacts.home() / "chat" / artifacts.digest(about)
        )  # a request's, whatever version sends it: it was paid
        artifacts.write_json(self.folder / "parameters.json", about)

    def messages(self, history: Sequence[int], candidates: Sequence[int]) -> list[dict[str, str]]:
        """What is sent: history and candidates are item ids, the history oldest first and without padding."""
        opening, offer, question = wording(*self.words)
        listed = ["; ".join(self.titles[item] for item in items) for items in (history, candidates)]
        text = f"{opening} {listed[0]}{offer} {listed[1]}{question}"
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]

    def generate(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> list[int | None]:
        """For each row the column of the candidate that the answer names; None if invalid.

        Only what is not kept is asked.  Raises UserError at a limit, or if the endpoint does not do its part.
        """
        asked = [self.messages(history, candidates) for history, candidates, _ in rows]
        digests = [artifacts.digest({"messages": messages}) for messages in asked]
        with FileLock(self.folder / ".lock"):  # runs at the same time do not pay twice either
            missing = {key: messages for key, messages in zip(digests, asked, strict=True) if not self._kept(key)}
            try:
                self._ask_all(missing)
            except UserError as error:
                kept = sum(self._kept(digest) is not None for digest in set(digests))
                raise UserError(
                    f"{error}; {self.requests} requests were sent, {kept} of {len(set(digests))} answers are "
                    f"kept in {self.folder}, and the same call goes on from there"
                ) from None
            texts = [self._kept(digest)["text"] for digest in digests]
        offered = [[self.titles[item] for item in candidates] for _, candidates, _ in rows]
        return [read_answer(text, titles) for text, titles in zip(texts, offered, strict=True)]

    # ---------------------------------------------------------------- inside

    def _kept(self, digest: str) -> dict[str, Any] | None:
        """The answer to a prompt; None if there is none, or one that a full disk or a hand cut short."""
        try:
            return json.loads((self.folder / f"{digest}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _ask_all(self, missing: dict[str, list[dict[str, str]]]) -> None:
        """Ask and keep, several at a time.  After a UserError no further request is sent."""
        self._stopped = ""
        bar = tqdm(total=len(missing), unit="answer", desc="chat", mininterval=1, disable=not missing)
        with bar, ThreadPoolExecutor(self.concurrency) as pool:
            try:
                asking = [pool.submit(self._ask, digest, messages) for digest, messages in missing.items()]
                for done in as_completed(asking):
                    done.result()
                    bar.update()
            finally:
                self._stopped = self._stopped or "interrupted"
                pool.shutdown(cancel_futures=True)

    def _ask(self, digest: str, messages: list[dict[str, str]]) -> None:
        try:
            answer = self._request(messages)
            answer |= {"prompt": digest, "date": datetime.now(UTC).isoformat(timespec="seconds")}
            artifacts.write_json(self.folder / f"{digest}.json", answer)
        except UserError as error:
            self._stopped = self._stopped or str(error)
            raise

    def _request(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        create = self._client.chat.completions.with_raw_response.create
        try:
            reply = create(model=self.model, messages=messages, **SETTINGS)
        except openai.OpenAIError as error:
            raise UserError(self._explain(error)) from None  # its own traceback may show the key
        try:
            return _read(json.loads(reply.content))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self.base_url} sends what is no chat completion: check base_url, which ends in /v1 at most servers"
            ) from None

    def _count(self, request: Any) -> None:
        """Called by the client before each attempt; it hands an OpenAIError on without another attempt."""
        with self._counting:
            if self._stopped:
                raise openai.OpenAIError(self._stopped)
            if self.request_limit is not None and self.requests >= self.request_limit:
                raise openai.OpenAIError(f"stopped at request_limit = {self.request_limit}: give a higher one")
            self.requests += 1

    def _explain(self, error: Exception) -> str:
        """One sentence for an error of the client."""
        if not isinstance(error, openai.APIError):
            return str(error)
        status = getattr(error, "status_code", None)
        if status in (401, 403):  # servers like to repeat the key here
            return f"{self.base_url} refuses the key (error {status}): set OPENAI_API_KEY to one for {self.model}"
        said = " ".join(str(error).replace(self._client.api_key, "***").split())[:300]
        if status is None:
            return f"{self.base_url} does not answer ({said.rstrip('.')}): check that it runs, or try again later"
        if status in (408, 409, 429) or status >= 500:
            wait = error.response.headers.get("retry-after")
            said += f", to be tried again after {wait} s" if wait else ""
            return f"{self.base_url} cannot answer ({said}): try again later"
        return f"{self.base_url} refuses the request ({said}): correct base_url or model"


def _read(body: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a chat completion.  Raises what broken JSON structures raise if it is none."""
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = choice["message"].get("content") or ""  # null: the model declined, or had no tokens left
    return {
        "text": text.encode(errors="replace").decode(),  # half a surrogate pair is no UTF-8
        "finish_reason": choice.get("finish_reason"),
        "usage": {name: usage[name] for name in TOKENS if isinstance(usage.get(name), int)},
        "model": body.get("model"),
    }
