"""Fit a language model into the machine you have, and prove what it cost."""

from packlight.runtime.registration import register_on_import

__version__ = "0.1.0"

# The one thing that importing packlight does: `AutoModelForCausalLM.from_pretrained` then loads its artifacts.
register_on_import()
