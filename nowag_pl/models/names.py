"""Under which name each weight of a model is stored: other programs leave prefixes out, or name things as they like."""

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from nowag_pl.models.experts import fused_places
from nowag_pl.modules.experts import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The text part of a model for several media; after it stands what the part alone would be called.
_TEXT_PART = re.compile(r"^(model\.)?language_model\.(model\.)?")
# The number of an expert in the name of one of its linears.
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def stored_names(model: "PreTrainedModel", stored: Collection[str]) -> dict[str, str]:
    """Return the stored name of each weight of a model, by its name in the model.

    Weights of experts may share a stored tensor, in which :func:`~nowag_pl.models.experts.fused_places` tells their
    places; in other files each has its own.

    Weights that are not there are left out; what is stored and belongs to no weight keeps its name.

    Args:
        model: a dense model, perhaps on the meta device.
        stored: names in its files.
    """
    names = dict.fromkeys(model.state_dict())
    places = fused_places(model)
    parts: dict[str, list[str]] = {}
    for name, (whole, _) in places.items():
        parts.setdefault(whole, []).append(name)
    found = {name: name for name in names if name in stored}
    found |= {name: whole for name, (whole, _) in places.items() if whole in stored and name not in found}
    if len(found) < len(names):
        for name, by_rules in _renamed(model, stored, places).items():
            for own in parts.get(by_rules, [by_rules]):
                if own in names and own not in found:
                    found[own] = name
    tied: dict[str, str] = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    for name, owner in tied.items():
        if owner not in found and name in found:
            found[owner] = found.pop(name)
    used = set(found.values())
    return found | {name: name for name in stored if name not in used and name not in found}


def _renamed(
    model: "PreTrainedModel", stored: Collection[str], places: Mapping[str, tuple[str, Place]]
) -> dict[str, str]:
    """Return what transformers calls each stored tensor.

    Those that it would join or split are left out, but for the linears of experts, which are called by their own name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    numbers = {pattern: number for rule in converters for number, pattern in enumerate(rule.source_patterns)}
    state = model.state_dict() | {whole: whole for whole, _ in places.values()}
    by_place = {(whole, place.expert, place.part or 0): name for name, (whole, place) in places.items()}
    renamed = {}
    for name in stored:
        alone = _TEXT_PART.sub("model.", name).replace("model.lm_head.", "lm_head.")
        new, pattern = rename_source_key(alone, renamings, converters, model.base_model_prefix, state)
        expert = _EXPERT.search(name)
        if pattern is None:
            renamed[name] = new
        elif expert is not None and (part := by_place.get((new, int(expert[1]), numbers[pattern]))):
            renamed[name] = part
    return renamed
