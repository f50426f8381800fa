"""What transformers 4.50 makes of a folder; started by test_published.py with the Python of a venv that holds it.

Usage: published_reader.py FOLDER PICTURE OUT     OUT.json: numbers of the configuration, ids; OUT.safetensors: logits
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

TEXT = "Walk past the bed and stop at the door.<|im_end|>\n"
MESSAGES = [
    {"role": "system", "content": "You are a visual language navigation model."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Your task is to stop."}]},
]


def main(folder: str, picture: str, out: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # As the evaluator asks for it.
    processor = AutoProcessor.from_pretrained(folder, max_pixels=1605632, min_pixels=28 * 28, padding_side="left")
    prompt = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(picture)], return_tensors="pt")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, config=config, torch_dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    facts = {
        "transformers": transformers.__version__,
        "config": config.to_dict(),
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "prompt": prompt,
        "ids": tokenizer(TEXT)["input_ids"],
        "decoded": tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True),
        "pixel_limits": [processor.image_processor.min_pixels, processor.image_processor.max_pixels],
    }
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    save_file(
        {"logits": logits.contiguous(), **{k: v.contiguous() for k, v in inputs.items()}},
        out.with_suffix(".safetensors"),
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
