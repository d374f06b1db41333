"""Speed of generation, beside transformers and llama.cpp:

    cargo build --release --example bench_generate
    python examples/compare_generation.py MODEL.. [--runs 3] [--threads 2] [--prompt 512] [--tokens 128]

A MODEL is a folder, whose values decide between f32 and bf16, or a GGUF file. Folders are run by us and by transformers (with
torch), files by us and by llama.cpp (package `llama_cpp` or `xllamacpp`); `--torch-python` and `--llama-python` name the
interpreters that have them. All get the same random tokens as their prompt, continue them greedily with keys and values
kept, and take turns on the same machine, `--runs` times, each in a process of its own. Prints, as Markdown, medians over the runs:
tokens/s of the prompt and of decoding, our side divided by the other, peak memory, how many tokens from the first on are
the same, and the bytes of weights that are read per second of decoding beside the rate at which the machine reads a buffer
of that size. Run it when nothing else runs.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

BENCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../target/release/examples/bench_generate")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--llama-python", default=sys.executable)
    # How the script calls itself for one measurement of a peer.
    parser.add_argument("--peer")
    return parser.parse_args()


def random_tokens(count, vocab=8000):
    """Those of `bench_generate`, from the first 8000 of the vocabulary."""
    vocab = min(vocab, 8000)
    state, tokens = 42, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        tokens.append((state >> 33) % vocab)
    return tokens


def report(prompt_rate, rate, tokens):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-6
    print(json.dumps({"prompt_tokens_per_second": prompt_rate, "decode_tokens_per_second": rate, "peak_rss_mb": peak,
                      "tokens": tokens}))


def with_transformers(options):
    """The steps of `generate` without what it does around them: the fastest that the library can."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.models[0], dtype="auto").eval()
    prompt = torch.tensor([random_tokens(options.prompt, model.config.vocab_size)])
    with torch.inference_mode():
        model(prompt, use_cache=True, logits_to_keep=1)
        tokens, start = [], time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        tokens.append(output.logits[0, -1].argmax().item())
        first = time.perf_counter()
        for _ in range(options.tokens - 1):
            next_token = torch.tensor([tokens[-1:]])
            output = model(next_token, past_key_values=output.past_key_values, use_cache=True)
            tokens.append(output.logits[0, -1].argmax().item())
        end = time.perf_counter()
    report(options.prompt / (first - start), (options.tokens - 1) / (end - first), tokens)


def with_llama_cpp(options):
    import llama_cpp

    model = llama_cpp.Llama(options.models[0], n_ctx=options.prompt + options.tokens + 8, n_batch=options.prompt,
                            n_threads=options.threads, n_threads_batch=options.threads, verbose=False)
    prompt = random_tokens(options.prompt, model.n_vocab())
    for _ in range(2):
        model.reset()
        tokens, start = [], time.perf_counter()
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            first = first if tokens else time.perf_counter()
            tokens.append(token)
            if len(tokens) == options.tokens:
                break
        end = time.perf_counter()
    report(options.prompt / (first - start), (options.tokens - 1) / (end - first), tokens)


def with_xllamacpp(options):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.models[0]
    params.n_ctx, params.n_batch, params.n_ubatch = options.prompt + options.tokens + 8, options.prompt, options.prompt
    params.n_parallel, params.warmup = 1, True
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = options.threads
    server = xllamacpp.Server(params)
    request = {"prompt": random_tokens(options.prompt), "n_predict": options.tokens, "temperature": 0.0,
               "top_k": 1, "repeat_penalty": 1.0, "cache_prompt": False, "ignore_eos": True}
    for _ in range(2):
        timings = server.handle_completions(request)["timings"]
    # Tokens are told only beside their probabilities, which take time.
    told = server.handle_completions({**request, "n_probs": 1})["choices"][0]["logprobs"]["content"]
    report(timings["prompt_per_second"], timings["predicted_per_second"], [token["id"] for token in told])


PEERS = {"transformers": with_transformers, "llama_cpp": with_llama_cpp, "xllamacpp": with_xllamacpp}


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def llama(python):
    """Which of the two packages is there."""
    for name in ("llama_cpp", "xllamacpp"):
        if subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0:
            return name
    return None


def stored_type(model):
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    return "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "f32"


def measured(model, who, options):
    sizes = ["--prompt", str(options.prompt), "--tokens", str(options.tokens), "--threads", str(options.threads)]
    if who != "ours":
        python = options.torch_python if who == "transformers" else options.llama_python
        return run([python, os.path.abspath(__file__), model, "--peer", who, *sizes])
    dtype = "bf16" if model.endswith(".gguf") else stored_type(model)
    return run([BENCH, model, "--dtype", dtype, "--runs", "1", *sizes])


def agreement(ours, theirs):
    """How many tokens from the first on are the same."""
    same = [x == y for x, y in zip(ours, theirs)]
    return f"{(same + [False]).index(False)} of {len(ours)}" if theirs else "not known"


def main():
    options = arguments()
    if options.peer:
        return PEERS[options.peer](options)
    gguf = llama(options.llama_python)
    sides = {}
    for model in options.models:
        peer = gguf if model.endswith(".gguf") else "transformers"
        sides[model] = ["ours"] + ([peer] if peer else [])
    found = {(model, who): [] for model in options.models for who in sides[model]}
    for _ in range(options.runs):
        for model, who in found:
            result = measured(model, who, options)
            found[model, who].append(result)
            rates = [f"{result[f'{part}_tokens_per_second']:.1f}" for part in ("prompt", "decode")]
            print(model, who, *rates, "tokens/s", file=sys.stderr, flush=True)
    median = lambda side, key: statistics.median(result[key] for result in found[side])
    print("| model | who | prompt, tokens/s | ours to it | decoding, tokens/s | ours to it | peak memory | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for model, who in found:
        cells = [os.path.basename(model.rstrip("/")), who]
        for part in ("prompt", "decode"):
            rate, ours = (median((model, side), f"{part}_tokens_per_second") for side in (who, "ours"))
            cells += [f"{rate:.0f}" if part == "prompt" else f"{rate:.1f}", f"{ours / rate:.2f}"]
        cells.append(f"{median((model, who), 'peak_rss_mb'):.0f} MB")
        cells.append(agreement(found[model, "ours"][-1]["tokens"], found[model, who][-1]["tokens"]))
        print("| " + " | ".join(cells) + " |")
    print("\n| model | bytes of weights | read per second of decoding | a buffer of that size |\n|---|---|---|---|")
    for model in options.models:
        of = lambda key: median((model, "ours"), key)
        print(f"| {os.path.basename(model.rstrip('/'))} | {of('weight_bytes') / 1e6:.0f} MB "
              f"| {of('gb_per_second'):.1f} GB/s | {of('memory_gb_per_second'):.1f} GB/s |")


main()
