"""`lerobot-vla0 tiny-vlm`: a small Qwen2.5-VL with random weights and a small tokenizer, for `--policy.vlm=`.

For demos and tests without a download. Architecture, chat template and the tokenisation of numbers are those
of Qwen2.5-VL; the sizes are smaller.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..files import check_place, new_folder
from ..prompt import SYSTEM_PROMPT

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Qwen2's pre-tokeniser. \p{N} has no quantifier, so that every digit is a token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen uses 0.02, at widths in the thousands. At a width of 128, 0.06 gave a loss of 0.76, 0.02 one of 0.81
# after the same time (400 s on one core, the demo's data, a loop around `policy.forward`).
INITIALIZER_RANGE = 0.06
# What the tokenizer is trained on: the words of the prompt and of LIBERO's instructions take few tokens.
CORPUS = [
    SYSTEM_PROMPT,
    "system user assistant Picture State You are a helpful assistant.",
    "pick up the alphabet soup cream cheese salad dressing bbq sauce ketchup tomato sauce butter milk",
    "chocolate pudding orange juice and place it in the basket",
    "put the black bowl on the plate next to the ramekin between from table center cookie box top of the "
    "cabinet",
    "open the middle drawer of the cabinet turn on the stove push the wine bottle mug moka pot book caddy",
]


@dataclass
class TinyVLMConfig:
    """Sizes of the model. The defaults have about 0.3 million parameters."""

    # Folder to write.
    out: Path = Path("outputs/tiny_vlm")
    # Width of the language model; a multiple of 16 × heads.
    hidden_size: int = 64
    # Layers of the language model.
    num_layers: int = 2
    # Attention heads of the language model (half as many key-value heads).
    num_heads: int = 4
    # Width of the vision encoder.
    vision_hidden_size: int = 64
    # Layers of the vision encoder; the last one attends to the whole picture.
    vision_layers: int = 2
    # Rows of the vocabulary; at least what the tokenizer needs (about 580). Qwen2.5-VL has 151,936.
    vocab_size: int = 640
    seed: int = 0


def make_tiny_vlm(config: TinyVLMConfig) -> Path:
    """Writes the model, tokenizer and processor to `config.out` and returns it.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: sizes that do not fit together.
    """
    # Imported here because transformers takes seconds, and `lerobot-vla0 tiny-vlm --help` should not.
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    out = check_place(config.out, "new folder")
    for name in ("hidden_size", "num_layers", "num_heads", "vision_hidden_size", "vision_layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed={config.seed} must be at least 0 and below 2^63.")
    head_dim, remainder = divmod(config.hidden_size, config.num_heads)
    if remainder or head_dim % 16:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be num_heads ({config.num_heads}) times a multiple of 16."
        )
    processor = make_processor()
    if config.vocab_size < len(processor.tokenizer):
        raise ValueError(f"vocab_size={config.vocab_size} must be at least {len(processor.tokenizer)}.")
    vlm_config = make_config(
        processor,
        text={
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": 4 * config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": max(1, config.num_heads // 2),
        },
        vision={
            "depth": config.vision_layers,
            "hidden_size": config.vision_hidden_size,
            "intermediate_size": 4 * config.vision_hidden_size,
            "num_heads": max(1, config.vision_hidden_size // 32),
            "fullatt_block_indexes": [config.vision_layers - 1],
        },
    )
    torch.manual_seed(config.seed)
    model = Qwen2_5_VLForConditionalGeneration(vlm_config)
    # Qwen2.5-VL's own settings. The policy's decoding ignores them.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1e-6, repetition_penalty=1.05)
    with new_folder(out) as draft:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
    print(f"Wrote a Qwen2.5-VL with {model.num_parameters() / 1e6:.1f} million random parameters to {out}")
    return out


def make_processor() -> Any:
    """Qwen2.5-VL's processor around a small tokenizer."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(processor: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Qwen2_5_VLConfig of the given sizes, with the token ids of `make_processor`'s tokenizer."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    # Multimodal RoPE splits half of a head's dimensions among time, height and width, 1 : 1.5 : 1.5 as in
    # Qwen2.5-VL.
    section = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    return Qwen2_5_VLConfig(
        text_config={
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "tie_word_embeddings": True,
            "initializer_range": INITIALIZER_RANGE,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": None,
            **text,
        },
        vision_config={
            "out_hidden_size": text["hidden_size"],
            "initializer_range": INITIALIZER_RANGE,
            **vision,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
    )


def _train_tokenizer() -> Tokenizer:
    """Byte-level BPE as in Qwen2, trained on CORPUS. Digits and the space have the same ids as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 10,
        trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


# Qwen2.5-VL's chat template (ChatML with vision markers and an optional "Picture n: ") for text and images.
CHAT_TEMPLATE = (
    "{%- set pictures = namespace(n=0) -%}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}"
    "{%- set pictures.n = pictures.n + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ pictures.n ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
