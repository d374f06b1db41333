"""Loads a model that `peft upcycle` wrote with stock transformers and compares it with the dense model it came from.

    python examples/check_upcycled.py DENSE UPCYCLED [TEXT.jsonl]

With all experts on (a number or two of the configuration changed) the loss has to be nearly the dense model's where
`refit = "none"`: the stored router weighs experts evenly but for about 1/256. As written, the loss on the text is what
`upcycle.md` says of its kind of text. Needs torch and transformers; made with torch 2.13 and transformers 5.23.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load(path, **changes):
    config = AutoConfig.from_pretrained(path)
    for key, value in changes.items():
        setattr(config, key, value)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            print(f"{kind}: {sorted(info[kind])[:4]}")
    return model.eval()


def all_on(config):
    """What makes every expert count fully, by family."""
    if config.model_type == "glm4_moe":
        experts = config.n_routed_experts
        return {"num_experts_per_tok": experts, "routed_scaling_factor": float(experts)}
    if config.model_type == "qwen2_moe" and not config.norm_topk_prob:
        return {"num_experts_per_tok": config.num_experts}
    return None


def loss(model, windows):
    total, count = 0.0, 0
    for ids in windows:
        logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


@torch.no_grad()
def main():
    dense_path, mixture_path, *rest = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(mixture_path)
    texts = ["The lighthouse keeper wrote in his log every evening, whatever the weather was like. " * 8]
    if rest:
        texts = [json.loads(line)["text"] for line in open(rest[0])][:16]
    windows = [tokenizer(text, return_tensors="pt").input_ids[:, :512] for text in texts]
    dense = load(dense_path)
    mixture = load(mixture_path)
    print(f"{type(mixture).__name__}: nll {loss(mixture, windows):.4f}, dense {loss(dense, windows):.4f}")
    changes = all_on(mixture.config)
    if changes is None:
        print("this family has no setting in which all experts count fully at once")
        return
    whole = load(mixture_path, **changes)
    difference = (whole(windows[0]).logits - dense(windows[0]).logits).abs().max().item()
    print(f"all experts on: largest difference of a logit {difference:.2e}, "
          f"of the nll {loss(whole, windows) - loss(dense, windows):+.2e}")


main()
