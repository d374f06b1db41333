//! Keys about training, its results, and what other tools train for.

use super::{ForeignKey, Meaning, Reading, key, not_built, only, said, same};

const ADAMW: &str =
    "the optimizer is AdamW with betas of 0.9 and 0.999, an epsilon of 1e-8 and a state in f32";
const PREFERENCES: &str = "texts and answers are trained on, and no preferences or rewards";

pub(super) const KEYS: &[ForeignKey] = &[
    key(
        &["max_steps", "iters", "max_iters", "num_training_steps", "steps"],
        "train.steps",
        Reading::MaxSteps,
    ),
    same(&["num_train_epochs", "num_epochs", "epochs"], "train.epochs"),
    same(
        &["micro_batch_size", "per_device_train_batch_size", "train_batch_size", "batch_size"],
        "train.batch_size",
    ),
    same(
        &["gradient_accumulation_steps", "grad_accumulation_steps", "accumulate_grad_batches", "accumulate"],
        "train.accumulate",
    ),
    same(&["learning_rate", "lr"], "train.learning_rate"),
    key(
        &["lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler", "schedule"],
        "train.schedule",
        Reading::Schedule,
    ),
    same(&["warmup_ratio", "warmup"], "train.warmup"),
    key(&["warmup_steps", "num_warmup_steps", "lr_warmup_steps"], "train.warmup", Reading::WarmupSteps),
    same(&["weight_decay"], "train.weight_decay"),
    same(
        &["max_grad_norm", "gradient_clipping", "gradient_clip_val", "clip_grad_norm", "grad_clip"],
        "train.max_grad_norm",
    ),
    key(
        &["eval_steps", "steps_per_eval", "eval_interval", "evaluation_steps", "eval_every"],
        "train.eval_every",
        Reading::Interval,
    ),
    key(&["eval_strategy", "evaluation_strategy"], "train.eval_every", Reading::Strategy),
    key(
        &["save_steps", "steps_per_save", "save_interval", "save_every"],
        "train.save_every",
        Reading::Interval,
    ),
    key(&["save_strategy"], "train.save_every", Reading::Strategy),
    same(&["save_total_limit", "keep"], "train.keep"),
    key(
        &[
            "gradient_checkpointing",
            "grad_checkpoint",
            "use_gradient_checkpointing",
            "enable_activation_checkpointing",
            "activation_checkpointing",
            "checkpoint",
        ],
        "train.recompute",
        Reading::Recompute,
    ),
    same(&["memory_budget"], "train.memory_budget"),
    same(&["full"], "train.full"),
    same(&["router"], "train.router"),
    same(&["router_aux_loss_coef", "moe_aux_loss_coef"], "losses.switch"),
    same(&["router_z_loss_coef", "z_loss_coef"], "losses.z"),
    same(&["teacher_model", "teacher_model_name_or_path", "teacher"], "distill.teacher"),
    same(&["kd_temperature"], "distill.temperature"),
    same(&["seed", "random_state", "random_seed", "data_seed"], "seed"),
    same(&["output_dir", "adapter_path", "save_dir", "out_dir", "output"], "output"),
    said(&["evals_per_epoch"], "`train.eval_every` is a number of steps"),
    said(&["saves_per_epoch", "save_every_n_epochs"], "`train.save_every` is a number of steps"),
    said(
        &[
            "eval_batch_size",
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "val_batches",
            "eval_on_start",
            "eval_delay",
            "do_eval",
        ],
        "each evaluation goes over all its data, also before the first step",
    ),
    said(
        &[
            "logging_*",
            "steps_per_report",
            "log_every_n_steps",
            "plot_loss",
            "include_tokens_per_second",
            "include_num_input_tokens_seen",
            "include_tkps",
            "disable_tqdm",
        ],
        "every step is a line of `metrics.jsonl` in the run directory",
    ),
    only(
        &["report_to", "run_name", "wandb", "wandb_*", "use_wandb", "swanlab_*", "use_swanlab", "mlflow_*"],
        &["none", ""],
        "no tracking service is told, and the figures are in `metrics.jsonl` of the run directory",
    ),
    not_built(
        &["use_mlflow", "comet_*", "use_comet", "use_tensorboard", "use_trackio", "trackio_*", "profiler*"],
        "no tracking service is told, and the figures are in `metrics.jsonl` of the run directory",
    ),
    said(
        &["load_best_model_at_end", "metric_for_best_model", "greater_is_better"],
        "the run leaves the weights of its lowest evaluation loss unless `train.final` is \"last\"",
    ),
    not_built(
        &["early_stopping_patience", "early_stopping", "early_stopping_threshold"],
        "a run goes to its last step, and its best weights are in `best/` of the run directory",
    ),
    not_built(
        &["gradient_checkpointing_kwargs", "activation_offloading", "enable_activation_offloading"],
        "what is computed again follows `train.recompute`",
    ),
    not_built(
        &["lr_scheduler_kwargs", "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "min_lr", "min_lr_ratio"],
        "the learning rate falls to zero, unless `train.schedule` is \"constant\"",
    ),
    only(&["optimizer", "optim"], &["adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "AdamW"], ADAMW),
    only(&["adam_beta1"], &["0.9"], ADAMW),
    only(&["adam_beta2"], &["0.999"], ADAMW),
    only(&["adam_epsilon"], &["0.00000001"], ADAMW),
    not_built(
        &["optim_args", "optimizer_config", "optim_target_modules", "use_galore", "galore_*", "use_apollo"],
        ADAMW,
    ),
    not_built(&["apollo_*", "use_badam", "badam_*", "use_adam_mini", "use_muon"], ADAMW),
    said(
        &["resume_from_checkpoint", "auto_resume_from_checkpoints", "ignore_data_skip"],
        "the flag `--resume` of `peft finetune` goes on from the newest checkpoint",
    ),
    said(
        &["save_only_model", "save_safetensors", "save_adapter_weights_only", "save_first_step"],
        "a checkpoint holds what is trained and the optimizer, as safetensors",
    ),
    not_built(
        &["overwrite_output_dir"],
        "files that a run did not write are never written over; choose another `output`",
    ),
    not_built(
        &["deepspeed", "fsdp", "fsdp_*", "ddp_*", "local_rank", "world_size", "num_gpus", "ray_*", "use_ray"],
        "a run uses one process on one machine",
    ),
    not_built(
        &["tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "accelerator_config"],
        "a run uses one process on one machine",
    ),
    not_built(&["push_to_hub", "hub_*"], "the result stays in the run directory"),
    not_built(&["neftune_noise_alpha", "noisy_embedding_alpha"], "embeddings get no noise"),
    not_built(&["label_smoothing_factor", "label_smoothing"], "the loss is the plain cross-entropy"),
    said(
        &["torch_compile", "compile", "use_liger_kernel", "enable_liger_kernel", "liger_*", "use_unsloth"],
        "the fastest kernels of the processor are chosen when a run begins",
    ),
    said(
        &["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "cut_cross_entropy", "unsloth_*", "plugins"],
        "the fastest kernels of the processor are chosen when a run begins",
    ),
    ForeignKey {
        names: &["do_train"],
        meaning: Meaning::Said(&["true"], "`peft finetune` trains, and `peft check` only plans"),
    },
    said(
        &["do_predict", "predict_with_generate", "test_batches", "max_new_tokens"],
        "`peft eval perplexity` and `peft generate` take the result of a run",
    ),
    not_built(&["loss_watchdog_*", "auto_find_batch_size"], "a run keeps to its recipe to the end"),
    said(&["strict"], "an unknown key of a recipe is always refused"),
    // Other objectives.
    only(&["stage"], &["sft", "pt"], PREFERENCES),
    only(&["training_mode", "train_mode"], &["normal", "sft"], PREFERENCES),
    only(&["loss_type"], &["nll"], PREFERENCES),
    not_built(&["rl", "rl_*", "beta", "dpo_*", "pref_*", "kto_*", "ppo_*", "orpo_*", "simpo_*"], PREFERENCES),
    not_built(
        &["ref_model*", "reward_model*", "rpo_alpha", "cpo_alpha", "trl", "num_generations"],
        PREFERENCES,
    ),
    not_built(&["precompute_ref_log_probs", "max_prompt_length", "max_completion_length"], PREFERENCES),
];
