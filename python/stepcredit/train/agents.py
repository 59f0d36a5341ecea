"""Agents of a pipeline: each a LoRA adapter on one frozen model, or a model of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepcredit.environments.memory import GRAMMARS
from stepcredit.scorer import PolicyScorer
from stepcredit.train.config import TrainConfig
from stepcredit.train.engine import HFEngine
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.policy import load_policy


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent: what it samples with, and what trains it.

    Attributes:
        name: its name.
        model: shared by all agents that are adapters.
        tokenizer: the model's.
        engine: samples its rollouts.
        optimizer: of its own weights alone.
        scorer: its model in training.
        adapter: the LoRA configuration of its adapter, which has the agent's name; None: the whole model is its.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: HFEngine
    optimizer: MasterAdamW
    scorer: PolicyScorer
    adapter: Any = None

    def activate(self) -> None:
        """Make the model this agent, before it samples or learns."""
        if self.adapter is not None:
            require_peft().set_adapter(self.model, self.name)

    def save(self, directory: Path) -> None:
        """Write the agent as `from_pretrained` reads it: PEFT's with an adapter, transformers' with a model."""
        self.activate()
        if self.adapter is None:
            self.model.save_pretrained(directory)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            weights = require_peft().get_peft_model_state_dict(self.model, adapter_name=self.name)
            # PEFT wraps a model it loads an adapter into, and looks for the weights by the wrapper's names.
            named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
            save_file(named, directory / "adapter_model.safetensors")
            self.adapter.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def build_agents(
    config: TrainConfig, texts: Iterable[str], *, device: torch.device, dtype: torch.dtype
) -> dict[str, Agent]:
    """The agents of a run by name, in the order in which they act.

    Args:
        config: `config.memory` says what they are.
        texts: what the tokenizer of "tiny" is trained on; not read otherwise.
        device, dtype: where and in what models compute.

    Raises:
        ImportError: adapters without PEFT.
        ValueError, OSError: a model is not there, or cannot be an agent.
    """
    settings = config.memory
    if settings.agents == "models":
        texts = list(texts)
        names = settings.models or (config.model.name,) * len(GRAMMARS)
        loaded = [load_policy(name, device=device, dtype=dtype, texts=texts, seed=config.seed) for name in names]
        return {
            name: _agent(name, config, *policy, adapter=None) for name, policy in zip(GRAMMARS, loaded, strict=True)
        }
    peft = require_peft()
    model, tokenizer = load_policy(config.model.name, device=device, dtype=dtype, texts=texts, seed=config.seed)
    # The directory of a packaged model, which PEFT does not know by our name. A random one has none.
    base = model.name_or_path or config.model.name
    adapters = {name: _lora(config, base) for name in GRAMMARS}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        torch.manual_seed(config.seed)
        for name, adapter in adapters.items():
            peft.inject_adapter_in_model(adapter, model, name)
    model.eval()
    agents = {}
    for name, adapter in adapters.items():
        peft.set_adapter(model, name)  # which makes its weights, and no others, trainable
        agents[name] = _agent(name, config, model, tokenizer, adapter)
    return agents


def require_peft() -> Any:
    """PEFT's functions for models that it does not wrap, or ImportError with the command that installs it."""
    try:
        import peft.functional
    except ImportError as error:
        raise ImportError("agents that are adapters need the package peft: pip install 'stepcredit[peft]'") from error
    return peft.functional


def _lora(config: TrainConfig, base: str) -> Any:
    from peft import LoraConfig

    settings = config.memory
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear",
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def _agent(
    name: str, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Any
) -> Agent:
    protocol = GRAMMARS[name]
    return Agent(
        name=name,
        model=model,
        tokenizer=tokenizer,
        engine=HFEngine(
            model,
            tokenizer,
            protocol,
            prompt_style=config.environment.prompt,
            max_batch=config.sampling.max_batch,
        ),
        optimizer=MasterAdamW(model, **config.optimizer.adamw()),
        scorer=PolicyScorer(model, tokenizer, protocol),
        adapter=adapter,
    )
