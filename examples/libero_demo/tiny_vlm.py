"""A small Qwen2.5-VL with random weights and a small tokenizer, for `--policy.vlm=` without a download.

python examples/libero_demo/tiny_vlm.py --out=outputs/tiny_vlm --hidden_size=96 --num_heads=3 --num_layers=3
"""

from dataclasses import dataclass
from pathlib import Path

import draccus
import torch
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from lerobot_vla0.bench.random_vlm import make_config, make_processor
from lerobot_vla0.files import new_folder


@dataclass
class TinyVLMConfig:
    """Sizes of the model. The defaults have about 0.3 million parameters."""

    # Folder to write.
    out: Path
    # Width of the language model: a multiple of 16 times num_heads.
    hidden_size: int = 64
    # Layers of the language model.
    num_layers: int = 2
    # Attention heads of the language model (half as many key-value heads).
    num_heads: int = 4
    # Width of the vision encoder: a multiple of 32.
    vision_hidden_size: int = 64
    # Layers of the vision encoder; the last one attends to the whole picture.
    vision_layers: int = 2


def make_tiny_vlm(config: TinyVLMConfig) -> Path:
    """Writes the model, tokenizer and processor to `config.out` and returns it.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: sizes that do not fit together.
    """
    if config.hidden_size % (16 * config.num_heads):
        raise ValueError(
            f"hidden_size={config.hidden_size} must be num_heads ({config.num_heads}) times a multiple of 16."
        )
    processor = make_processor()
    vlm_config = make_config(
        processor,
        text={
            "vocab_size": 640,  # the tokenizer has about 580; Qwen2.5-VL has 151,936
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
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(vlm_config)
    # Qwen2.5-VL's own settings. The policy's decoding ignores them.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1e-6, repetition_penalty=1.05)
    with new_folder(config.out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    parameters = model.num_parameters() / 1e6
    print(f"Wrote a Qwen2.5-VL with {parameters:.1f} million random parameters to {config.out}")
    return config.out


if __name__ == "__main__":
    make_tiny_vlm(draccus.parse(TinyVLMConfig))
