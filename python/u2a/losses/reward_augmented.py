"""Reward-augmented DPO: every scored pair becomes goal-conditioned pairs; a data transform.

Under the goal of the chosen answer's score the chosen answer wins, under the rejected one's score
the rejected answer does; plain DPO on both, and the top goal at inference. Recipe: beta 0.01,
label smoothing 0.3, lr 5e-7, one epoch. Source: arXiv 2410.08067.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from u2a.schemas import Text

TEMPLATE = "Give an answer whose quality is rated {score:g} on a scale from 1 to 10."


def with_goal(prompt: Text, score: float, template: str = TEMPLATE) -> Text:
    """The prompt with the goal as a system message, or as its first paragraph if it is text.

    A system message that is there already keeps its text, the goal after it.
    """
    goal = template.format(score=score)
    if isinstance(prompt, str):
        return f"{goal}\n\n{prompt}"
    if prompt and prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{goal}"}, *prompt[1:]]
    return [{"role": "system", "content": goal}, *prompt]


def reward_augmented(
    rows: Iterable[dict[str, Any]], *, template: str = TEMPLATE
) -> Iterator[dict[str, Any]]:
    """Preference rows with `chosen_score` and `rejected_score` -> goal-conditioned preference rows.

    Two per row, or the first alone where the scores are equal (the goals would contradict each
    other). Other columns are kept. Raises ValueError naming the row and the missing column.
    """
    for i, row in enumerate(rows):
        missing = {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"} - row.keys()
        if missing:
            raise ValueError(f"row {i}: column {min(missing)!r} missing, has {sorted(row)}")
        high, low = float(row["chosen_score"]), float(row["rejected_score"])
        yield {**row, "prompt": with_goal(row["prompt"], high, template)}
        if high != low:
            yield {
                **row,
                "prompt": with_goal(row["prompt"], low, template),
                "chosen": row["rejected"],
                "rejected": row["chosen"],
                "chosen_score": low,
                "rejected_score": high,
            }
