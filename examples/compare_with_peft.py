"""The mean loss that transformers and HF PEFT find, to set beside that of `peft eval perplexity`:

    python examples/compare_with_peft.py MODEL ADAPTER DATA      (ADAPTER may be - for none)
    peft eval perplexity --model MODEL --adapter ADAPTER --data DATA --json

MODEL is a folder whose chat template is ChatML, DATA a file of conversations (`{"messages": [...]}` per line). The loss is
over the assistant's tokens and their end token, each conversation on its own, in f32. Made with torch 2.15,
transformers 5.23 and peft 0.21.2.
"""
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def assistant_mask(ids, begin, end):
    """Which tokens an assistant says: from after `begin` to `end`, that one included."""
    mask, at = [False] * len(ids), 0
    while at < len(ids):
        if ids[at : at + len(begin)] != begin:
            at += 1
            continue
        at += len(begin)
        while at < len(ids):
            mask[at] = True
            at += 1
            if ids[at - 1] == end:
                break
    return mask


def main(model_folder, adapter_folder, data):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if adapter_folder != "-":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_folder)
    model.eval()
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    begin, (end,) = encode("<|im_start|>assistant\n"), encode("<|im_end|>")
    nll, tokens = 0.0, 0
    for line in open(data, encoding="utf-8"):
        ids = encode(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        found = torch.log_softmax(logits[:-1], -1)
        for position, counted in enumerate(assistant_mask(ids, begin, end)):
            if counted and position > 0:
                nll -= found[position - 1, ids[position]].item()
                tokens += 1
    print(json.dumps({"nll": nll / tokens, "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
