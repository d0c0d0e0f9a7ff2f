"""Conversations with LLM-jp-4: render them to text or token ids, parse them back, label every token."""

from workbench.chat.messages import Message, ToolCall, as_day
from workbench.chat.parse import ParsedMessage, label_tokens, parse
from workbench.chat.render import render, render_tokens
from workbench.chat.template import harmony_template

__all__ = [
    "Message",
    "ParsedMessage",
    "ToolCall",
    "as_day",
    "harmony_template",
    "label_tokens",
    "parse",
    "render",
    "render_tokens",
]
