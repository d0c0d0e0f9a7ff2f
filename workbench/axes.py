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

# What a token is written in; "mixed" is several of these, or letters of another script; "byte" is a lone UTF-8 byte.
TOKEN_CLASSES = ("kanji", "hiragana", "katakana", "latin", "digit", "punct", "space", "special", "byte", "mixed")

# The halves of the prompt groups, by a hash of group_id: choose on one, test on the other.
SPLITS = ("discovery", "validation")

# One row per token.  doc_id is unique per rendered sequence, group_id is shared by what says the same thing
# (both languages, all efforts); script is the writing of the prompt ("std", "romaji", ...); phase is "prefill" for what
# was given to the model and "decode" for what it wrote.  segment_index numbers the runs of one segment in a sequence,
# pos_in_segment the tokens within such a run, both from 0; word_initial is False where a token continues a word.
TOKEN_COLUMNS = (
    "doc_id",
    "group_id",
    "split",
    "topic",
    "lang",
    "script",
    "effort",
    "pos",
    "token_id",
    "token",
    "token_class",
    "word_initial",
    "segment",
    "segment_index",
    "pos_in_segment",
    "phase",
)

# One row per (token, layer); expert_ids, routing_weights and expert_norms are lists of length k, by descending weight.
# Over all experts: router_entropy and router_lse (logsumexp of the logits); router_mass is the probability of all k
# chosen, so that with renormalised weights g the full softmax of a chosen expert is g * mass and its logit
# log(g * mass) + lse.  Euclidean norms, null unless asked for: expert_norms of g_e E_e(x), mlp_in_norm of x,
# mlp_out_norm of their sum.
ROUTING_COLUMNS = (
    "doc_id",
    "pos",
    "layer",
    "expert_ids",
    "routing_weights",
    "router_entropy",
    "router_margin",
    "router_lse",
    "router_mass",
    "expert_norms",
    "mlp_in_norm",
    "mlp_out_norm",
)
