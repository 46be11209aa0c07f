"""Conversations as text and images in order: the same function for training data and for chat requests."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transfusion.config import ChatLayout

PLAIN = ChatLayout("", "", "", "", "", "")  # of a run whose data have no conversations: only the messages themselves
ROLES = {  # name in data and requests -> role of the layout
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message: its role ("system", "user" or "assistant"), and its texts (str) and images (anything else) in order.

    has_loss: whether an answer of the assistant is in the loss; the other roles never are.
    """

    role: str
    content: Sequence[Any]
    has_loss: bool = True


@dataclass(frozen=True)
class ChatPart:
    """A text or an image of a conversation. Each text is encoded apart from its neighbours.

    loss: whether the training loss includes it, if it is text. parse_special: a text of the layout, in which special tokens
    are recognised; in the text of a message they never are.
    """

    content: Any
    loss: bool
    parse_special: bool = False


def lay_out(turns: Sequence[Turn], layout: ChatLayout) -> list[ChatPart]:
    """A whole conversation, as in training data: prefix, content and suffix of each turn.

    The loss includes the content of the assistant and, if it is not blank, its suffix: the model learns one way to end an
    answer, either the suffix or eos. A blank suffix of the last turn is omitted, because eos follows.
    """
    suffixes = [getattr(layout, f"{turn.role}_suffix") for turn in turns]
    if suffixes and not suffixes[-1].strip():
        suffixes[-1] = ""
    return _join(part for turn, suffix in zip(turns, suffixes, strict=True) for part in _surround(turn, layout, suffix))


def lay_out_prompt(turns: Sequence[Turn], layout: ChatLayout) -> list[ChatPart]:
    """The prompt of a chat request: all turns, and the prefix of the answer."""
    parts = [part for turn in turns for part in _surround(turn, layout, getattr(layout, f"{turn.role}_suffix"))]
    return _join([*parts, ChatPart(layout.assistant_prefix, False, parse_special=True)])


def _surround(turn: Turn, layout: ChatLayout, suffix: str) -> Iterator[ChatPart]:
    has_loss = turn.role == "assistant" and turn.has_loss
    yield ChatPart(getattr(layout, f"{turn.role}_prefix"), False, parse_special=True)
    for content in turn.content:
        yield ChatPart(content, has_loss)
    yield ChatPart(suffix, has_loss and not suffix.isspace(), parse_special=True)


def _join(parts: Iterable[ChatPart]) -> list[ChatPart]:
    """Without empty texts; adjacent texts of messages with the same loss are one text."""
    joined: list[ChatPart] = []
    for part in parts:
        if not isinstance(part.content, str):
            joined.append(part)
        elif joined and _is_message_text(joined[-1]) and _is_message_text(part) and joined[-1].loss == part.loss:
            joined[-1] = replace(part, content=joined[-1].content + part.content)
        elif part.content:
            joined.append(part)
    return joined


def _is_message_text(part: ChatPart) -> bool:
    return isinstance(part.content, str) and not part.parse_special


def list_roles(layout: ChatLayout) -> list[tuple[str, str, str]]:
    """Role, prefix and suffix of each role."""
    names = dict.fromkeys(ROLES.values())
    return [(role, getattr(layout, f"{role}_prefix"), getattr(layout, f"{role}_suffix")) for role in names]


def describe_layout(layout: ChatLayout) -> str:
    """In one line: system '' ... '\\n', user '' ... '\\n', assistant '' ... '\\n'."""
    return ", ".join(f"{role} {prefix!r} ... {suffix!r}" for role, prefix, suffix in list_roles(layout))
