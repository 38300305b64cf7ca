"""Asks a trained model one question: `python sample.py RUN/model "What is 2 plus 2?"`."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder: str, question: str, num_tokens: int = 64) -> str:
    """Returns the model's greedy answer; nothing of epctl is needed to load the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(device)
    ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    sys.stdout.write(answer(sys.argv[1], sys.argv[2]) + "\n")
