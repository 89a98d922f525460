"""The chat: system prompt, pictures, instruction, answer; as token ids with labels, and masked action
augmentation.

Knows text and tokens. Actions come in as integer bins; the model is not needed here.
"""

from typing import Any

import torch
from torch import Tensor

from .action_text import IntegerGrammar

# VLA-0's own wording (arXiv 2510.13054, section 3; its code and vla0-trl use the same string).
SYSTEM_PROMPT = (
    "Analyze the input image and predict robot actions for the next {horizon} timesteps. "
    "Each action has {dim} dimensions. "
    "Output a single sequence of {count} integers (0-{num_bins} each), "
    "representing the {horizon} timesteps sequentially. "
    "Provide only space separated numbers. Nothing else."
)
IGNORE = -100  # label that Transformers' and PyTorch's cross-entropy leave out
MASK_CHARACTER = "?"
MAX_CACHED_PROMPTS = 1024


class ChatFormatter:
    """Turns instructions (and, for training, integer actions) into padded batches of token ids.

    Args:
        processor: the VLM's Transformers processor (tokenizer, image processor, chat template).
        horizon, dim, num_bins: H, D and B of the system prompt.
        num_pictures: pictures per example (1 when cameras are tiled).
        picture_size: (height, width) of each picture in pixels.
        picture_mark, picture_text: what the chat template writes for a picture, and what the processor puts
            in its place for one of this size (`vlm.Family.picture_text`).
        add_vision_id: put "Picture 1: " before each picture, as the original checkpoints were trained.

    Attributes:
        grammar: the language of the answers, in this tokenizer's tokens.
        lead, tail_ids: what the template writes before the assistant's answer (text) and after it (tokens).
        num_shared: tokens before the first picture, the same in every prompt.
    """

    def __init__(
        self,
        processor: Any,
        *,
        horizon: int,
        dim: int,
        num_bins: int,
        num_pictures: int,
        picture_size: tuple[int, int],
        picture_mark: str,
        picture_text: str,
        add_vision_id: bool,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.horizon, self.dim, self.num_bins = horizon, dim, num_bins
        self.num_pictures, self.picture_size, self.add_vision_id = num_pictures, picture_size, add_vision_id
        self.system_prompt = SYSTEM_PROMPT.format(
            horizon=horizon, dim=dim, count=horizon * dim, num_bins=num_bins
        )
        self.digit_ids, self.space_id, self.mask_id = number_tokens(self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id
        self.picture_mark, self.picture_text = picture_mark, picture_text
        self._prompts: dict[str, list[int]] = {}
        # Lead and tail are "" and "<|im_end|>\n" for Qwen, " " and "<end_of_utterance>\n" for SmolVLM2.
        answer = {"role": "assistant", "content": [{"type": "text", "text": "0"}]}
        opened = self._render(self.messages("x"), True)
        closed = self._render([*self.messages("x"), answer], False)
        self.lead, answered, tail = closed.removeprefix(opened).partition("0")
        if not closed.startswith(opened) or not answered or self.lead.strip():
            raise ValueError(
                "vlm: its chat template does not put the assistant's words behind the generation prompt "
                f"({closed[-80:]!r} against {opened[-40:]!r}): a model that thinks first is not supported."
            )
        self.tail_ids = self._tokenize(tail)
        self.end_id = self.tail_ids[0]
        self.grammar = IntegerGrammar(horizon * dim, num_bins, self.digit_ids, self.space_id, self.end_id)
        # Integer v → its token ids, and the place value (100, 10, 1) of each of its digits.
        texts = [str(v) for v in range(num_bins + 1)]
        self._number_ids = [[self.digit_ids[int(c)] for c in t] for t in texts]
        self._number_places = [[10 ** (len(t) - 1 - i) for i in range(len(t))] for t in texts]
        self.num_shared = self.prompt_ids("x").index(processor.image_token_id)

    def messages(self, instruction: str) -> list[dict[str, Any]]:
        """The chat up to the assistant's turn, as Transformers' chat templates take it."""
        pictures = [{"type": "image"}] * self.num_pictures
        return [
            {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]},
            {"role": "user", "content": [*pictures, {"type": "text", "text": instruction}]},
        ]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        # Only Qwen's templates know the variable; Transformers warns where another gets it.
        template = str(self.processor.chat_template)
        vision_id = {"add_vision_id": self.add_vision_id} if "add_vision_id" in template else {}
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **vision_id
        )

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self, instruction: str) -> list[int]:
        """Token ids up to and including the start of the assistant's turn, image tokens expanded. Cached."""
        if instruction in self._prompts:
            return self._prompts[instruction]
        marks = [*self.tokenizer.all_special_tokens, self.picture_mark, self.processor.image_token]
        if special := [mark for mark in marks if mark in instruction]:
            raise ValueError(f"task {instruction!r} contains the special token {special[0]!r}.")
        text = self._render(self.messages(instruction), True) + self.lead
        ids = self._tokenize(text.replace(self.picture_mark, self.picture_text))
        if len(self._prompts) >= MAX_CACHED_PROMPTS:
            self._prompts.clear()
        self._prompts[instruction] = ids
        return ids

    def inference_batch(self, instructions: list[str]) -> dict[str, Tensor]:
        """Right-padded `input_ids` and `attention_mask`, (B, T) each."""
        return self._pad([self.prompt_ids(t) for t in instructions])

    def training_batch(
        self,
        instructions: list[str],
        bins: Tensor,
        *,
        padded_steps: Tensor | None = None,
        mask_prob: float = 0.0,
        mask_skip_prob: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Right-padded examples for supervised fine-tuning.

        Args:
            instructions: B instructions.
            bins: (B, H, D) int64 in 0..num_bins.
            padded_steps: (B, H) bool, timesteps whose tokens are left out of the loss; None supervises all.
            mask_prob: masked action augmentation: the share of characters hidden is drawn from U(0,
                mask_prob).
            mask_skip_prob: share of examples that are left unmasked.
            generator: CPU generator of the augmentation; None switches it off.

        Returns:
            `input_ids`, `attention_mask`, `labels` (IGNORE outside the answer), all (B, T), and `places` (B,
            T): the place value (1, 10, 100, ...) of each digit of the answer, 0 elsewhere.
        """
        rows, labels, places = [], [], []
        for i, instruction in enumerate(instructions):
            prompt = self.prompt_ids(instruction)
            answer, place = [], []
            for v in bins[i].flatten().tolist():
                answer += [*self._number_ids[v], self.space_id]
                place += [*self._number_places[v], 0]
            answer.pop()  # no space after the last integer
            place.pop()
            target = list(answer)
            if padded_steps is not None:
                self._drop_padded(target, place, padded_steps[i].tolist())
            # Drawn even when the example is not masked, so that the draws of one example do not depend on
            # those before it.
            if generator is not None:
                skip, share = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
                order = torch.randperm(len(answer), generator=generator).tolist()
                if skip >= mask_skip_prob:
                    for j in order[: int(share * mask_prob * len(answer))]:
                        answer[j], target[j] = self.mask_id, IGNORE
            tail = self.tail_ids
            rows.append(prompt + answer + tail)
            labels.append([IGNORE] * len(prompt) + target + tail)
            places.append([0] * len(prompt) + place + [0] * len(tail))
        batch = self._pad(rows)
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([r + [IGNORE] * (width - len(r)) for r in labels])
        batch["places"] = torch.tensor([r + [0] * (width - len(r)) for r in places])
        return batch

    def _drop_padded(self, target: list[int], place: list[int], padded: list[bool]) -> None:
        """Takes the characters of padded timesteps (digits and the space before them) out of `target`."""
        number = 0
        for j in range(len(target)):
            # The space that leads into a padded timestep belongs to it: it is written only because of it.
            number += place[j] == 0
            if padded[number // self.dim]:
                target[j] = IGNORE

    def _pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = [r + [self.pad_id] * (width - len(r)) for r in rows]
        mask = [[1] * len(r) + [0] * (width - len(r)) for r in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def number_tokens(tokenizer: Any) -> tuple[list[int], int, int]:
    """(ids of "0".."9", id of " ", id of "?")."""
    probe = "0123456789 1000 12 407"
    ids, mask = (tokenizer.encode(text, add_special_tokens=False) for text in (probe, MASK_CHARACTER))
    if len(ids) != len(probe) or len(mask) != 1:
        raise ValueError(
            f"vlm: its tokenizer writes {probe!r} as {tokenizer.convert_ids_to_tokens(ids)}; VLA-0 needs "
            f"each digit, the space and {MASK_CHARACTER!r} to be one token, as in Qwen2.5-VL."
        )
    return ids[:10], ids[10], mask[0]
