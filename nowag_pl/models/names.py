"""Under which name each weight of a model is stored: other programs leave prefixes out, or name things as they like."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The text part of a model for several media; after it stands what the part alone would be called.
_TEXT_PART = re.compile(r"^(model\.)?language_model\.(model\.)?")


def stored_names(model: "PreTrainedModel", stored: Collection[str]) -> dict[str, str]:
    """Return the stored name of each weight of a model, by its name in the model.

    Weights that are not there are left out; what is stored and belongs to no weight keeps its name.

    Args:
        model: a dense model, perhaps on the meta device.
        stored: names in its files.
    """
    names = dict.fromkeys(model.state_dict())
    found = {name: name for name in names if name in stored}
    if len(found) < len(names):
        for name, by_rules in _renamed(model, stored).items():
            if by_rules in names and by_rules not in found:
                found[by_rules] = name
    tied: dict[str, str] = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    for name, owner in tied.items():
        if owner not in found and name in found:
            found[owner] = found.pop(name)
    used = set(found.values())
    return found | {name: name for name in stored if name not in used and name not in found}


def _renamed(model: "PreTrainedModel", stored: Collection[str]) -> dict[str, str]:
    """Return what transformers calls each stored tensor; those that it would join or split are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, renamed = model.state_dict(), {}
    for name in stored:
        alone = _TEXT_PART.sub("model.", name).replace("model.lm_head.", "lm_head.")
        new, converted = rename_source_key(alone, renamings, converters, model.base_model_prefix, state)
        if converted is None:
            renamed[name] = new
    return renamed
