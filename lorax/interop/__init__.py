"""Adapters and models in other libraries' formats."""

from lorax.interop.peft import PeftAdapter, load_peft, save_peft

__all__ = ["PeftAdapter", "load_peft", "save_peft"]
