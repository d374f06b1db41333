"""Speed and memory of fine-tuning with LoRA, beside HF PEFT on PyTorch:

    cargo build --release --example bench_train
    python examples/compare_training.py F32_MODEL BF16_MODEL [--runs 3] [--threads 2] [--rank 16] [--targets mlp|all]
        [--batch 4] [--length 512] [--only f32|bf16] [--peers eager,compiled] [--isa avx2|avx512|avx512-bf16|amx]
        [--sides f32:ours,bf16:ours,f32:eager]
    python examples/compare_training.py --experts 8 [--active 2] ..

Both sides train rank-16 adapters beside gate, up and down on 4 x 512 random tokens without padding, all labelled, with AdamW, and
take turns on the same machine: ours, then each of the peers, `--runs` times. Prints, as Markdown, the medians over the runs: tokens/s
(of a run: the median of its steps after two), the highest resident memory, seconds from the start of the process to the end of
the first forward, and the share of the ceiling: what the step would take if it were only multiply-adds at the rate of the
faster side's products. With `--experts` the model is a mixture of SmolLM2-135M's size with random weights, in Mixtral's layout,
that is written to a folder of its own first, and the adapters are on attention and all experts. `--sides` names
those that take turns, for others that are known to be slow need not run. `--isa` limits both sides to the same
instructions: ours by PEFT_KERNELS (unless they are the newest here), the peers by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS. The last column
is the ratio to the fastest peer of any type, which is the one to beat where bf16 is slow. Needs torch, transformers and peft; run it when nothing else does.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

BEGIN = time.time()
# What limits PyTorch's own loops, oneDNN and MKL to the instructions of a name.
LIMITS = {
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512-bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("default", "DEFAULT", "AVX512"),
}
ENVIRONMENT = dict(os.environ)
BENCH = os.environ.get("BENCH_TRAIN") or os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "../target/release/examples/bench_train")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="mlp")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only")
    parser.add_argument("--peers", default="eager,compiled")
    parser.add_argument("--isa", choices=LIMITS)
    parser.add_argument("--sides")
    # How the script calls itself for one measurement of the peer.
    parser.add_argument("--peer")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def peer(options):
    """One run of HF PEFT in this process; prints JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.peer]
    names = ["gate_proj", "up_proj", "down_proj"]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if options.targets == "all":
        names += attention
    # Of PEFT's and transformers' ways the fastest on this machine for a mixture.
    how = {"experts_implementation": "grouped_mm"} if options.experts else {}
    model = AutoModelForCausalLM.from_pretrained(options.models[0], dtype=dtype, **how)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    vocabulary = model.config.vocab_size
    parameters = None
    if options.experts:
        names, parameters = attention, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=options.rank, lora_alpha=32, target_modules=names, target_parameters=parameters,
                        task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()
    if options.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, vocabulary, (options.batch, options.length))
    rates, first = [], None
    for _ in range(options.steps):
        start = time.time()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        first = first or time.time() - BEGIN
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(tokens.numel() / (time.time() - start))
    print(json.dumps({
        "tokens_per_second": statistics.median(rates[2:]),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds_to_first_forward": first,
        "product_gflops": product_rate(torch, shapes, dtype, options.batch * options.length),
    }))


def product_rate(torch, shapes, dtype, tokens):
    """GFLOP/s over all layers' products, forward and for the gradient of the input, each shape at its best of five."""
    work = seconds = 0.0
    with torch.no_grad():
        for (n, k) in sorted(set(shapes)):
            x, w = torch.randn(tokens, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
            dy = torch.randn(tokens, n, dtype=dtype)
            for product in (lambda: torch.nn.functional.linear(x, w), lambda: dy @ w):
                best = min(timed(product) for _ in range(5))
                seconds += shapes.count((n, k)) * best
                work += shapes.count((n, k)) * 2.0 * tokens * n * k
    return work / seconds / 1e9


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def mixture(folder, dtype, options):
    """A mixture of SmolLM2-135M's size with random weights."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536 // options.experts, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, num_local_experts=options.experts,
        num_experts_per_tok=options.active, tie_word_embeddings=True, output_router_logits=True,
        max_position_embeddings=2048, sliding_window=None)
    MixtralForCausalLM(config).to({"f32": torch.float32, "bf16": torch.bfloat16}[dtype]).save_pretrained(folder)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(model, dtype, options):
    return run([BENCH, model, "--dtype", dtype, "--batch", str(options.batch), "--length", str(options.length),
                "--rank", str(options.rank), "--targets", options.targets, "--steps", str(options.steps),
                "--threads", str(options.threads), "--products"])


def theirs(model, dtype, compiled, options):
    command = [sys.executable, os.path.abspath(__file__), model, "--peer", dtype]
    for name in ("batch", "length", "rank", "targets", "steps", "threads", "experts"):
        command += [f"--{name}", str(getattr(options, name))]
    return run(command + (["--compile"] if compiled else []))


def limit(isa):
    """Environment variables that keep both sides to the same instructions. Where they are the newest of the machine, our
    side measures, as it does by itself, whether older ones are faster."""
    aten, onednn, mkl = LIMITS[isa]
    if isa != newest():
        ENVIRONMENT["PEFT_KERNELS"] = isa
    ENVIRONMENT["ONEDNN_MAX_CPU_ISA"] = onednn
    ENVIRONMENT["MKL_ENABLE_INSTRUCTIONS"] = mkl
    if aten != "default":
        ENVIRONMENT["ATEN_CPU_CAPABILITY"] = aten


def newest():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    names = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2"}
    return next((name for flag, name in names.items() if flag in flags), None)


def main():
    options = arguments()
    if options.peer:
        return peer(options)
    if options.isa:
        limit(options.isa)
    dtypes = [options.only] if options.only else ["f32", "bf16"]
    models = dict(zip(["f32", "bf16"], options.models if len(options.models) > 1 else options.models * 2))
    if options.experts:
        options.targets = "all"
        folder = tempfile.TemporaryDirectory()
        models = {dtype: os.path.join(folder.name, dtype) for dtype in dtypes}
        for dtype, path in models.items():
            mixture(path, dtype, options)
    elif not models:
        sys.exit("expected a model, or --experts")
    sides = [(dtype, name) for dtype in dtypes for name in ["ours"] + options.peers.split(",")]
    if options.sides:
        sides = [tuple(side.split(":")) for side in options.sides.split(",")]
        known = [(dtype, name) for dtype in ("f32", "bf16") for name in ("ours", "eager", "compiled")]
        if not set(sides) <= set(known):
            sys.exit(f"--sides is {options.sides}; expected some of "
                     + ",".join(":".join(side) for side in known))
        dtypes = sorted({dtype for dtype, _ in sides})
    found = {side: [] for side in sides}
    for _ in range(options.runs):
        for dtype, name in sides:
            model = models[dtype]
            result = ours(model, dtype, options) if name == "ours" else theirs(model, dtype, name == "compiled", options)
            found[dtype, name].append(result)
            print(dtype, name, json.dumps(result), file=sys.stderr, flush=True)
    median = lambda side, key: statistics.median(result[key] for result in found[side])
    peers = [side for side in sides if side[1] != "ours"]
    fastest = max(median(side, "tokens_per_second") for side in peers)
    print("| | tokens/s | ratio to ours | peak memory | start to first forward | share of the ceiling | ratio to the fastest peer |")
    print("|---|---|---|---|---|---|---|")
    for dtype, name in sides:
        speed = median((dtype, name), "tokens_per_second")
        rate = max(median(side, "product_gflops") for side in sides if side[0] == dtype)
        ceiling = rate * 1e9 / median((dtype, "ours"), "flops_per_token")
        print(f"| {dtype}, {name} | {speed:.0f} | {speed / median((dtype, 'ours'), 'tokens_per_second'):.2f} "
              f"| {median((dtype, name), 'peak_rss_mb') * 1.048576 / 1000:.2f} GB "
              f"| {median((dtype, name), 'seconds_to_first_forward'):.1f} s | {100 * speed / ceiling:.0f}% "
              f"| {speed / fastest:.2f} |")


main()
