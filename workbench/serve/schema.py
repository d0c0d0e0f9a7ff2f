"""Requests and answers as OpenAI's API has them, with the workbench's own fields. Unknown fields are refused.

Fields of OpenAI's that cannot change an answer here are taken and have no effect; those that would, and that this
server does not do, are taken at their neutral value alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from workbench.axes import EFFORTS, LANGUAGES
from workbench.models.sampling import MOST_BIAS

Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
NO_EFFECT = "Taken, and without effect."
MOST_TOP = 20


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class InterventionDocument(Body):
    """As in docs/interventions.md; tensors are nested lists."""

    format: Literal[1]
    interventions: list[dict[str, Any]]


class StreamOptions(Body):
    include_usage: bool | None = None


class Common(Body):
    """What both kinds of request have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="-1 or 0: all tokens.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="On ids of the prompt and the answer.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="On ids of the answer.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="On ids of the answer.")
    logit_bias: dict[str, Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]] | None = Field(
        None, description="By token id."
    )
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    n: int | None = Field(None, ge=1, le=128)
    intervention: InterventionDocument | None = None
    lang: Literal[LANGUAGES] | None = Field(None, description="For interventions limited by language.")  # type: ignore[valid-type]
    routing: bool | None = Field(None, description="Return which experts every token used.")
    user: str | None = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description=NO_EFFECT)
    metadata: dict[str, str] | None = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class Call(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None


class FunctionTool(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, description="Reasoning included. Default: what fits.")
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    max_thinking_tokens: int | None = Field(None, ge=0, description="Then the reasoning is closed.")
    reasoning_effort: Literal[EFFORTS] | None = Field(None, description="Default medium.")  # type: ignore[valid-type]
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = Field(None, description="Default today.")


class CompletionRequest(Common):
    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=0, description="Default 16; 0 reads the prompt and writes nothing.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    add_special_tokens: bool | None = Field(None, description="Begin text prompts with <|startoftext|>. Default true.")
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class Answer(BaseModel):
    """Answers may hold more than is said here only where `extra` allows it."""

    model_config = ConfigDict(extra="forbid")


class ReasoningDetails(Answer):
    reasoning_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: ReasoningDetails | None = None


class Packed(Answer):
    dtype: str
    shape: list[int]
    data: str


class RoutingRecord(Answer):
    """Experts and weights [pos layer k] of every token, the last one included; see docs/serving.md."""

    format: Literal[1]
    layers: list[int]
    n_experts: int
    k: int
    n_prompt: int
    token_ids: list[int]
    expert_ids: Packed
    routing_weights: Packed


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    reasoning_content: list[TokenLogprob]
    refusal: None


class AnsweredCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AnsweredMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None
    routing: RoutingRecord | None = None


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None
    routing: RoutingRecord | None = None


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Answer):
    status: Literal["ok", "stopping", "failed"]
    running: int
    waiting: int


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    error: ErrorDetail
