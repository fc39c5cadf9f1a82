"""The parts wired together, as training and generation share them: images, sequences and masks on their way.

Axes: B images, C conversations, T tokens, P positions after images took their places, Q targets, S scales, K tokens per
scale, H language width, D embedding width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_pixellm import PixelLMConfig
from .geometry import valid_cells
from .onednn_linear import VectorKernel
from .pixel_decoder import PixelDecoder
from .prefix_sharing import PACKING_ATTENTION, pack_sequences
from .projector import Projector
from .seg_codebook import SegCodebook
from .structures import IGNORE_TOKEN, TOWER_KEY
from .vision_tower import VisionTower, vision_model_from_config

ALIGNMENT = 64  # bytes; what torch's own allocations have on a CPU


@dataclass(frozen=True)
class Prefix:
    """What prompts about one image begin with, as the language model remembers it.

    layers: keys and values of each layer, (heads, positions that may be attended to, channels). length: positions it
    takes, padded ones included.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    length: int

    @property
    def width(self) -> int:
        """Positions that are remembered."""
        return self.layers[0][0].shape[1]


PrefixKey = tuple[int, tuple[int, ...]]
"""An image's number and the ids of a prefix."""


@dataclass
class EncodedImages:
    """Images after the vision tower, and what was computed from them so far, so that it is computed once.

    features: S times (B, patches, vision width). image_tokens: (B, N, H) for the language model.
    image_token_mask: (B, N) bool, False where a token lies wholly in the padding.
    maps: S feature maps (B, H, grid, grid) for the pixel decoder, made for the first mask. decoder_maps: what the
    decoder made of them, kept where no gradient is wanted. prefixes: what the language model remembers of the
    beginnings of prompts about these images, kept by the decoding loop.
    """

    features: list[torch.Tensor]
    image_tokens: torch.Tensor
    image_token_mask: torch.Tensor
    maps: list[torch.Tensor] | None = None
    decoder_maps: list[torch.Tensor] | None = None
    prefixes: dict[PrefixKey, Prefix] = field(default_factory=dict)


@dataclass
class MultimodalSequences:
    """Conversations in which every placeholder was replaced by the positions of its image, right-padded.

    ids: (C, P), the placeholder id standing for every image position. embeddings: (C, P, H). attention_mask: (C, P)
    bool. labels: (C, P) or None. Positions are counted from 0 over all of a sequence, masked ones included
    (docs/facts.md, M7).
    """

    ids: torch.Tensor
    embeddings: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None


class PixelLMPreTrainedModel(PreTrainedModel):
    """A language model, a vision tower and the parts that masks need, without losses and generation.

    Args:
        config: shapes and numerics.
        language_model, vision_model: finished transformers models to carry; made from the config where not given.
    """

    config_class = PixelLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    prefix_sharing = True
    vector_kernel: VectorKernel | None = None  # compiled, where `compiling.compile_for_answers` could

    def __init__(
        self,
        config: PixelLMConfig,
        language_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(text, attn_implementation=config._attn_implementation)
        if vision_model is None:
            vision_model = vision_model_from_config(vision, config._attn_implementation)
        self.language_model = language_model
        self.vision_tower = VisionTower(vision_model, config.vision_feature_layers)
        self.projector = Projector(vision.hidden_size, text.hidden_size)
        self.mask_projector = Projector(vision.hidden_size, text.hidden_size)
        self.codebook = SegCodebook(
            text.hidden_size,
            config.embedding_dim,
            config.num_scales,
            config.tokens_per_scale,
            fusion_value=config.token_fusion_value,
            learned=config.token_fusion == "learned",
        )
        self.pixel_decoder = PixelDecoder(
            text.hidden_size,
            config.embedding_dim,
            config.num_scales,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            mlp_width=config.decoder_mlp_dim,
            num_mask_tokens=config.decoder_num_mask_tokens,
            scale_value=config.scale_fusion_value,
            learned=config.scale_fusion == "learned",
        )
        for part in (self.projector, *self.mask_parts()):
            for module in part.modules():
                module._is_own_part = True  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, but weights at odd addresses of a mapped file are copied.

        Kernels round by alignment: the same weights would give another last digit than where they were trained.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded

    def mask_parts(self) -> tuple[nn.Module, ...]:
        """The modules that only masks need."""
        return self.mask_projector, self.codebook, self.pixel_decoder

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let every layer of the language model be compiled when it is first used, and once more for any length.
        Names of parameters stay what they are.
        """
        for layer in self.language_model.get_decoder().layers:
            layer.compile(backend=backend)

    @property
    def trains_masks(self) -> bool:
        return any(parameter.requires_grad for part in self.mask_parts() for parameter in part.parameters())

    def _init_weights(self, module: nn.Module) -> None:
        """Our own parts start as torch would start them; the language model and the tower as their own classes say."""
        if getattr(module, "_is_own_part", False):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_images(self, pixel_values: dict[str, torch.Tensor], resized_sizes: torch.Tensor) -> EncodedImages:
        """Run the vision tower and make the image tokens, once per image.

        Args:
            pixel_values: (B, 3, P, P), P the side of the square, under TOWER_KEY. resized_sizes: (B, 2) sizes of the
                images inside their squares.
        """
        config = self.config
        features = self.vision_tower(pixel_values[TOWER_KEY], resized_sizes)
        grid = (config.grid_size, config.grid_size)
        pooled = features[0]
        if config.image_token_pool > 1:
            square = pooled.transpose(1, 2).unflatten(2, grid).float()
            # Averaging the window equals the release's bilinear resize (docs/facts.md, M8) at a factor of 2 only.
            pooled = F.avg_pool2d(square, config.image_token_pool).flatten(2).transpose(1, 2).to(pooled.dtype)
        cell = config.patch_size * config.image_token_pool
        mask = valid_cells(resized_sizes.to(pooled.device), config.image_token_grid, cell)
        return EncodedImages(features, self.projector(pooled), mask)

    def feature_maps(self, images: EncodedImages) -> list[torch.Tensor]:
        """The pixel decoder's S maps (B, H, grid, grid), projected once per set of images."""
        if images.maps is None:
            grid = (self.config.grid_size, self.config.grid_size)
            images.maps = [self.mask_projector(f).transpose(1, 2).unflatten(2, grid) for f in images.features]
        return images.maps

    def merge_multimodal_embeddings(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        images: EncodedImages,
        image_index: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> MultimodalSequences:
        """Embed sequences and put each image's tokens in the place of its placeholder; without one, text alone.

        Args:
            input_ids, attention_mask, labels: (C, T). image_index: (C,) which image a sequence is about.

        Raises:
            ValueError: a sequence holds more than one placeholder.
        """
        is_image = input_ids == self.config.image_token_id
        if bool((is_image.sum(dim=1) > 1).any()):
            raise ValueError("a conversation holds more than one <image> placeholder; expected at most one")
        positions_per_image = images.image_tokens.shape[1]
        widths = torch.where(is_image, positions_per_image, 1)
        ends = widths.cumsum(dim=1)
        length = int(ends[:, -1].max())
        targets = torch.arange(length, device=input_ids.device).expand(len(input_ids), -1).contiguous()
        source = torch.searchsorted(ends, targets, right=True)
        beyond = source >= input_ids.shape[1]  # sequences without an image end earlier
        source = source.clamp(max=input_ids.shape[1] - 1)
        ids = input_ids.gather(1, source)
        in_image = is_image.gather(1, source)
        place = (targets - (ends - widths).gather(1, source)).clamp(max=positions_per_image - 1)
        images_of_places = image_index[:, None].expand_as(place)
        text = self.get_input_embeddings()(ids.masked_fill(in_image, 0))
        image = images.image_tokens[images_of_places, place].to(text.dtype)
        embeddings = torch.where(in_image[..., None], image, text)
        mask = torch.where(
            in_image, images.image_token_mask[images_of_places, place], attention_mask.bool().gather(1, source)
        )
        expanded_labels = None
        if labels is not None:
            expanded_labels = labels.gather(1, source).masked_fill(in_image | beyond, IGNORE_TOKEN)
        return MultimodalSequences(ids.masked_fill(beyond, 0), embeddings, mask & ~beyond, expanded_labels)

    def decode_masks(
        self, group_states: torch.Tensor, images: EncodedImages, image_of_target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the states of seg groups to masks; training, segmentation and generation all go through here.

        Args:
            group_states: (Q, S * K, H) hidden states that predict the tokens of each group.
            image_of_target: (Q,) long, the image of each.

        Returns:
            (Q, S, D) embeddings and (Q, h, w) mask logits over the square.
        """
        embeddings = self.codebook(group_states)
        if torch.is_grad_enabled():
            return embeddings, self.pixel_decoder(embeddings, self.feature_maps(images), image_of_target)
        if images.decoder_maps is None:
            images.decoder_maps = self.pixel_decoder.prepare(self.feature_maps(images))
        logits = self.pixel_decoder.decode_in_chunks(embeddings, images.decoder_maps, image_of_target)
        return embeddings, logits

    @property
    def shares_prefixes(self) -> bool:
        """Whether conversations are packed into one sequence that holds the beginning they share once.

        Not with an attention that takes no mask of its own, nor with one that looks back over a limited window only.
        """
        text = self.config.text_config
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        return self.prefix_sharing and text._attn_implementation in PACKING_ATTENTION and window is None

    def hidden_states(self, sequences: MultimodalSequences, image_index: torch.Tensor) -> torch.Tensor:
        """(C, P, H) states of the language model after its final norm; those of padding mean nothing."""
        decoder = self.language_model.get_decoder()
        if not self.shares_prefixes:
            positions = torch.arange(sequences.ids.shape[1], device=sequences.ids.device)[None]
            return decoder(
                inputs_embeds=sequences.embeddings,
                attention_mask=sequences.attention_mask.long(),
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
        packed = pack_sequences(sequences.ids, sequences.attention_mask, image_index)
        embeddings = sequences.embeddings[packed.sequences, packed.columns][None]
        states = decoder(
            inputs_embeds=embeddings,
            attention_mask=packed.make_mask(self.config.text_config._attn_implementation, embeddings.dtype),
            position_ids=packed.columns[None],
            use_cache=False,
        ).last_hidden_state
        return states[0, packed.state_index]
