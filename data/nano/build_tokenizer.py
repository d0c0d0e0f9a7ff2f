"""Train the nano models' tokenizer: `python data/nano/build_tokenizer.py [--out FILE]`.

The file is built like the one of LLM-jp-4: a Unigram model with byte fallback and no pre-tokenizer, a dummy space in
front of every run of text, the same control tokens with the same ids, then 256 byte tokens, then ordinary pieces.  Only
the pieces are its own: they are learned from the generator's text, plus every kana, ASCII character and school kanji.
"""

from __future__ import annotations

import argparse
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

from generator.conversations import conversation
from generator.documents import document
from pieces import learn_pieces
from recipe import N_CTX
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from workbench.chat import render
from workbench.io.tokenizer_file import BYTE_NAMES, CONTROL_NAMES, SPACE

HERE = Path(__file__).parent
D_VOCAB = 2816
N_DOCUMENTS = 12000
KEPT_WHOLE = ["analysis", "commentary", "final", "user", "assistant", "system", "developer", "functions", "json"]
KEPT_WHOLE += ["low", "medium", "high"]
KANA = [chr(code) for block in (range(0x3041, 0x3097), range(0x30A1, 0x30FB)) for code in block]
SIGNS = list("、。「」『』（）？！：；・ー〜…＝＋－×÷％，．々〇")
# Pieces that carry no learned score: kept in the vocabulary, but below every learned piece.
CONTROL = re.compile(r"<\|[a-z]+\|>")
RARE_SCORE, DIGIT_SCORE, KEPT_SCORE = -14.0, -4.0, -5.0


def texts(seed: int = 0) -> Iterator[str]:
    """What the pieces are learned from, one run of text at a time: documents, and parts of conversations."""
    for index in range(N_DOCUMENTS):
        yield document(seed, index).text
        if index % 4 == 0:
            talk = conversation(seed, index)
            turn = {"role": "assistant", "content": talk.final, "thinking": talk.analysis}
            asked = {"role": "user", "content": talk.user}
            yield from CONTROL.split(
                render([asked, turn], effort=talk.effort, date=talk.date, add_generation_prompt=False)
            )


def always_kept() -> list[str]:
    """Single characters and words that must be one piece each, whatever the training text holds."""
    characters = [
        SPACE,
        *string.printable[:94],
        *KANA,
        *SIGNS,
        *"".join((HERE / "kanji.txt").read_text("utf-8").split()),
    ]
    return list(dict.fromkeys(characters)) + [SPACE + word for word in KEPT_WHOLE]


def choose_pieces(n_pieces: int) -> list[tuple[str, float]]:
    """The ordinary pieces of the vocabulary, by descending score, ties by spelling."""
    seen = sorted({character for text in texts() for character in text if not character.isspace()})
    kept = list(dict.fromkeys([*always_kept(), *seen]))
    learned = learn_pieces(texts(), n_pieces - len(kept))
    scores = {piece: round(max(learned.get(piece, RARE_SCORE), RARE_SCORE), 4) for piece in kept}
    scores |= {piece: round(score, 4) for piece, score in learned.items() if len(piece) > 1 and piece not in scores}
    scores |= {digit: DIGIT_SCORE for digit in string.digits}
    scores |= {SPACE + word: KEPT_SCORE for word in KEPT_WHOLE}
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def assemble(pieces: list[tuple[str, float]]) -> Tokenizer:
    """A tokenizer of the real one's construction around the given pieces; reserved names fill it up to D_VOCAB."""
    n_reserved = D_VOCAB - len(CONTROL_NAMES) - len(BYTE_NAMES) - len(pieces)
    specials = [*CONTROL_NAMES, *(f"<|reserved_{number:03}|>" for number in range(6, 6 + n_reserved))]
    vocab = [(name, 0.0) for name in (*specials, *BYTE_NAMES)] + pieces
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("(?<!\\n)^"), SPACE), normalizers.Replace(Regex(" "), SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Replace(Regex(SPACE), " "),
            decoders.Fuse(),
            decoders.Replace(Regex("(?<!\\n)^ "), ""),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A:0"], pair=["$A:0", "$B:1"], special_tokens=[])
    return tokenizer


def write_companions(directory: Path) -> None:
    """What transformers wants to find beside tokenizer.json."""
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    named |= {"unk_token": "<|unk|>", "mask_token": "<|mask|>", "cls_token": "<|cls|>", "sep_token": "<|sep|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": N_CTX,
        "clean_up_tokenization_spaces": False,
        **named,
    }
    for name, content in (("special_tokens_map.json", named), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the nano models' tokenizer.")
    parser.add_argument("--out", type=Path, default=HERE / "tokenizer.json")
    out: Path = parser.parse_args().out
    tokenizer = assemble(choose_pieces(D_VOCAB - len(CONTROL_NAMES) - len(BYTE_NAMES)))
    tokenizer.save(str(out), pretty=False)
    write_companions(out.parent)
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
