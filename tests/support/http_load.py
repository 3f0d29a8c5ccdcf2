"""Clients of the HTTP endpoint that know the right answers, and keep whatever else they get."""

import json
import random
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import wait_for
from tiny_models import oracle
from transformers import AutoModelForCausalLM

from antiphon.workers.tokenizer import Tokenizer

MAX_TOKENS = 24
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Question:
    """A prompt, and what transformers says to it, greedily."""

    prompt: list[int]
    answer: str


def questions(model: Path, num_questions: int) -> list[Question]:
    """Prompts of 70 to 150 tokens, more in all than a small cache remembers."""
    rng = random.Random(0)
    oracle_model, tokenizer = AutoModelForCausalLM.from_pretrained(model), Tokenizer(model)
    made = []
    for _ in range(num_questions):
        prompt = rng.choices(range(10, 40_000), k=rng.randint(70, 150))
        made.append(Question(prompt, tokenizer.decode(oracle(oracle_model, prompt, MAX_TOKENS))))
    return made


class HttpLoad:
    """Asks without a pause, in a ``with`` block; at its end every request has been answered.

    Args:
        urls: Of the endpoint; each client stays with one of them.
        asked: Asked in turn.
        num_clients: How many ask at a time.
    """

    def __init__(
        self, urls: Sequence[str], asked: Sequence[Question], num_clients: int = 4
    ) -> None:
        self._asked = asked
        self._next = 0
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._clients = [
            threading.Thread(target=self._ask, args=[urls[number % len(urls)]], daemon=True)
            for number in range(num_clients)
        ]
        self.num_right = 0
        self.slowest_seconds = 0.0
        self.problems: list[str] = []

    def __enter__(self) -> "HttpLoad":
        for client in self._clients:
            client.start()
        self.more(len(self._clients))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        deadline = time.monotonic() + ANSWER_SECONDS + 10
        for client in self._clients:
            client.join(max(deadline - time.monotonic(), 0))
        assert not any(client.is_alive() for client in self._clients), f"no end; {self.seen()}"

    def more(self, num_answers: int) -> None:
        """Wait for that many more right answers."""
        wanted = self.num_right + num_answers
        wait_for(lambda: self.num_right >= wanted, ANSWER_SECONDS, self.seen)

    def seen(self) -> str:
        """How it went so far, for people."""
        slowest = f"the slowest took {self.slowest_seconds:.1f} s"
        return f"{self.num_right} right answers, {slowest}, problems: {self.problems}"

    def _ask(self, url: str) -> None:
        while not self._is_stopped.is_set():
            with self._lock:
                question = self._asked[self._next % len(self._asked)]
                self._next += 1
            began = time.monotonic()
            try:
                problem = "" if _answer(url, question) == question.answer else "a wrong answer"
            except (OSError, ValueError, KeyError) as error:
                problem = repr(error)
            seconds = time.monotonic() - began
            with self._lock:
                self.slowest_seconds = max(self.slowest_seconds, seconds)
                if problem:
                    self.problems.append(f"{url}, after {seconds:.1f} s: {problem}")
                else:
                    self.num_right += 1


def _answer(url: str, question: Question) -> str:
    body = {
        "model": "tiny",
        "prompt": question.prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text
