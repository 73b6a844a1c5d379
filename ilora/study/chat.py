"""ChatRec: any chat endpoint that speaks OpenAI's protocol, as a recommender.

    system   Answer with one of the offered titles, exactly as it is written, and with nothing else.
    user     Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is:

The paper prints no prompt of its ChatRec row. Here the question is the text-only prompt of prompts.py, the same as for
the language models, so that rows can be compared.

Each reply is written to `artifacts.home()/chat/` as soon as it arrives: an interrupted run resumes from there, and no
reply is paid for twice.
"""

import json
import os
import re
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
except ImportError:  # an optional dependency; ChatRec says so
    openai = None

INSTRUCTION = "Answer with one of the offered titles, exactly as it is written, and with nothing else."
SETTINGS = {"temperature": 0, "max_tokens": 64}  # max_tokens has a newer name, which fewer servers know
NO_KEY = "no-key"  # sent to servers that need none
URL = r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[^\s@?#]*)?"


class ChatRec:
    """Recommends the next item by the replies of a chat endpoint.

    base_url: of the endpoint, as http://localhost:8000/v1; model: its name there. The key comes from the environment
        variable OPENAI_API_KEY and is written nowhere; your own server may need none.
    titles, noun, verb: as for Prompts.

    Raises UserError for a URL or a key that cannot work.
    """

    concurrency = 4  # requests at a time
    timeout = 60.0  # seconds without a sign from the server
    # After a timeout, a broken connection or the status 408, 409, 429 or 5xx. The openai package waits 0.5 s and twice
    # as long each time, up to 8 s, or what Retry-After says, up to 120 s.
    retries = 10

    def __init__(self, base_url: str, model: str, titles: Sequence[str], noun: str, verb: str) -> None:
        if openai is None:
            raise UserError("ChatRec needs the package openai: pip install -e '.[chat]' in the repository")
        if not re.fullmatch(URL, base_url):  # the message does not repeat it: it may contain a password
            raise UserError("base_url must be of the form https://host/v1, without user, password and query")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has a character that no key has: copy it again")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.titles, self.words = list(titles), (noun, verb)
        self._stopped = False  # then no further request is sent
        self._client = openai.OpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.retries
        )
        about = {"base_url": self.base_url, "model": model, "settings": SETTINGS}
        self.folder = artifacts.home() / "chat" / artifacts.digest(about)  # for all versions: replies were paid for
        artifacts.write_json(self.folder / "parameters.json", about)

    def messages(self, history: Sequence[int], candidates: Sequence[int]) -> list[dict[str, str]]:
        """The messages of a request; history (oldest first, not padded) and candidates are item ids."""
        opening, offer, question = wording(*self.words)
        listed = ["; ".join(self.titles[item] for item in items) for items in (history, candidates)]
        text = f"{opening} {listed[0]}{offer} {listed[1]}{question}"
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]

    def generate(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> list[int | None]:
        """For each row the column of the candidate that the reply names; None if it is invalid.

        Requests are sent only for missing replies. Raises UserError if the endpoint refuses or fails.
        """
        requests = [self.messages(history, candidates) for history, candidates, _ in rows]
        digests = [artifacts.digest({"messages": messages}) for messages in requests]
        with FileLock(self.folder / ".lock"):  # simultaneous runs do not pay twice either
            missing = {key: messages for key, messages in zip(digests, requests, strict=True) if not self._saved(key)}
            try:
                self._request_all(missing)
            except UserError as error:
                saved = sum(self._saved(digest) is not None for digest in set(digests))
                raise UserError(
                    f"{error}; {saved} of {len(set(digests))} replies are in {self.folder}, and the same call resumes "
                    "from there"
                ) from None
            texts = [self._saved(digest)["text"] for digest in digests]
        offered = [[self.titles[item] for item in candidates] for _, candidates, _ in rows]
        return [read_answer(text, titles) for text, titles in zip(texts, offered, strict=True)]

    # ---------------------------------------------------------------- inside

    def _saved(self, digest: str) -> dict[str, Any] | None:
        """The reply to a request; None if there is none, or if its file is damaged, as by a full disk."""
        try:
            return json.loads((self.folder / f"{digest}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _request_all(self, missing: dict[str, list[dict[str, str]]]) -> None:
        """Request and save replies, several at a time. After an error no further request is sent."""
        self._stopped = False
        bar = tqdm(total=len(missing), unit="reply", desc="chat", mininterval=1, disable=not missing)
        with bar, ThreadPoolExecutor(self.concurrency) as pool:
            try:
                futures = [pool.submit(self._request, digest, messages) for digest, messages in missing.items()]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            finally:
                self._stopped = True
                pool.shutdown(cancel_futures=True)

    def _request(self, digest: str, messages: list[dict[str, str]]) -> None:
        if self._stopped:
            return
        create = self._client.chat.completions.with_raw_response.create
        try:
            content = create(model=self.model, messages=messages, **SETTINGS).content
        except openai.OpenAIError as error:
            self._stopped = True
            raise UserError(self._explain(error)) from None  # its traceback may show the key
        try:
            reply = _reply(json.loads(content))
        except (ValueError, LookupError, TypeError, AttributeError):
            self._stopped = True
            raise UserError(
                f"{self.base_url} sends what is no chat completion: check base_url, which ends in /v1 at most servers"
            ) from None
        reply |= {"prompt": digest, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        artifacts.write_json(self.folder / f"{digest}.json", reply)

    def _explain(self, error: Exception) -> str:
        """One sentence for an error of the client."""
        if not isinstance(error, openai.APIError):
            return str(error)
        status = getattr(error, "status_code", None)
        if status in (401, 403):  # servers may repeat the key here
            return f"{self.base_url} refuses the key (error {status}): set OPENAI_API_KEY to one for {self.model}"
        text = " ".join(str(error).replace(self._client.api_key, "***").split())[:300]
        if status is None:
            return f"{self.base_url} does not answer ({text.rstrip('.')}): check that it runs, or try again later"
        if status in (408, 409, 429) or status >= 500:
            wait = error.response.headers.get("retry-after")
            text += f", to be tried again after {wait} s" if wait else ""
            return f"{self.base_url} cannot answer ({text}): try again later"
        return f"{self.base_url} refuses the request ({text}): correct base_url or model"


def _reply(body: dict[str, Any]) -> dict[str, Any]:
    """What is saved of a chat completion. Raises what wrong JSON structures raise if it is none."""
    choice = body["choices"][0]
    text = choice["message"].get("content") or ""  # null: the model declined, or had no tokens left
    return {
        "text": text.encode(errors="replace").decode(),  # half a surrogate pair is no UTF-8
        "finish_reason": choice.get("finish_reason"),
        "model": body.get("model"),
    }
