"""What the released checkpoints call the model's parameters."""

TEXT = "language_model."
"""Before every key of the text model where the checkpoint has vision as well."""
VISION = ("vision_model.", "multi_modal_projector.")
_OWN = {"embed.": "model.embed_tokens.", "head.": "lm_head."}


def hf_name(name: str) -> str:
    """Key of a parameter, without the prefix `TEXT`."""
    if name.startswith(VISION):
        return name
    for own, theirs in _OWN.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return "model." + name


def unfused(key: str, expert: int) -> list[str]:
    """Keys of one expert's share of a fused parameter, for checkpoints that store each expert as linear layers.

    Each is stored as (out, in); their transposes, side by side, are the expert's part of the fused parameter.
    """
    layer, _, kind = key.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return [f"{layer}.{expert}.{part}.weight" for part in parts]


def is_fused(key: str) -> bool:
    """Whether the parameter holds all experts of a layer."""
    return key.endswith((".experts.gate_up_proj", ".experts.down_proj"))
