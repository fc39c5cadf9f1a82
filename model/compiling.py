"""Compiled parts for many answers: seconds of compiling once, quicker answers after."""

import time

import torch

from .modeling_base import PixelLMPreTrainedModel
from .onednn_linear import is_supported, multiply_vector


def compile_for_answers(model: PixelLMPreTrainedModel) -> str:
    """Compile what that makes quicker, and try it.

    In float32 on a CPU that is the product of a vector and a weight, which decodes a token; not the pixel decoder, for
    which oneDNN is quicker. Elsewhere it is the pixel decoder.

    Returns a sentence: how long it took; or why this machine cannot compile (no C++ compiler, say), and then the model
    is as it was.
    """
    start, decoder = time.perf_counter(), model.pixel_decoder
    try:
        if is_supported(model.device, model.dtype):
            model.vector_kernel = torch.compile(multiply_vector, dynamic=False)
        else:
            decoder.decode_scale = torch.compile(decoder.decode_scale)  # type: ignore[method-assign]
        _try(model)
    # What a compiler raises depends on the compiler; whatever it is, the uncompiled way is left.
    except Exception as error:
        model.vector_kernel = None
        vars(decoder).pop("decode_scale", None)
        reason = " ".join(str(error).split())[:300]
        return f"answering uncompiled, because this machine cannot compile the model: {reason}"
    return f"compiled the model in {time.perf_counter() - start:.0f} s"


@torch.inference_mode()
def _try(model: PixelLMPreTrainedModel) -> None:
    """Run what was compiled, in every shape that answers have."""
    config, like = model.config, {"device": model.device, "dtype": model.dtype}
    if model.vector_kernel is not None:
        layers = [part for part in model.language_model.modules() if isinstance(part, torch.nn.Linear)]
        for layer in {tuple(part.weight.shape): part for part in layers}.values():
            model.vector_kernel(torch.zeros(layer.in_features, **like), layer.weight)
        return
    shape = (1, config.text_config.hidden_size, config.grid_size, config.grid_size)
    prepared = model.pixel_decoder.prepare([torch.zeros(shape, **like) for _ in range(config.num_scales)])
    for targets in (1, 2):
        embeddings = torch.zeros(targets, config.num_scales, config.embedding_dim, **like)
        model.pixel_decoder.decode(embeddings, prepared, torch.zeros(1, dtype=torch.long, device=model.device))
