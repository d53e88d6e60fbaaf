"""An engine's tokenizer with the names of transformers' tokenizers: what :meth:`LLM.get_tokenizer` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_engine.errors import RequestError
from qwen_run.text.chat_template import ChatTemplate
from qwen_run.text.tokenizer import Tokenizer


class HubTokenizer:
    """Text to ids, ids to text, conversations to either, as scripts written for transformers ask for it.

    Attributes:
        eos_token, pad_token, bos_token: as ``tokenizer_config.json`` names them, None where it does not.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, config: Mapping[str, Any]) -> None:
        """
        Args:
            template: None where the engine has none.
            config: what ``tokenizer_config.json`` holds.
        """
        self._tokenizer = tokenizer
        self._template = template
        self.eos_token, self.pad_token, self.bos_token = (
            _content(config.get(name)) for name in ("eos_token", "pad_token", "bos_token")
        )

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included."""
        return self._tokenizer.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of(self.pad_token)

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of(self.bos_token)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self._tokenizer.special_ids)

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True
    ) -> dict[str, list[int] | list[list[int]]]:
        """``input_ids`` and ``attention_mask`` of a text, or of several, without padding."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        every = [self.encode(each, add_special_tokens) for each in text]
        return {"input_ids": every, "attention_mask": [[1] * len(ids) for ids in every]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """
        Raises:
            RequestError: ``text`` came from bytes that are not UTF-8.
        """
        return self._tokenizer.encode(text, add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of one id or of several; bytes that are not UTF-8 become U+FFFD."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(token_id) for token_id in token_ids]
        return self._tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(token_ids, skip_special_tokens) for token_ids in sequences]

    def tokenize(self, text: str) -> list[str | None]:
        """The tokens of ``text`` as the vocabulary spells them."""
        return [self._tokenizer.token(token_id) for token_id in self.encode(text, add_special_tokens=False)]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of tokens as the vocabulary spells them; None for those it does not have."""
        return self._id_of(tokens) if isinstance(tokens, str) else [self._id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """The reverse of :meth:`convert_tokens_to_ids`."""
        return self._tokenizer.token(ids) if isinstance(ids, int) else [self._tokenizer.token(each) for each in ids]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """A conversation, or several, as the model was trained to read them.

        Args:
            conversation: messages, or a list of such lists.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: end with the opening of an answer.
            tokenize: return ids, else text.
            variables: passed to the template, such as ``enable_thinking``.

        Returns:
            A text or a list of ids; a list of either for several conversations.

        Raises:
            RequestError: the engine has no template, or it refuses the messages.
        """
        if self._template is None:
            raise RequestError("the engine has no chat template that can be used; give generate the prompt as text")
        if conversation and not isinstance(conversation[0], Mapping):
            return [
                self.apply_chat_template(each, tools, add_generation_prompt, tokenize, **variables)
                for each in conversation
            ]
        text = self._template.render(conversation, tools, add_generation_prompt, **variables)
        return self._tokenizer.encode(text) if tokenize else text

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_id(token)


def _content(token: Any) -> str | None:
    """A special token, which a config holds as text or as an object around it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
