"""Compiled parts for many answers: seconds of compiling once, quicker answers after."""

import time
from typing import TYPE_CHECKING

import torch

from .onednn_linear import one_row, suits

if TYPE_CHECKING:
    from .modeling_pixellm import PixelLMForCausalLM


def compile_for_answers(model: "PixelLMForCausalLM") -> str:
    """Compile what that makes quicker, and try it.

    In float32 on a CPU these are the products of one row with a weight, which decode a token; not the pixel decoder,
    because compiled code cannot go through oneDNN, which is quicker. Elsewhere it is the pixel decoder.

    Returns a sentence: how long it took; or why this machine cannot compile (no C++ compiler, say), and then the model
    is as it was.
    """
    start, decoder = time.perf_counter(), model.pixel_decoder
    try:
        if suits(model.device, model.dtype):
            model.row_kernel = torch.compile(one_row, dynamic=False)
        else:
            decoder.decode_scale = torch.compile(decoder.decode_scale)  # type: ignore[method-assign]
        _try(model)
    # What a compiler raises depends on the compiler; whatever it is, the uncompiled way is left.
    except Exception as error:
        model.row_kernel = None
        vars(decoder).pop("decode_scale", None)
        reason = " ".join(str(error).split())[:300]
        return f"answering uncompiled, because this machine cannot compile the model: {reason}"
    return f"compiled the model in {time.perf_counter() - start:.0f} s"


@torch.inference_mode()
def _try(model: "PixelLMForCausalLM") -> None:
    """Run what was compiled, in every shape that answers have."""
    config, like = model.config, {"device": model.device, "dtype": model.dtype}
    if model.row_kernel is not None:
        layers = [part for part in model.language_model.modules() if isinstance(part, torch.nn.Linear)]
        for layer in {tuple(part.weight.shape): part for part in layers}.values():
            model.row_kernel(torch.zeros(layer.in_features, **like), layer.weight)
        return
    shape = (1, config.text_config.hidden_size, config.grid_size, config.grid_size)
    prepared = model.pixel_decoder.prepare([torch.zeros(shape, **like) for _ in range(config.num_scales)])
    for targets in (1, 2):
        embeddings = torch.zeros(targets, config.num_scales, config.embedding_dim, **like)
        model.pixel_decoder.decode(embeddings, prepared, torch.zeros(1, dtype=torch.long, device=model.device))
