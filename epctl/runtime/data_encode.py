"""From a record to token ids and which of them are trained on.

Text is learned whole. Of a chat only what the assistant says is, its end-of-turn token included;
the template is the tokenizer's own, so a row is what the model will see when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from epctl.errors import InputError
from epctl.runtime.visual_records import StoredVisual


class Encoded(NamedTuple):
    """Token ids of a document, its images; `trained` is None when all of them are."""

    ids: list[int]
    trained: list[bool] | None
    visuals: tuple[StoredVisual, ...] = ()


class Encoder(Protocol):
    def __call__(
        self, record: Mapping[str, Any], where: str, folder: Path | None = None
    ) -> Encoded:
        """Returns the document; raises InputError, naming `where`, for a record that is none.

        Args:
            folder: what paths in the record are relative to.
        """


class TextEncoder:
    """Plain text, the tokenizer's own special tokens and an end-of-text token after it."""

    def __init__(self, tokenizer: Any, key: str) -> None:
        self.tokenizer = tokenizer
        self.key = key

    def __call__(
        self, record: Mapping[str, Any], where: str, folder: Path | None = None
    ) -> Encoded:
        text = record.get(self.key)
        if not isinstance(text, str):
            raise _wrong_record(record, where, self.key, "text", "data.text_key")
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return Encoded(ids, None)


class ChatEncoder:
    """`messages` records through the chat template.

    A template with `{% generation %}` marks the assistant's tokens itself. Otherwise the text is
    cut where each assistant turn begins and ends, and the pieces are tokenised one by one: at
    those cuts generation starts and stops, so this is how the model will meet the text.
    """

    def __init__(self, tokenizer: Any, key: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template, which `messages` records need",
                hint="give the tokenizer of the chat model with `--tokenizer`, or train on text",
            )
        self.tokenizer = tokenizer
        self.key = key
        self.marks_generation = "{% generation" in str(tokenizer.chat_template)

    def __call__(
        self, record: Mapping[str, Any], where: str, folder: Path | None = None
    ) -> Encoded:
        messages = self.messages(record, where)
        tools = record.get("tools")
        if self.marks_generation:
            return self._by_template(messages, tools)
        ids: list[int] = []
        trained: list[bool] = []
        for text, is_trained in self.segments(messages, tools, where):
            piece = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += piece
            trained += [is_trained] * len(piece)
        return Encoded(ids, trained)

    def messages(self, record: Mapping[str, Any], where: str) -> list[Any]:
        """Returns the record's messages; raises InputError if it has none."""
        messages = record.get(self.key)
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise _wrong_record(record, where, self.key, "a list of messages", "data.messages_key")
        return messages

    def segments(self, messages: list[Any], tools: Any, where: str) -> list[tuple[str, bool]]:
        """Returns the rendered chat as (text, is the assistant's) pieces, in order."""
        full = self._render(messages, tools, prompt=False)
        pieces: list[tuple[str, bool]] = []
        place = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], tools, prompt=True) if index else ""
            through = self._render(messages[: index + 1], tools, prompt=False)
            if not full.startswith(through) or not through.startswith(before):
                raise InputError(
                    f"{where}: the chat template writes turn {index + 1} differently once more "
                    "turns follow, so the assistant's tokens cannot be told apart",
                    hint="use a template with `{% generation %}` marks, or one turn a record",
                )
            pieces += [(full[place : len(before)], False), (full[len(before) : len(through)], True)]
            place = len(through)
        return [(text, mark) for text, mark in [*pieces, (full[place:], False)] if text]

    def _by_template(self, messages: list[Any], tools: Any) -> Encoded:
        result = self.tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return Encoded(list(result["input_ids"]), [bool(m) for m in result["assistant_masks"]])

    def _render(self, messages: list[Any], tools: Any, *, prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def _wrong_record(
    record: Mapping[str, Any], where: str, key: str, wanted: str, setting: str
) -> InputError:
    found = ", ".join(f"`{name}`" for name in list(record)[:8]) or "nothing"
    state = f"is {type(record[key]).__name__}, not {wanted}" if key in record else "is missing"
    return InputError(
        f"{where}: `{key}` {state}; the record has {found}",
        hint=f"name the right key with `--set {setting}=KEY`",
    )
