"""Texts that the model reads: prompts as they are, or in the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppo_fast.loop.data.packages import TaskError
from ppo_fast.loop.data.prompts import Messages, Prompt, Row
from ppo_fast.loop.values import described


def rendered(rows: list[Row], tokenizer: Any, chat: bool, system: str | None) -> list[Prompt]:
    """The rows with their texts.

    Messages, and under `chat` or with a `system` message texts too, become what the tokenizer's
    chat template makes of them, up to where the answer begins. A system message goes before those
    of the row, unless they begin with one.

    Raises TaskError for a tokenizer without a template and for messages that it refuses.
    """
    wanted = "chat" if chat else None if system is None else "system"
    messages = any(not isinstance(row.prompt, str) for row in rows)
    if (wanted or messages) and not tokenizer.chat_template:
        raise TaskError(
            f"{wanted or 'a prompt of messages'} needs a tokenizer with a chat template, got one"
            " without"
        )
    render = _renderer(tokenizer)
    out = []
    for i, row in enumerate(rows):
        if isinstance(row.prompt, str) and not wanted:
            out.append(Prompt(row.prompt, row))
            continue
        try:
            out.append(Prompt(render(_messages(row, system)), row))
        except Exception as error:  # a template's own code, and its own errors
            raise TaskError(
                f"prompts[{i}]: the chat template raised {described(error)}"
            ) from error
    return out


def context(prompt: str | Messages, tokenizer: Any) -> str:
    """The text of a prompt as another model's tokenizer has it, up to where the answer begins.

    Messages without a template are their contents, one a line.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template:
        return _renderer(tokenizer)(prompt)
    return "".join(f"{message['content']}\n" for message in prompt)


def _messages(row: Row, system: str | None) -> Messages:
    own = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    if system is None or own[0]["role"] == "system":
        return own
    return [{"role": "system", "content": system}, *own]


def _renderer(tokenizer: Any) -> Callable[[Messages], str]:
    # A template writes the BOS that the tokenizer then adds once more.
    bos = tokenizer.bos_token or ""
    added = bool(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    def render(messages: Messages) -> str:
        full: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return full.removeprefix(bos) if added else full

    return render
