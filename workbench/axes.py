"""The glossary as code: axis names, segment labels and frame columns, each spelled in one place.

Axes:    batch pos layer head kv_head expert k d_model d_head d_mlp d_expert d_vocab query_pos key_pos
Tensors: router tensors are [batch pos expert], routed tensors [batch pos k ...].
Frames:  `tokens` has one row per token, `routing` one row per (token, layer) with list columns for the k slots.
"""

LANGUAGES = ("ja", "en")
EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")

# Every token of a rendered sequence carries exactly one of these. "control" is the Harmony scaffolding (<|start|>, role
# and channel names, <|message|>, <|end|> ...); "tool" is a tool's answer; "plain" is text outside any chat.
SEGMENTS = ("bos", "system", "developer", "user", "analysis", "commentary", "final", "tool", "control", "plain")

# One row per token.  doc_id is unique per rendered sequence, group_id is shared by what says the same thing
# (both languages, all efforts); phase is "prefill" for tokens given to the model and "decode" for tokens it wrote.
TOKEN_COLUMNS = (
    "doc_id",
    "group_id",
    "topic",
    "lang",
    "effort",
    "pos",
    "token_id",
    "token",
    "segment",
    "phase",
)

# One row per (token, layer); expert_ids and routing_weights are lists of length k, by descending weight.
ROUTING_COLUMNS = (
    "doc_id",
    "pos",
    "layer",
    "expert_ids",
    "routing_weights",
    "router_entropy",
    "router_margin",
)
