"""A judge model at an OpenAI-compatible server, which may be far away, limit its requests and cost money."""

import json
from typing import Any

from veneer.config import JobError
from veneer.evaluation.win_rate.judging import NotAnswered
from veneer.release.certify.client import FIRST_SECONDS, SHOWN, Client, NoAnswerError

PATH = "/v1/chat/completions"
REFUSED = (400, 413, 422)  # one question, such as one that is too long
AGAIN = "what was judged is kept, and the same command goes on"


class JudgeClient:
    """A judge model.

    Args:
        url: Address of the server, with or without /v1.
        model: Name of the model; None: the server's only one.
        max_new_tokens: Longest reply.
        seconds: Longest time of a reply.

    Raises:
        UserError: Nothing answers there as an OpenAI-compatible server does, the key is wrong, or no such model.
    """

    def __init__(self, url: str, model: str | None, max_new_tokens: int, seconds: float) -> None:
        self._client = Client(url, "--endpoint")
        self._seconds, self._max_new_tokens = seconds, max_new_tokens
        self.model = self._client.find_model(model, seconds=min(seconds, FIRST_SECONDS))

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its replies, for the record."""
        return {
            "endpoint": self._client.root,
            "model": self.model,
            "temperature": 0,
            "max_new_tokens": self._max_new_tokens,
        }

    def ask(self, prompt: str) -> str:
        """Return the reply to a prompt.

        Raises:
            NotAnswered: The server refuses this prompt. JobError: It does not answer, or not as such servers do.
        """
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._max_new_tokens,
            "temperature": 0,
        }
        try:
            made = self._client.ask(PATH, asked, self._seconds)
        except NoAnswerError as error:
            if error.status in REFUSED:
                raise NotAnswered(str(error)) from None
            fix = f"{error.fix}; {AGAIN}" if error.fix else AGAIN
            raise JobError(f"{self._client.root}{PATH}: {error}\n  fix: {fix}") from None
        try:
            text = made["choices"][0]["message"]["content"]
            return str(text or "")
        except (KeyError, TypeError, IndexError):
            message = json.dumps(made)[:SHOWN]
            raise JobError(
                f"{self._client.root}: its answer is not that of an OpenAI-compatible server: {message}"
            ) from None
