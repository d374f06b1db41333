//! Keys about the model and the adapter.

use super::{ForeignKey, Meaning, Reading, key, not_built, only, said, same};

pub(super) const KEYS: &[ForeignKey] = &[
    // The adapter.
    same(&["lora_r", "lora_rank", "r", "rank"], "adapter.rank"),
    same(&["lora_alpha", "alpha"], "adapter.alpha"),
    same(&["lora_dropout", "dropout"], "adapter.dropout"),
    same(&["use_rslora", "peft_use_rslora", "rslora"], "adapter.rslora"),
    key(
        &["lora_target_modules", "target_modules", "lora_target", "lora_attn_modules", "targets"],
        "adapter.targets",
        Reading::Targets,
    ),
    key(&["lora_target_linear"], "adapter.targets", Reading::AllLinear),
    key(&["init_lora_weights", "peft_init_lora_weights", "init"], "adapter.init", Reading::Init),
    same(&["lora_model_dir", "adapter_name_or_path", "from"], "adapter.from"),
    same(&["dropout_seed"], "adapter.dropout_seed"),
    same(&["experts"], "adapter.experts"),
    same(&["shared_experts"], "adapter.shared_experts"),
    ForeignKey {
        names: &["finetuning_type", "fine_tune_type", "adapter_type"],
        meaning: Meaning::Said(
            &["lora"],
            "an `[adapter]` table trains an adapter, and `train.full = true` trains all weights",
        ),
    },
    said(&["create_new_adapter"], "an adapter without `adapter.from` is a new one"),
    said(
        &["apply_lora_to_mlp", "apply_lora_to_output", "exclude_modules"],
        "`adapter.targets` names the layers that get an adapter, and the others get none",
    ),
    ForeignKey {
        names: &[
            "num_layers",
            "lora_layers",
            "layers_to_transform",
            "peft_layers_to_transform",
            "layers_pattern",
            "peft_layers_pattern",
        ],
        meaning: Meaning::Said(
            &["-1"],
            "adapters go to every layer, unless a regular expression in `adapter.targets` chooses by the path",
        ),
    },
    said(
        &["target_parameters", "lora_target_parameters"],
        "the experts of a mixture get an adapter as `adapter.targets` and `adapter.experts` say",
    ),
    said(&["fan_in_fan_out", "lora_fan_in_fan_out"], "the layout of a weight follows from the model"),
    not_built(&["use_dora", "peft_use_dora", "dora"], "a plain low-rank adapter is trained"),
    not_built(
        &["pissa_init", "pissa_*", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "loftq"],
        "the factors begin as `adapter.init` says, without a decomposition of the weights",
    ),
    not_built(
        &["loraplus_lr_ratio", "loraplus_lr_embedding", "embedding_lr", "embedding_lr_scale", "lr_groups"],
        "everything that is trained has the one rate `train.learning_rate`",
    ),
    not_built(
        &["modules_to_save", "lora_modules_to_save", "additional_target"],
        "nothing beside the adapter and the routers is trained",
    ),
    not_built(
        &["trainable_token_indices", "peft_trainable_token_indices", "add_tokens", "added_tokens", "tokens"],
        "the vocabulary and its embeddings stay as they are",
    ),
    not_built(
        &["resize_vocab", "resize_token_embeddings_to_32x", "new_special_tokens", "add_special_tokens"],
        "the vocabulary and its embeddings stay as they are",
    ),
    not_built(&["rank_pattern", "alpha_pattern"], "all layers have the rank and alpha of `[adapter]`"),
    only(&["bias", "lora_bias"], &["none"], "biases stay as they are"),
    only(
        &["task_type", "peft_type"],
        &["CAUSAL_LM", "LORA"],
        "low-rank adapters of language models are trained",
    ),
    not_built(
        &["relora*", "lisa_*", "use_llama_pro", "freeze_*", "unfrozen_parameters", "oft_*", "module_dropout"],
        "an adapter is trained, or all weights with `train.full = true`",
    ),
    // The model.
    same(
        &[
            "base_model",
            "model_name_or_path",
            "model_name",
            "pretrained_model_name_or_path",
            "model_path",
            "model_id",
            "source",
        ],
        "model.source",
    ),
    key(&["torch_dtype", "dtype", "model_dtype", "compute_dtype"], "model.dtype", Reading::Dtype),
    key(&["bf16", "bfloat16", "pure_bf16", "bf16_full_eval"], "model.dtype", Reading::Bf16),
    not_built(
        &["fp16", "float16", "fp16_full_eval", "fp8"],
        "`model.dtype` is \"auto\", \"f32\" or \"bf16\"",
    ),
    not_built(&["tf32"], "it is a mode of GPUs, and training runs on the CPU"),
    not_built(
        &[
            "load_in_4bit",
            "load_in_8bit",
            "quantization_bit",
            "quantization_method",
            "bnb_*",
            "double_quantization",
            "gptq",
        ],
        "weights keep the form of their files, so a quantized GGUF file in `model.source` stays quantized",
    ),
    not_built(&["trust_remote_code"], "no code that comes with a model is run"),
    said(
        &["revision_of_model", "model_revision", "revision"],
        "a Hub id may end with its revision: `org/name@revision`",
    ),
    said(
        &[
            "model_type",
            "tokenizer_type",
            "tokenizer",
            "tokenizer_name",
            "tokenizer_name_or_path",
            "tokenizer_config",
            "tokenizer_use_fast",
            "use_fast_tokenizer",
            "is_llama_derived_model",
            "is_mistral_derived_model",
            "eos_token",
            "pad_token",
        ],
        "architecture, tokenizer and its tokens are those of the model's folder",
    ),
    not_built(&["rope_scaling", "rope_theta"], "positions follow the configuration of the model"),
    said(
        &["flash_attention", "flash_attn", "attn_implementation", "attention", "use_flash_attention_2"],
        "attention has one implementation, which needs no switch",
    ),
    said(
        &["xformers_attention", "sdp_attention", "flex_attention", "eager_attention", "s2_attention"],
        "attention has one implementation, which needs no switch",
    ),
    only(&["device", "device_map", "use_cpu", "no_cuda"], &["cpu", "true"], "training runs on the CPU"),
];
