"""Configuration of a memory pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stepcredit._validate import at_least, choices, require
from stepcredit.data.personas import PersonaSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """A memory pipeline of three agents (extraction, profile, retrieval) over conversations, in place of a policy that
    searches passages. Its retrieval agent searches as `environment` says, in turns as `sampling` says.

    Attributes:
        conversations: "personas" (synthetic, built at run time) or a JSON Lines file of conversations; empty: no memory
            pipeline.
        agents: "adapters" (each agent a LoRA adapter on one model, whose own weights stay as they are) or "models"
            (each agent all weights of a model).
        models: of agents=models, the model of each agent in their order (comma-separated); empty: model.name for each.
        rank: of the adapters.
        lora_alpha: of the adapters, which are scaled by lora_alpha / rank.
        extraction_tokens: tokens the extraction agent may write.
        profile_tokens: tokens the profile agent may write.
        judge: of profiles: "facts" (share of the known facts that the profile states), or your own "module:function".
            The module is imported: its code runs with your rights, also when `--resume DIR` reads the name from that
            directory's `config.json`; name only modules you trust.
        extraction_alpha: weight of recall against the Jaccard index in the extraction agent's reward (CoMAM: 0.8).
        retrieval_alpha: the same in the retrieval agent's reward (0.2 is how we read CoMAM's coefficient of 0.2).
        retrieval_scale: factor on the retrieval agent's reward (ours; 0.2 with an alpha of 0.8 is the other reading).
        good: share of the warm start's demonstrations that make no mistakes.
        personas: the synthetic conversations.
    """

    conversations: str = ""
    agents: Literal["adapters", "models"] = "adapters"
    models: tuple[str, ...] = ()
    rank: int = 16
    lora_alpha: int = 32
    extraction_tokens: int = 256
    profile_tokens: int = 128
    judge: str = "facts"
    extraction_alpha: float = 0.8
    retrieval_alpha: float = 0.2
    retrieval_scale: float = 1.0
    good: float = 0.5
    personas: PersonaSettings = field(default_factory=PersonaSettings)

    def __post_init__(self) -> None:
        choices(self, "memory.")
        at_least(self, "memory.", rank=1, lora_alpha=1, extraction_tokens=1, profile_tokens=1, retrieval_scale=0.0)
        for name in ("extraction_alpha", "retrieval_alpha", "good"):
            require(0 <= getattr(self, name) <= 1, f"memory.{name}", "in [0, 1]", getattr(self, name))
        require(len(self.models) in (0, 3), "memory.models", "the names of three models, or empty", self.models)
        rule = "empty unless memory.agents is 'models'"
        require(self.agents == "models" or not self.models, "memory.models", rule, self.models)
