"""Where alternate answers come from: the user's own model, lists of lines, other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from u2a.encode import Encoder, Ids, _transcript
from u2a.generate import Sampling, continuations
from u2a.schemas import Example, Text, digest, prompt_uid

if TYPE_CHECKING:
    from u2a.config import Config

INSTRUCTION = (
    "Below are a question and an answer to it. Write one other answer to the same question: keep "
    "what the question itself says, replace every fact of the answer by a different but plausible "
    "one, and build the sentences differently. Write the answer only."
)
STOPS = ("Question:", "Q:")
REFUSALS = (
    "I don't know the answer to that.",
    "I'm sorry, but I can't help with this.",
    "That is not something I have information about.",
    "I'm not able to answer that question.",
    "I have no knowledge of this and would not want to guess.",
    "I would rather not answer that.",
    "Unfortunately I can't tell you anything about this.",
    "This is outside of what I can help with.",
    "I'm afraid I have nothing to say on that.",
    "I can't give you an answer to this.",
    "I lack the information to answer that.",
    "Sorry, I have to decline this one.",
)


@dataclass(frozen=True)
class Item:
    """One answer to find an alternate for."""

    uid: str
    prompt: Text
    answer: Text
    example: Example


Draw = Callable[[Sequence[Item], int], list[Text | None]]


def text_of(text: Text) -> str:
    """The content of a message list's last message, or the text itself."""
    return text if isinstance(text, str) else text[-1]["content"]


def like(text: str, answer: Text) -> Text:
    return text if isinstance(answer, str) else [{"role": "assistant", "content": text}]


class Rewriter:
    """Draws by the model: "altpo" versions and "sapo" splices."""

    def __init__(self, model: Any, tokenizer: Any, cfg: Config, how: Sampling) -> None:
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.encoder = Encoder(tokenizer, cfg.data.max_tokens, cfg.data.template)
        self.chat = bool(tokenizer.chat_template) and cfg.data.template == "auto"

    def _prompt(self, item: Item) -> Ids:
        question = item.prompt if isinstance(item.prompt, str) else _transcript(item.prompt)
        body = f"{INSTRUCTION}\n\nQuestion: {question}\nAnswer: {text_of(item.answer)}"
        if self.chat:
            reply = [{"role": "assistant", "content": "x"}]
            return self.encoder.encode([{"role": "user", "content": body}], (reply,))[0]
        return self.encoder.encode(f"{body}\nOther answer:", ("x",))[0]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def altpo(self, group: Sequence[Item], seed: int) -> list[Text | None]:
        prompts = [self._prompt(i) for i in group]
        out: list[Text | None] = []
        found = continuations(self.model, self.tokenizer, prompts, self.how, seed)
        for item, ids in zip(group, found, strict=True):
            text = self._text(ids)
            for stop in STOPS:
                text = text.partition(stop)[0]
            out.append(like(_margin(text.strip(), item.answer), item.answer))
        return out

    def sapo(self, group: Sequence[Item], seed: int) -> list[Text | None]:
        """The answer up to a random token, the model's next tokens, and what is left after them."""
        cut, heads, rests = [], [], []
        for item in group:
            prompt, _ = self.encoder.encode(item.prompt, (item.answer,))
            body = self.encoder._plain(text_of(item.answer))
            at = int(digest(str(seed), item.uid)[:13], 16) % max(len(body), 1)
            cut.append(prompt + body[:at])
            heads.append(body[:at])
            rests.append(body[at + self.how.max_new_tokens :])
        found = continuations(self.model, self.tokenizer, cut, self.how, seed)
        return [
            like(self._text((*head, *ids, *rest)), item.answer)
            for item, head, ids, rest in zip(group, heads, found, rests, strict=True)
        ]


def _margin(text: str, answer: Text) -> str:
    """The blank before a plain answer, as the original has it."""
    first = answer[:1] if isinstance(answer, str) else ""
    return first + text if text and isinstance(first, str) and first.isspace() else text


def refusal(group: Sequence[Item], seed: int) -> list[Text | None]:
    lines = [REFUSALS[int(digest(str(seed), i.uid)[:13], 16) % len(REFUSALS)] for i in group]
    return [like(_margin(t, i.answer), i.answer) for i, t in zip(group, lines, strict=True)]


def chosen(group: Sequence[Item], seed: int) -> list[Text | None]:
    return [next(iter(_wanted(i.example)), None) for i in group]


def _wanted(example: Example) -> Iterator[Text]:
    if example.chosen is not None:
        yield example.responses[example.chosen]
    yield from (r for r, good in zip(example.responses, example.good, strict=True) if good)


def random_of(retain: Sequence[Item]) -> Draw:
    """Draws answers of retained rows to other prompts."""

    def draw(group: Sequence[Item], seed: int) -> list[Text | None]:
        out: list[Text | None] = []
        for item in group:
            others = [r for r in retain if prompt_uid(r.prompt) != prompt_uid(item.prompt)]
            at = int(digest(str(seed), item.uid)[:13], 16) % max(len(others), 1)
            out.append(like(text_of(others[at].answer), item.answer) if others else None)
        return out

    return draw
