"""What the engine asks of a tokenizer, whatever file it came from. Knows nothing of files, templates or sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids that the tokenizer knows; a model's logits may be longer (padding rows).
        bos_token: id that opens a sequence, or None.
        eos_tokens: every id that ends a generation: end of text, end of turn, end of message.
        template: source of the chat template, or None where the checkpoint brings none.
        special_strings: text of the named special tokens (`bos_token`, `eos_token`, ...) as chat templates expect them.
    """

    vocab_size: int
    bos_token: int | None
    eos_tokens: frozenset[int]
    template: str | None
    special_strings: Mapping[str, str]

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string; lone surrogates count as `?`.
            add_special: add what the model wants around a text (usually BOS in front). A rendered chat template brings
                its own: pass False there.
            parse_special: read `<|im_end|>` and its like in `text` as the control tokens they name. Pass False for
                text that is not trusted to contain them.
            limit: the most tokens that are of use. A text that surely has more is refused at once, by its bytes and the
                longest token, before it costs time and memory; one that passes may still turn out to have more.

        Raises:
            ContextError: the text has more than `limit` tokens.
            UsageError: the text is longer, or has longer runs, than can be tokenized at all.
            CheckpointError: the tokenizer itself fails on the text.
        """
        ...

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Exact bytes that `token` adds to a running text, possibly a part of a UTF-8 character.

        Control tokens, and ids that the tokenizer does not know, add nothing; `special=True` gives a control token's name.
        """
        ...

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of a whole sequence, the inverse of `encode` (the space that some vocabularies put in front is dropped).

        Broken UTF-8 becomes U+FFFD. For pieces of a growing text use `token_bytes`.
        """
        ...

    def close(self) -> None:
        """Free what the tokenizer holds. Idempotent; nothing else may be called afterwards."""
        ...
