"""PixelLM's model: tensors in, tensors out. Importing it registers the Auto classes of transformers."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from .configuration_pixellm import PixelLMConfig
from .modeling_pixellm import PixelLMForCausalLM
from .processing_pixellm import PixelLMProcessor

AutoConfig.register(PixelLMConfig.model_type, PixelLMConfig, exist_ok=True)
AutoModelForCausalLM.register(PixelLMConfig, PixelLMForCausalLM, exist_ok=True)
AutoProcessor.register(PixelLMConfig, PixelLMProcessor, exist_ok=True)
PixelLMConfig.register_for_auto_class()
PixelLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

PixelLMProcessor.register_for_auto_class()

__all__ = ["PixelLMConfig", "PixelLMForCausalLM", "PixelLMProcessor"]
