"""PixelLM for training and generation: the losses of answers that are given, and answers with their masks.

Axes: B images, C conversations, T tokens, P positions after images took their places, Q targets, S scales, K tokens per
scale, H language width, D embedding width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .beams import loop_class
from .generation import Decoding, GeneratedAnswer
from .geometry import restore_masks
from .losses import LossTerm, bce_loss, count_masks, dice_loss, refinement_weights, text_loss
from .modeling_base import EncodedImages, PixelLMPreTrainedModel
from .onednn_linear import onednn_linear
from .seg_codebook import group_positions
from .structures import IGNORE_TOKEN


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


class PixelLMForCausalLM(PixelLMPreTrainedModel):
    """A language model that sees an image and gives every thing it names a mask; arguments as of its base class."""

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
            pixel_values: (B, 3, side, side) under TOWER_KEY. resized_sizes, original_sizes: (B, 2).
            image_index: (C,) non-decreasing, the image of each sequence.
            masks: per image (Q, height, width) uint8 of 0, 1 and 255 (ignored) at the image's own size, ordered by
                sequence and by place in the text. target_questions: (Q,) number of the question each target belongs to.

        Raises:
            ValueError: seg groups are broken, or masks and groups disagree in number.
        """
        images = self.encode_images(pixel_values, resized_sizes)
        sequences = self.merge_multimodal_embeddings(input_ids, attention_mask, images, image_index, labels)
        hidden = self.hidden_states(sequences, image_index)
        group_sequences, group_columns = group_positions(
            sequences.ids, self.config.seg_token_ids, adjacent=self.config.group_rule == "adjacent"
        )
        image_of_target = image_index[group_sequences]
        # A token's state is that of the position which predicts it (docs/facts.md, M4).
        group_states = hidden[group_sequences[:, None], group_columns - 1]
        embeddings, low_res, zero = self._decode_targets(group_states, hidden, images, image_of_target)
        counts = torch.bincount(image_of_target, minlength=len(resized_sizes)).tolist()
        low_res_per_image = list(low_res.split(counts))
        mask_logits = self._restore_masks(low_res_per_image, resized_sizes, original_sizes)
        losses: dict[str, LossTerm] = {}
        if sequences.labels is not None:
            losses["ce"] = self._text_loss(hidden, sequences.labels)
        if masks is not None:
            self._check_masks(masks, mask_logits)
            losses.update(self._mask_losses(mask_logits, masks, target_questions, zero))
        return PixelLMOutput(
            losses=losses or None,
            mask_logits=mask_logits,
            low_res_mask_logits=low_res_per_image,
            embeddings=embeddings,
            last_hidden_state=hidden,
            attention_mask=sequences.attention_mask,
            labels=sequences.labels,
        )

    def _decode_targets(
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

    def _restore_masks(
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
                "needs one mask at its image's own size"
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
        """Answer prompts with a key-value cache; one answer per prompt.

        Args:
            pixel_values, resized_sizes: as in `forward`, or None where encoded `images` are given. Those keep what is
                computed about them, so that later prompts need not compute it again.
            prompts: C sequences of token ids (T,), each with at most one placeholder. image_index: (C,) their images.
            max_new_tokens: an answer stops there if the end token has not come.

        Raises:
            ValueError: no image, an impossible number, or seeds and prompts that differ in number.
        """
        if images is None:
            if pixel_values is None or resized_sizes is None:
                raise ValueError("no image was given: give pixel_values and resized_sizes, or encoded images")
            with onednn_linear(self.device):
                images = self.encode_images(pixel_values=pixel_values, resized_sizes=resized_sizes)
        loop = loop_class(decoding)
        return loop(self, images, prompts, image_index, end_token_id, max_new_tokens, decoding).run()
