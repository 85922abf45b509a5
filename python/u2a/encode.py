"""Text -> token ids: template, end of sequence, truncation.

The answer is what the model must produce after the prompt, so its ids are those that follow the
rendered prompt. Control tokens written inside a user's text are encoded as text.
"""

from __future__ import annotations

import re
from typing import Any

from u2a.errors import DataError
from u2a.schemas import Message, Text

Ids = tuple[int, ...]
_HIDDEN = re.compile("\ue000(\\d+)\ue001")


class Encoder:
    """`encode` and `fit` rows with one tokenizer; raises DataError if it cannot serve."""

    def __init__(self, tokenizer: Any, max_tokens: int, template: str = "auto") -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("tokenizer: no eos token, wanted one to end each answer with")
        self.tokenizer, self.max_tokens, self.template = tokenizer, max_tokens, template
        self._enough = 32 * (max_tokens + 64)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(t) for t in tokenizer.all_special_tokens}
        special |= {t.content for t in added if t.special}
        self._special = sorted(special - {tokenizer.unk_token}, key=len, reverse=True)
        ids = tokenizer.convert_tokens_to_ids(self._special)
        self._special_ids = frozenset(ids) - {tokenizer.unk_token_id}
        probe = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self._bos: Ids = (bos,) if bos is not None and probe[:1] == [bos] else ()
        self._refuse_double_bos(probe, "tokenizer")

    def encode(self, prompt: Text, responses: tuple[Text, ...]) -> tuple[Ids, list[Ids]]:
        """Prompt ids and the ids of each answer. Raises ValueError for a fault of this row."""
        if isinstance(prompt, list) and self.template == "auto":
            return self._chat(prompt, [r[0] for r in responses])  # type: ignore[misc]
        if isinstance(prompt, list):
            texts = [" " + r[0]["content"] for r in responses]  # type: ignore[index]
            prompt = _transcript(prompt)
        else:
            texts = [str(r) for r in responses]
        eos = (self.tokenizer.eos_token_id,)
        return self._bos + self._end(prompt), [self._start(t) + eos for t in texts]

    def fit(self, prompt: Ids, answers: list[Ids]) -> tuple[Ids, list[Ids], str]:
        """Cuts to `max_tokens`: first the prompt from the left (never its bos), then the answers.

        All answers keep the same prompt. The last item says what was cut: "", "prompt", "answer".
        """
        room = max(self.max_tokens - max(len(a) for a in answers), 1)
        cut = ""
        if len(prompt) > room:
            head = prompt[: len(self._bos)] if prompt[: len(self._bos)] == self._bos else ()
            prompt = head + prompt[len(prompt) - (room - len(head)) :]
            cut = "prompt"
        room = self.max_tokens - len(prompt)
        if any(len(a) > room for a in answers):
            answers, cut = [a[:room] for a in answers], "answer"
        return prompt, answers, cut

    def _ids(self, text: str, split: bool) -> Ids:
        out = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split, verbose=False
        )
        return tuple(out["input_ids"])

    def _plain(self, text: str) -> Ids:
        """`text` with nothing in it read as a control token."""
        ids = self._ids(text, split=True)
        if not self._special_ids.isdisjoint(ids):
            found = [s for s in self._special if s in text]
            raise ValueError(f"text holds {found}, which this tokenizer cannot encode as text")
        return ids

    def _end(self, text: str) -> Ids:
        """Ids of `text`, or of enough of its end when `fit` is sure to cut the rest away."""
        ids = self._plain(text[-self._enough :])
        return ids if len(text) <= self._enough or self._overfull(ids) else self._plain(text)

    def _start(self, text: str) -> Ids:
        ids = self._plain(text[: self._enough])
        return ids if len(text) <= self._enough or self._overfull(ids) else self._plain(text)

    def _overfull(self, ids: Ids) -> bool:
        return len(ids) > self.max_tokens + 64

    def _rendered(self, text: str) -> Ids:
        """Template output: control tokens are read, the hidden ones of the user's text are not."""
        parts = _HIDDEN.split(text)
        ids: Ids = ()
        for i, part in enumerate(parts):
            if part:
                hidden = i % 2
                ids += self._plain(self._special[int(part)]) if hidden else self._ids(part, False)
        return ids

    def _hide(self, message: Message) -> Message:
        content = message["content"]
        for k, token in enumerate(self._special):
            content = content.replace(token, f"\ue000{k}\ue001")
        return {**message, "content": content}

    def _render(self, messages: list[Message], generate: bool) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise DataError(
                "tokenizer: no chat template for conversational rows; set `data: {template: plain}`"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate
                )
            )
        except TemplateError as e:
            raise ValueError(f"chat template refuses the messages: {e}") from None

    def _chat(self, prompt: list[Message], answers: list[Message]) -> tuple[Ids, list[Ids]]:
        prompt = [self._hide(m) for m in prompt]
        before = self._render(prompt, True)
        prompt_ids = self._rendered(before)
        self._refuse_double_bos(prompt_ids, "chat template")
        out = []
        for answer in map(self._hide, answers):
            full = self._render([*prompt, answer], False)
            if not full.startswith(before):
                raise ValueError(
                    "the chat template rewrites the prompt once the answer is added (a thinking "
                    "block or edited history), so the answer cannot be masked; "
                    "use `data: {template: plain}` or another template"
                )
            after = full[len(before) :]
            if answer["content"].strip() not in after:
                raise ValueError("the chat template alters the assistant's text")
            ids = self._rendered(full)
            kept = ids[: len(prompt_ids)] == prompt_ids
            out.append(ids[len(prompt_ids) :] if kept else self._rendered(after))
        return prompt_ids, out

    def _refuse_double_bos(self, ids: Any, who: str) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise DataError(f"{who}: starts with two bos tokens ({bos}), wanted one")


def _transcript(messages: list[Message]) -> str:
    """ "User: ...", "Assistant: ..." paragraphs, ending where the assistant is to speak."""
    turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join([*turns, "Assistant:"])
