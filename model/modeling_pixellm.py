"""PixelLM: the parts wired together. Training, teacher-forced segmentation and generation share one mask path.

Axes: B images, C conversations, T tokens, P expanded positions, Q targets, S scales, K tokens per scale, H language
width, D embedding width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from .beams import loop_class
from .configuration_pixellm import PixelLMConfig
from .generation import Decoding, GeneratedAnswer, Prefix, PrefixKey
from .geometry import restore_masks, valid_cells
from .losses import LossTerm, bce_loss, count_masks, dice_loss, refinement_weights, text_loss
from .onednn_linear import RowKernel, quick_linear
from .pixel_decoder import PixelDecoder
from .prefix_sharing import PACKING_ATTENTION, pack_rows
from .projector import Projector
from .seg_codebook import SegCodebook, group_positions
from .structures import IGNORE_TOKEN, TOWER_KEY
from .vision_tower import VisionTower, vision_model_from_config

ALIGNMENT = 64  # bytes; what torch's own allocations have on a CPU


@dataclass
class EncodedImages:
    """What the vision tower saw, once per image.

    features: S times (B, patches, vision width). image_tokens: (B, N, H) for the language model.
    image_token_mask: (B, N) bool, False where a token lies wholly in the padding.
    maps: S feature maps (B, H, grid, grid) for the pixel decoder, made when the first mask is asked for. decoder_maps:
    what the decoder itself made of them, kept where no gradient is wanted. prefixes: what the language model remembers
    of the beginnings of prompts about these images, kept by the decoding loop.
    """

    features: list[torch.Tensor]
    image_tokens: torch.Tensor
    image_token_mask: torch.Tensor
    maps: list[torch.Tensor] | None = None
    decoder_maps: list[torch.Tensor] | None = None
    prefixes: dict[PrefixKey, Prefix] = field(default_factory=dict)


@dataclass
class ExpandedRows:
    """Conversations after each placeholder grew into the positions of its image, right-padded.

    ids: (C, P), the placeholder id standing for every image position. embeddings: (C, P, H). attention_mask: (C, P)
    bool. labels: (C, P) or None. Positions are counted from 0 over all of a row, masked ones included (golden fact M7).
    """

    ids: torch.Tensor
    embeddings: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None


@dataclass
class PixelLMOutput(ModelOutput):
    """Result of `PixelLMForCausalLM.forward`.

    losses: by name, unnormalised. mask_logits: per image (Q, height, width) at the image's own size.
    low_res_mask_logits: per image (Q, h, w) over the square. embeddings: (Q, S, D). last_hidden_state: (C, P, H).
    attention_mask and labels: (C, P), expanded.
    """

    losses: dict[str, LossTerm] | None = None
    mask_logits: list[torch.Tensor] | None = None
    low_res_mask_logits: list[torch.Tensor] | None = None
    embeddings: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class PixelLMForCausalLM(PreTrainedModel):
    """A language model that sees an image and gives every thing it names a mask.

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
    row_kernel: RowKernel | None = None  # compiled, where `compiling.compile_for_answers` could

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
        """As transformers does it, but weights that lie at odd addresses of a mapped file are copied out of it.

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
        """Compile every layer of the language model as soon as it is first used: seconds to minutes then, and again
        when another length comes, after which lengths are left open. Names of parameters stay what they are."""
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

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by name; the refinement weight α is inside the BCE."""
        config = self.config
        return {"ce": config.ce_loss_weight, "bce": config.bce_loss_weight, "dice": config.dice_loss_weight}

    def count_losses(
        self, labels: torch.Tensor | None = None, masks: list[torch.Tensor] | None = None, **_: Any
    ) -> dict[str, float]:
        """The counts `forward` would return for a batch, from the batch alone: what a step's sums are divided by."""
        tokens = 0.0 if labels is None else float((labels[:, 1:] != IGNORE_TOKEN).sum())
        targets = 0.0 if masks is None else float(sum(count_masks(image_masks) for image_masks in masks))
        return {"ce": tokens, "bce": targets, "dice": targets}

    # --- the way of an image -------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: dict[str, torch.Tensor], resized_sizes: torch.Tensor) -> EncodedImages:
        """Run the vision tower and make the image tokens, once per image.

        Args:
            pixel_values: (B, 3, P, P) under the tower's key. resized_sizes: (B, 2).
        """
        config = self.config
        features = self.vision_tower(pixel_values[TOWER_KEY], resized_sizes)
        grid = (config.grid_size, config.grid_size)
        pooled = features[0]
        if config.image_token_pool > 1:
            square = pooled.transpose(1, 2).unflatten(2, grid).float()
            # For a whole factor, averaging the window equals the release's bilinear resize (golden fact M8) only at 2.
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

    def expand_rows(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        images: EncodedImages,
        image_index: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> ExpandedRows:
        """Let the placeholder of each row grow into its image's positions. Rows without a placeholder are text only.

        Args:
            input_ids, attention_mask, labels: (C, T). image_index: (C,) which image a row is about.
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
        beyond = source >= input_ids.shape[1]  # rows without an image end earlier
        source = source.clamp(max=input_ids.shape[1] - 1)
        ids = input_ids.gather(1, source)
        in_image = is_image.gather(1, source)
        place = (targets - (ends - widths).gather(1, source)).clamp(max=positions_per_image - 1)
        rows = image_index[:, None].expand_as(place)
        text = self.get_input_embeddings()(ids.masked_fill(in_image, 0))
        image = images.image_tokens[rows, place].to(text.dtype)
        embeddings = torch.where(in_image[..., None], image, text)
        mask = torch.where(in_image, images.image_token_mask[rows, place], attention_mask.bool().gather(1, source))
        expanded_labels = None
        if labels is not None:
            expanded_labels = labels.gather(1, source).masked_fill(in_image | beyond, IGNORE_TOKEN)
        return ExpandedRows(ids.masked_fill(beyond, 0), embeddings, mask & ~beyond, expanded_labels)

    # --- the way of a target --------------------------------------------------------------------------------------

    def decode_masks(
        self, group_states: torch.Tensor, images: EncodedImages, image_of_target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The one mask path.

        Args:
            group_states: (Q, S * K, H) hidden states that predict the tokens of each group.
            image_of_target: (Q,) long.

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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: dict[str, torch.Tensor],
        resized_sizes: torch.Tensor,
        original_sizes: torch.Tensor,
        image_index: torch.Tensor,
        labels: torch.Tensor | None = None,
        masks: list[torch.Tensor] | None = None,
        target_questions: torch.Tensor | None = None,
    ) -> PixelLMOutput:
        """Losses and masks for answers that are given.

        Args:
            input_ids, attention_mask, labels: (C, T), right-padded; labels are -100 where nothing is to be learned.
            pixel_values: (B, 3, P, P) under the tower's key. resized_sizes, original_sizes: (B, 2).
            image_index: (C,) non-decreasing, the image of each row.
            masks: per image (Q, height, width) uint8 of 0, 1 and 255 (ignored) at the image's own size, ordered by
                row and by place in the text. target_questions: (Q,) number of the question each target belongs to.

        Raises:
            ValueError: seg groups are broken, or masks and groups disagree in number.
        """
        images = self.encode_images(pixel_values, resized_sizes)
        rows = self.expand_rows(input_ids, attention_mask, images, image_index, labels)
        hidden = self.hidden_states(rows, image_index)
        group_rows, group_columns = group_positions(
            rows.ids, self.config.seg_token_ids, adjacent=self.config.group_rule == "adjacent"
        )
        image_of_target = image_index[group_rows]
        # A token's state is that of the position which predicts it (golden fact M4).
        group_states = hidden[group_rows[:, None], group_columns - 1]
        embeddings, low_res, zero = self._decode_or_touch(group_states, hidden, images, image_of_target)
        counts = torch.bincount(image_of_target, minlength=len(resized_sizes)).tolist()
        low_res_per_image = list(low_res.split(counts))
        mask_logits = self._restore(low_res_per_image, resized_sizes, original_sizes)
        losses: dict[str, LossTerm] = {}
        if rows.labels is not None:
            losses["ce"] = self._text_loss(hidden, rows.labels)
        if masks is not None:
            self._check_masks(masks, mask_logits)
            losses.update(self._mask_losses(mask_logits, masks, target_questions, zero))
        return PixelLMOutput(
            losses=losses or None,
            mask_logits=mask_logits,
            low_res_mask_logits=low_res_per_image,
            embeddings=embeddings,
            last_hidden_state=hidden,
            attention_mask=rows.attention_mask,
            labels=rows.labels,
        )

    @property
    def shares_prefixes(self) -> bool:
        """Whether conversations go through the language model in one packed row (`prefix_sharing` allows it).

        Not with an attention that cannot be told which places see which, nor with one that looks back over a limited
        window only.
        """
        text = self.config.text_config
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        return self.prefix_sharing and text._attn_implementation in PACKING_ATTENTION and window is None

    def hidden_states(self, rows: ExpandedRows, image_index: torch.Tensor) -> torch.Tensor:
        """(C, P, H) states of the language model after its final norm; those of padding mean nothing."""
        decoder = self.language_model.get_decoder()
        if not self.shares_prefixes:
            positions = torch.arange(rows.ids.shape[1], device=rows.ids.device)[None]
            return decoder(
                inputs_embeds=rows.embeddings,
                attention_mask=rows.attention_mask.long(),
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
        packed = pack_rows(rows.ids, rows.attention_mask, image_index)
        embeddings = rows.embeddings[packed.rows, packed.columns][None]
        states = decoder(
            inputs_embeds=embeddings,
            attention_mask=packed.mask(self.config.text_config._attn_implementation, embeddings.dtype),
            position_ids=packed.columns[None],
            use_cache=False,
        ).last_hidden_state
        return states[0, packed.home]

    def _decode_or_touch(
        self,
        group_states: torch.Tensor,
        hidden: torch.Tensor,
        images: EncodedImages,
        image_of_target: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode the targets: embeddings, logits over the square, and a zero that belongs in the mask losses.

        In training without any target one stand-in is decoded, and its logits enter that zero. Otherwise a rank whose
        batch is text only would leave its mask parts without gradient, and a sharded or data-parallel run would wait
        for them forever.
        """
        zero = hidden.new_zeros((), dtype=torch.float32)
        if len(group_states):
            return *self.decode_masks(group_states, images, image_of_target), zero
        config, side = self.config, self.config.grid_size * 2**self.config.num_scales
        no_embeddings = hidden.new_zeros((0, config.num_scales, config.embedding_dim))
        no_logits = hidden.new_zeros((0, side, side))
        if self.training and torch.is_grad_enabled() and self.trains_masks:
            stand_in = hidden[:1, :1].expand(-1, config.group_size, -1)
            zero = self.decode_masks(stand_in, images, image_of_target.new_zeros(1))[1].float().sum() * 0.0
        return no_embeddings, no_logits, zero

    def _text_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> LossTerm:
        """Logits are computed only where there is something to learn."""
        wanted = labels[:, 1:] != IGNORE_TOKEN
        logits = self.get_output_embeddings()(hidden[:, :-1][wanted])
        return text_loss(logits, labels[:, 1:][wanted])

    def _restore(
        self, low_res: list[torch.Tensor], resized_sizes: torch.Tensor, original_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Masks in each image's own pixels; images of equal sizes go together."""
        sizes = [(tuple(r), tuple(o)) for r, o in zip(resized_sizes.tolist(), original_sizes.tolist(), strict=True)]
        restored: list[torch.Tensor] = [torch.empty(0)] * len(low_res)
        for size in dict.fromkeys(sizes):
            members = [index for index, other in enumerate(sizes) if other == size]
            together = restore_masks(torch.cat([low_res[index] for index in members]), *size)
            for index, masks in zip(members, together.split([len(low_res[i]) for i in members]), strict=True):
                restored[index] = masks
        return restored

    @staticmethod
    def _check_masks(masks: list[torch.Tensor], mask_logits: list[torch.Tensor]) -> None:
        found, expected = [tuple(m.shape) for m in masks], [tuple(m.shape) for m in mask_logits]
        if found != expected:
            raise ValueError(
                f"masks of shapes {found} were given, but the answers hold seg groups for {expected}: every group "
                "needs one mask "
                "at its image's own size"
            )

    def _mask_losses(
        self,
        mask_logits: list[torch.Tensor],
        masks: list[torch.Tensor],
        target_questions: torch.Tensor | None,
        zero: torch.Tensor,
    ) -> dict[str, LossTerm]:
        counts = [len(m) for m in masks]
        if target_questions is None:
            target_questions = torch.arange(sum(counts), device=mask_logits[0].device)
        questions = target_questions.to(mask_logits[0].device).split(counts)
        bce, dice = LossTerm(zero, zero.detach()), LossTerm(zero, zero.detach())
        for size in dict.fromkeys(m.shape[1:] for m in masks):
            members = [index for index, m in enumerate(masks) if m.shape[1:] == size and len(m)]
            if not members:
                continue
            logits = torch.cat([mask_logits[index] for index in members])
            truth = torch.cat([masks[index] for index in members])
            weights = None
            if self.config.refinement_alpha != 1:
                weights = refinement_weights(
                    logits, torch.cat([questions[i] for i in members]), self.config.refinement_alpha
                )
            bce = LossTerm(*(a + b for a, b in zip(bce, bce_loss(logits, truth, weights), strict=True)))
            dice = LossTerm(*(a + b for a, b in zip(dice, dice_loss(logits, truth), strict=True)))
        return {"bce": bce, "dice": dice}

    @torch.no_grad()
    def see(self, pixel_values: dict[str, torch.Tensor], resized_sizes: torch.Tensor) -> EncodedImages:
        """`encode_images` for answers: without gradients, the quickest way."""
        with quick_linear(self.device):
            return self.encode_images(pixel_values=pixel_values, resized_sizes=resized_sizes)

    @torch.no_grad()
    def generate_answers(
        self,
        pixel_values: dict[str, torch.Tensor] | None,
        resized_sizes: torch.Tensor | None,
        prompts: list[torch.Tensor],
        image_index: torch.Tensor,
        end_token_id: int,
        max_new_tokens: int,
        decoding: Decoding | None = None,
        images: EncodedImages | None = None,
    ) -> list[GeneratedAnswer]:
        """Answer prompts with a key-value cache; see `generation.DecodingLoop`, which is given the rest.

        pixel_values and resized_sizes are those of `forward`, or None where the images are given encoded. Those keep
        what is computed about them, so that later prompts need not compute it again.
        """
        if images is None:
            if pixel_values is None or resized_sizes is None:
                raise ValueError("no image was given: give pixel_values and resized_sizes, or encoded images")
            images = self.see(pixel_values, resized_sizes)
        loop = loop_class(decoding)
        return loop(self, images, prompts, image_index, end_token_id, max_new_tokens, decoding).run()
