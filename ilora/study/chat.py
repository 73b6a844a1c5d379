"""ChatRec: any chat endpoint that speaks OpenAI's protocol, as a recommender.

    system   Answer with one of the offered titles, exactly as it is written, and with nothing else.
    user     Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is:

The paper prints no prompt of its ChatRec row; here it is the text-only prompt of the language models. Each reply is
saved in `artifacts.home()/chat/` as soon as it arrives: an interrupted run resumes, and no reply is paid for twice.
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from ilora import artifacts
from ilora.errors import UserError
from ilora.language.prompts import prompt_text, read_answer

INSTRUCTION = "Answer with one of the offered titles, exactly as it is written, and with nothing else."
SETTINGS = {"temperature": 0, "max_tokens": 64}  # max_tokens has a newer name, which fewer servers know
URL = r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[^\s@?#]*)?"


class ChatRec:
    """Recommends the next item by the replies of a chat endpoint, such as base_url="http://localhost:8000/v1".

    The key comes from the environment variable OPENAI_API_KEY and is written nowhere. titles, noun, verb: as for
    Prompts. Raises UserError for a URL or a key that cannot work.
    """

    timeout = 60.0  # seconds without a sign from the server
    retries = 10  # after a timeout, a broken connection or the status 408, 409, 429 or 5xx, at growing intervals

    def __init__(self, base_url: str, model: str, titles: Sequence[str], noun: str, verb: str) -> None:
        try:
            import openai  # takes a second, which other systems need not
        except ImportError as error:
            raise UserError("ChatRec needs the package openai: pip install -e '.[chat]' in the repository") from error
        if not re.fullmatch(URL, base_url):  # the message does not repeat it: it may contain a password
            raise UserError("base_url must be of the form https://host/v1, without user, password and query")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has a character that no key has: copy it again")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.titles, self.words = list(titles), (noun, verb)
        options = {"timeout": self.timeout, "max_retries": self.retries}
        self._client = openai.OpenAI(api_key=key, base_url=self.base_url, **options)
        about = {"base_url": self.base_url, "model": model, "settings": SETTINGS}
        self.folder = artifacts.home() / "chat" / artifacts.digest(about)  # for all versions: replies were paid for
        artifacts.write_json(self.folder / "parameters.json", about)

    def messages(self, history: Sequence[int], candidates: Sequence[int]) -> list[dict[str, str]]:
        """The messages of a request; history (oldest first, perhaps padded) and candidates are item ids."""
        history = [item for item in history if item != len(self.titles)]
        listed = [[self.titles[item] for item in items] for items in (history, candidates)]
        question = prompt_text(*listed, *self.words, mark="")
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]

    def generate(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> list[int | None]:
        """For each row the column of the candidate that the reply names; None if it is invalid. Raises UserError."""
        columns = []
        with FileLock(self.folder / ".lock"):  # simultaneous runs do not pay twice either
            for history, candidates, _ in tqdm(rows, unit="reply", desc="chat", mininterval=1, delay=1):
                reply = self._reply(self.messages(history, candidates))
                columns.append(read_answer(reply, [self.titles[item] for item in candidates]))
        return columns

    def _reply(self, messages: list[dict[str, str]]) -> str:
        """The text of the saved reply; requested first if there is none or its file is damaged, as by a full disk."""
        path = self.folder / f"{artifacts.digest({'messages': messages})}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))["text"]
        reply = self._request(messages)
        artifacts.write_json(path, reply | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
        return reply["text"]

    def _request(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        import openai

        create = self._client.chat.completions.with_raw_response.create
        try:
            content = create(model=self.model, messages=messages, **SETTINGS).content
        except openai.OpenAIError as error:
            raise UserError(self._explain(error)) from None  # its traceback may show the key
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            text = choice["message"].get("content") or ""  # null: the model declined, or had no tokens left
            text = text.encode(errors="replace").decode()  # half a surrogate pair is no UTF-8
            return {"text": text, "finish_reason": choice.get("finish_reason"), "model": body.get("model")}
        except (ValueError, LookupError, TypeError, AttributeError):
            hint = "check base_url, which ends in /v1 at most servers"
            raise UserError(f"{self.base_url} sends what is no chat completion: {hint}") from None

    def _explain(self, error: Exception) -> str:
        text = " ".join(str(error).replace(self._client.api_key, "***").split())[:300]
        status = getattr(error, "status_code", None)
        if status is None:
            reason = f"does not answer ({text.rstrip('.')}): check that it runs, or try again later"
        elif status in (401, 403):  # the text may repeat the key
            reason = f"refuses the key (error {status}): set OPENAI_API_KEY to one for {self.model}"
        elif status in (408, 409, 429) or status >= 500:
            reason = f"cannot answer ({text}): try again later"
        else:
            reason = f"refuses the request ({text}): correct base_url or model"
        return f"{self.base_url} {reason}; replies are saved in {self.folder}, and the same call resumes from there"
