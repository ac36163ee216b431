"""Prompts: conversations made into the tokens that a model was trained on, within its context."""

from nibble.prompts.conversation import Fitted, clean, fit
from nibble.prompts.templates import FORMS, Template, choose_template

__all__ = ["FORMS", "Fitted", "Template", "choose_template", "clean", "fit"]
