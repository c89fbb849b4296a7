"""``ServedModel``: a cluster that serves, and the service's views of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cluster.messages.controller import Explanation
from cluster.queue_room import HeldPlaces
from cluster.reports import ClusterState, ClusterStats
from cluster.serve.bridge import PolledGeneration
from cluster.serve.config import ServeConfig
from cluster.serve.request_settings import Room
from cluster.serve.response_template import response_template_of
from cluster.serve.token_text import TokenTexts
from epslots.errors import ConfigError
from epslots.generation.chat_template import Chat, find_template
from epslots.generation.request_limits import ModelLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate


class ServedCluster(Protocol):
    """The part of a ``Cluster`` that a service uses."""

    tokenizer: PreTrainedTokenizerBase | None

    @property
    def limits(self) -> ModelLimits: ...
    @property
    def end_tokens(self) -> frozenset[int]: ...
    def encode(self, prompt: str | Chat, *, special_tokens: bool = True, most_tokens: int | None = None) -> list[int]: ...
    def hold(self, requests: int) -> HeldPlaces | None: ...
    def submit_choices(
        self, prompt: Sequence[int], *, places: HeldPlaces | None = None, **settings: Any
    ) -> Sequence[PolledGeneration]: ...
    def state(self) -> ClusterState: ...
    def stats(self, layers: Sequence[int] = ()) -> ClusterStats: ...
    def explain(self, group: int = 0) -> Explanation: ...


@dataclass(frozen=True)
class ServedModel:
    """A model that serves, and the views of it that are made once.

    Attributes:
        room: tokens that a request may have.
        texts: of tokens.
        chat: whether there is a chat template.
        response_template: finds tool calls and reasoning; None = there is none.
    """

    cluster: ServedCluster
    tokenizer: PreTrainedTokenizerBase
    room: Room
    texts: TokenTexts
    chat: bool
    response_template: ResponseTemplate | None

    @classmethod
    def of(cls, cluster: ServedCluster, config: ServeConfig, model_type: str) -> ServedModel:
        """Make it; takes a moment.

        Raises:
            ConfigError: the checkpoint has no tokenizer, or the given response template is none.
        """
        tokenizer = cluster.tokenizer
        if tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer, and a service needs one: it answers in text")
        return cls(
            cluster=cluster,
            tokenizer=tokenizer,
            room=Room.of(cluster.limits),
            texts=TokenTexts(tokenizer, cluster.limits.vocabulary),
            chat=config.chat_template is not None or find_template(tokenizer) is not None,
            response_template=response_template_of(tokenizer, model_type, config.response_template),
        )
