"""The decoding loop: many prompts about many pictures together, each picture seen once, masks decoded at the end.

Axes: C prompts, P positions, Q targets, H language width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from .seg_codebook import release_groups, whole_groups

if TYPE_CHECKING:
    from .modeling_pixellm import EncodedPictures, PixelLMForCausalLM


@dataclass
class GeneratedAnswer:
    """An answer as tokens and masks.

    ids: (n,) the answer's tokens, the end token included if it was reached. low_res_mask_logits: (Q, h, w) over the
    square, one per seg group; embeddings: (Q, S, D) they were made from. num_broken: broken groups, which have no mask.
    finished: the end token was reached.
    """

    ids: torch.Tensor
    low_res_mask_logits: torch.Tensor
    embeddings: torch.Tensor
    num_broken: int
    finished: bool


def generate_answers(
    model: "PixelLMForCausalLM",
    pixel_values: dict[str, torch.Tensor],
    resized_sizes: torch.Tensor,
    prompts: list[torch.Tensor],
    image_index: torch.Tensor,
    end_token_id: int,
    max_new_tokens: int,
) -> list[GeneratedAnswer]:
    """Greedy answers with a key-value cache.

    Args:
        prompts: C rows of token ids, each with at most one picture placeholder. image_index: (C,) their pictures.
        max_new_tokens: an answer stops there if the end token has not come.

    Returns:
        One answer per prompt, the same as if it had been asked alone. Which seg tokens get masks is the config's
        `group_rule`; by that of the release the groups of a prompt come first.
    """
    if not prompts:
        return []
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    pictures = model.encode_pictures(pixel_values, resized_sizes)
    ids, states, prompt_states = _decode_tokens(model, pictures, prompts, image_index, end_token_id, max_new_tokens)
    return _with_masks(model, pictures, prompts, ids, states, prompt_states, image_index, end_token_id)


def _left_padded(
    model: "PixelLMForCausalLM", pictures: "EncodedPictures", prompts: list[torch.Tensor], image_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expanded prompts whose last tokens stand in one column: (C, P, H) embeddings, (C, P) mask, (C, P) positions."""
    rows = [
        model.expand_rows(prompt[None], torch.ones_like(prompt)[None], pictures, image_index[number : number + 1])
        for number, prompt in enumerate(prompts)
    ]
    length = max(row.ids.shape[1] for row in rows)
    first = rows[0].embeddings
    embeddings = first.new_zeros((len(rows), length, first.shape[-1]))
    mask = torch.zeros((len(rows), length), dtype=torch.long, device=first.device)
    positions = torch.zeros_like(mask)
    for number, row in enumerate(rows):
        start = length - row.ids.shape[1]
        embeddings[number, start:] = row.embeddings[0]
        mask[number, start:] = row.attention_mask[0].long()
        positions[number, start:] = torch.arange(length - start, device=first.device)
    return embeddings, mask, positions


def _decode_tokens(
    model: "PixelLMForCausalLM",
    pictures: "EncodedPictures",
    prompts: list[torch.Tensor],
    image_index: torch.Tensor,
    end_token_id: int,
    max_new_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(C, n) chosen tokens and (C, n, H) the states that chose them; rows run on until all have their end token.

    And (C, P, H) the prompts' states, left-padded, where the config's `group_rule` asks for them.
    """
    decoder, head = model.language_model.get_decoder(), model.get_output_embeddings()
    inputs, mask, positions = _left_padded(model, pictures, prompts, image_index)
    cache = DynamicCache(config=model.config.text_config)
    chosen: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    prompt_states = None
    done = torch.zeros(len(prompts), dtype=torch.bool, device=mask.device)
    for _ in range(max_new_tokens):
        output = decoder(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        if not states and model.config.group_rule == "release":
            prompt_states = output.last_hidden_state
        state = output.last_hidden_state[:, -1]
        token = head(state).argmax(dim=-1)
        chosen.append(token)
        states.append(state)
        done |= token == end_token_id
        if bool(done.all()):
            break
        inputs = model.get_input_embeddings()(token)[:, None]
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(chosen, dim=1), torch.stack(states, dim=1), prompt_states


def _with_masks(
    model: "PixelLMForCausalLM",
    pictures: "EncodedPictures",
    prompts: list[torch.Tensor],
    ids: torch.Tensor,
    states: torch.Tensor,
    prompt_states: torch.Tensor | None,
    image_index: torch.Tensor,
    end_token_id: int,
) -> list[GeneratedAnswer]:
    """Cut each row at its end token and decode the masks of all groups together."""
    answers, group_states, owners = [], [], []
    for number, row in enumerate(ids.tolist()):
        finished = end_token_id in row
        answer = row[: row.index(end_token_id) + 1] if finished else row
        if prompt_states is None:
            found, broken = _groups_of_answer(model, answer, states[number])
        else:
            prompt = prompts[number].tolist()
            found, broken = _groups_of_text(model, prompt, answer, prompt_states[number], states[number])
        group_states += found
        owners += [number] * len(found)
        no_logits = states.new_zeros((0, 0, 0))
        no_embeddings = states.new_zeros((0, model.config.num_scales, model.config.embedding_dim))
        answers.append(GeneratedAnswer(ids[number, : len(answer)], no_logits, no_embeddings, broken, finished))
    if owners:
        owner_rows = torch.tensor(owners, device=ids.device)
        embeddings, logits = model.decode_masks(torch.stack(group_states), pictures, image_index[owner_rows])
        for number, one in enumerate(answers):
            one.low_res_mask_logits = logits[owner_rows == number]
            one.embeddings = embeddings[owner_rows == number]
    return answers


def _groups_of_answer(
    model: "PixelLMForCausalLM", answer: list[int], states: torch.Tensor
) -> tuple[list[torch.Tensor], int]:
    """The (S * K, H) states of each whole group of adjacent tokens, and how many groups are broken."""
    starts, broken = whole_groups(answer, model.config.seg_token_ids)
    return [states[start : start + model.config.group_size] for start in starts], broken


def _groups_of_text(
    model: "PixelLMForCausalLM",
    prompt: list[int],
    answer: list[int],
    prompt_states: torch.Tensor,
    states: torch.Tensor,
) -> tuple[list[torch.Tensor], int]:
    """The same by the release's rule, which counts the prompt's seg tokens too.

    prompt_states: (P, H), the picture's positions and padding before them. A token's state is that of the position
    before it; the prompt's last tokens stand in the last columns.
    """
    places, broken = release_groups(prompt + answer, model.config.seg_token_ids)
    first = len(prompt_states) - len(prompt)
    before = torch.cat([prompt_states[first:-1], states])
    return [before[[place - 1 for place in group]] for group in places], broken
