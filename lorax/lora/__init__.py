"""The heart: LoRA trees as pure functions of pytrees."""

from lorax.lora.adapter import LoraTree, init
from lorax.lora.adapter_stack import Adapters, stack_adapters
from lorax.lora.count import count_bytes, count_lora_params, count_params
from lorax.lora.linen_model import linen_apply
from lorax.lora.masks import combine, mask_of, split, trainable_mask
from lorax.lora.merge import delta, merge, scales_of, unmerge
from lorax.lora.nnx_model import LoraParam, adapt, kernel_axes
from lorax.lora.pad import pad, unpad
from lorax.lora.per_example import LoraRows, adapt_rows
from lorax.lora.spec import LoraSpec
from lorax.lora.stack import stack, union, unstack
from lorax.lora.targets import Target, resolve

__all__ = [
    "Adapters",
    "LoraParam",
    "LoraRows",
    "LoraSpec",
    "LoraTree",
    "Target",
    "adapt",
    "adapt_rows",
    "combine",
    "count_bytes",
    "count_lora_params",
    "count_params",
    "delta",
    "init",
    "kernel_axes",
    "linen_apply",
    "mask_of",
    "merge",
    "pad",
    "resolve",
    "scales_of",
    "split",
    "stack",
    "stack_adapters",
    "trainable_mask",
    "union",
    "unmerge",
    "unpad",
    "unstack",
]
