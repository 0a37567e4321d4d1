"""Every family that is served, by Hugging Face's `model_type`."""

from lorax.errors import LoraxError, brief
from lorax.models.families import bert, deberta, gpt2, llama, mpnet
from lorax.models.families.family import Family

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **deberta.FAMILIES,
    **mpnet.FAMILIES,
    **gpt2.FAMILIES,
    **llama.FAMILIES,
}
ENCODERS = tuple(name for name, family in FAMILIES.items() if not family.is_decoder)
DECODERS = tuple(name for name, family in FAMILIES.items() if family.is_decoder)


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
      LoraxError: it is not served.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise LoraxError(
            f"config.json: model_type={brief(model_type)} is not one of: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
