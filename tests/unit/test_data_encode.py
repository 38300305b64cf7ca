"""What is learned of a text and of a chat, token by token."""

from __future__ import annotations

from typing import Any

import pytest

from epctl.errors import InputError
from epctl.runtime.data_encode import ChatEncoder, Encoded, TextEncoder
from epctl.runtime.default_model import EOS, byte_tokenizer

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Like templates that drop the reasoning of earlier turns.
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if loop.last %}{{ m['content'] }}{% else %}-{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def trained_text(tokenizer: Any, encoded: Any) -> list[str]:
    """Runs of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "generation-marks"])
def test_only_assistant_turns_and_their_end_are_trained(template: str) -> None:
    tokenizer = tokenizer_with(template)
    encoded = ChatEncoder(tokenizer, "messages")({"messages": CHAT}, "here")
    assert trained_text(tokenizer, encoded) == ["cd<eos>", "f<eos>"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert encoded.ids == whole
    assert tokenizer.decode(encoded.ids) == (
        "[system]S<eos>[user]ab<eos>[assistant]cd<eos>[user]e<eos>[assistant]f<eos>"
    )


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    encode = ChatEncoder(tokenizer_with(REWRITING), "messages")
    with pytest.raises(InputError, match="here: the chat template writes turn 3 differently"):
        encode({"messages": CHAT}, "here")


def test_no_chat_template_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="no chat template") as caught:
        ChatEncoder(byte_tokenizer(), "messages")
    assert "--tokenizer" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "x"}, "`messages` is missing; the record has `text`"),
        ({"messages": "x"}, "`messages` is str, not a list of messages"),
        ({"messages": [{"content": "x"}]}, "`messages` is list, not a list of messages"),
    ],
)
def test_records_without_messages(record: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="line 7") as caught:
        ChatEncoder(tokenizer_with(PLAIN), "messages")(record, "line 7")
    assert said in str(caught.value)


def test_text_is_learned_whole_and_ends_with_the_end_token() -> None:
    encoded = TextEncoder(byte_tokenizer(), "text")({"text": "hi"}, "here")
    assert encoded == Encoded([104, 105, EOS], None)
    with pytest.raises(InputError, match="`body` is missing; the record has `text`"):
        TextEncoder(byte_tokenizer(), "body")({"text": "hi"}, "here")
