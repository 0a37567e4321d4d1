"""LoRA by PEFT and PyTorch: the peer that lorax is compared with.

It takes a trial's config and the batches of `lorax.data`; all else is PEFT's, PyTorch's and
transformers' own: model, adapter, loss, gradients, clipping, AdamW, schedule.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from lorax import data
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.models import resolve_source
from lorax.train.dataset import Dataset

TARGETS = {"qv": ["query", "value"], "qkvo": ["query", "key", "value", "attention.output.dense"]}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class MeanPooled(torch.nn.Module):
    """An encoder, the mean over real tokens, and a linear head drawn from normal(0.02)."""

    def __init__(self, encoder: torch.nn.Module, width: int, num_outputs: int):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(width, num_outputs)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Outputs (B, outputs)."""
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class PeftTrainer:
    """One LoRA trial in PyTorch.

    Args:
      config: the trial; LoRA on `qv` or `qkvo`, mean pooling, no dropout, fp32.
      kind: `classification` or `regression`.
      num_outputs: of the head.
      total_steps: of the schedule.
      adapter: a folder in PEFT's format to start from; None draws as PEFT does, by the seed.
      head: `kernel` and `bias` to start from, in lorax's layout; None draws by the seed.
    """

    def __init__(
        self,
        config: TrialConfig,
        kind: str,
        num_outputs: int,
        total_steps: int,
        *,
        adapter: Path | None = None,
        head: Mapping[str, Any] | None = None,
    ):
        _check(config)
        torch.manual_seed(config.seed)
        self.kind, self.clip_norm = kind, config.optimizer.clip_norm
        base = _encoder(config)
        encoder = _adapted(base, config) if adapter is None else _loaded(base, adapter)
        self.model = MeanPooled(encoder, base.config.hidden_size, num_outputs)
        if head is not None:
            _set_head(self.model.head, head)
        self.optimizer = _adamw(self.model, config)
        warmup = math.ceil(config.optimizer.warmup_ratio * total_steps)
        self.schedule = transformers.get_linear_schedule_with_warmup(
            self.optimizer, warmup, total_steps
        )

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """One optimizer step; the mean loss over the batch's real examples."""
        self.model.train()
        loss = self._loss(batch)
        loss.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trainable(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def predict(self, dataset: Dataset, encoded: data.Encoded, batch_size: int) -> np.ndarray:
        """Outputs for a whole split, (n, outputs), in the split's order."""
        self.model.eval()
        by_length = np.argsort(encoded.lengths, kind="stable")
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(encoded), batch_size):
                indices = by_length[start : start + batch_size]
                batch = data.pad(encoded, indices, dataset.pad_id)
                outputs.append(self._outputs(batch).numpy())
        return np.concatenate(outputs)[np.argsort(by_length, kind="stable")]

    def _outputs(self, batch: Mapping[str, np.ndarray]) -> torch.Tensor:
        return self.model(**{name: torch.from_numpy(batch[name]).long() for name in INPUTS})

    def _loss(self, batch: Mapping[str, np.ndarray]) -> torch.Tensor:
        outputs, labels = self._outputs(batch), torch.from_numpy(batch["labels"])
        weights = torch.from_numpy(batch["weights"])
        if self.kind == "regression":
            losses = torch.nn.functional.mse_loss(outputs[:, 0], labels, reduction="none")
        else:
            losses = torch.nn.functional.cross_entropy(outputs, labels.long(), reduction="none")
        return (weights * losses).sum() / weights.sum()

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def _check(config: TrialConfig) -> None:
    served = {
        "lora.targets": config.lora.targets in TARGETS,
        "lora.scaling": config.lora.scaling in ("lora", "rslora"),
        "lora.dropout": config.lora.dropout == 0,
        "model.dropout": config.model.dropout == 0,
        "model.pooling": config.model.pooling == "mean",
        "train.precision": config.train.precision == "fp32",
        "optimizer.head_lr": config.optimizer.head_lr is None,
        "optimizer.schedule": config.optimizer.schedule == "linear",
    }
    if refused := [name for name, is_served in served.items() if not is_served]:
        raise LoraxError(f"the comparison with PEFT does not serve this {', '.join(refused)}")


def _encoder(config: TrialConfig) -> Any:
    folder = resolve_source(config.model.source, config.model.revision, weights=True)
    return transformers.AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _adapted(base: Any, config: TrialConfig) -> Any:
    lora = config.lora
    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.scaling == "rslora",
        target_modules=TARGETS[lora.targets],
    )
    return peft.get_peft_model(base, options)


def _loaded(base: Any, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)


def _set_head(layer: torch.nn.Linear, head: Mapping[str, Any]) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.asarray(head["kernel"]).T.copy()))
        layer.bias.copy_(torch.tensor(np.asarray(head["bias"])))


def _adamw(model: torch.nn.Module, config: TrialConfig) -> torch.optim.AdamW:
    o = config.optimizer
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trained if name.endswith("bias") == is_bias],
            "weight_decay": w,
        }
        for is_bias, w in ((False, o.weight_decay), (True, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)
