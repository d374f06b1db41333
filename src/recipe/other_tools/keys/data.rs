//! Keys about the data.

use super::{ForeignKey, Meaning, Reading, key, not_built, said, same};

pub(super) const KEYS: &[ForeignKey] = &[
    key(
        &["datasets", "dataset", "dataset_name", "dataset_path", "data_path", "data_files", "train_file"],
        "data.train",
        Reading::Files,
    ),
    key(&["train_dataset", "train_data", "pretraining_dataset"], "data.train", Reading::Files),
    key(
        &["test_datasets", "eval_dataset", "eval_data", "eval_file", "validation_file", "valid_data", "eval"],
        "data.eval",
        Reading::Files,
    ),
    same(
        &["cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "max_length", "model_max_length"],
        "data.max_length",
    ),
    same(&["block_size", "seq_length", "max_sequence_length"], "data.max_length"),
    key(&["val_set_size", "val_size", "test_size", "eval_share"], "data.eval_share", Reading::Share),
    same(&["sample_packing", "packing", "neat_packing", "packed", "pack"], "data.pack"),
    key(&["train_on_inputs", "train_on_prompt"], "data.train_on", Reading::PromptLearned),
    key(
        &["mask_prompt", "completion_only_loss", "assistant_only_loss", "train_on_responses_only"],
        "data.train_on",
        Reading::AnswersLearned,
    ),
    same(&["train_on"], "data.train_on"),
    said(
        &[
            "eval_sample_packing",
            "eval_packing",
            "pad_to_sequence_len",
            "pad_to_max_length",
            "padding_free",
            "padding_side",
            "group_by_length",
            "length_column_name",
            "packing_strategy",
        ],
        "batches have no padding, so rows need no sorting by length",
    ),
    said(
        &["dataset_dir", "media_dir", "dataset_info"],
        "each file of `data.train` has its path, from the folder that the command runs in",
    ),
    said(
        &["type", "ds_type", "formatting", "dataset_format", "input_format"],
        "`format` beside the path of a file of `data.train` says what its records look like",
    ),
    not_built(
        &[
            "dataset_text_field",
            "text_column",
            "field",
            "field_*",
            "message_field_*",
            "message_property_mappings",
            "columns",
            "column_map",
            "text_feature",
            "prompt_feature",
            "completion_feature",
            "chat_feature",
        ],
        "records have the keys `messages`, `instruction` and `output`, `prompt` and `completion`, or `text`",
    ),
    not_built(
        &["split", "train_split", "dataset_split", "subset", "shards", "shards_idx", "preprocess_shards"],
        "each file of `data.train` is read whole",
    ),
    not_built(&["hf_dataset"], "data is read from `.jsonl` and `.json` files"),
    said(
        &["max_samples", "max_train_samples", "mix_strategy", "interleave_probs", "dataset_weights"],
        "`weight` beside the path of a file of `data.train` says how often its documents are seen, also below 1",
    ),
    said(
        &[
            "dataset_prepared_path",
            "dataset_processes",
            "dataset_num_proc",
            "dataset_kwargs",
            "dataloader_*",
            "preprocessing_*",
            "tokenized_path",
            "overwrite_cache",
            "streaming",
            "remove_unused_columns",
            "skip_prepare_dataset",
        ],
        "data is read and tokenized on all cores when a run begins",
    ),
    said(
        &[
            "chat_template",
            "chat_template_jinja",
            "chat_template_path",
            "default_system_message",
            "default_system",
            "template",
            "tool_format",
            "enable_thinking",
        ],
        "the chat template of the model is used, and `data.template` sets its variables",
    ),
    same(&["special_tokens"], "data.special_tokens"),
    ForeignKey {
        names: &["shuffle", "shuffle_merged_datasets"],
        meaning: Meaning::NotBuilt(&["true"], "documents come in an order that follows from `seed`"),
    },
    not_built(
        &["disable_shuffling", "curriculum_sampling"],
        "documents come in an order that follows from `seed`",
    ),
    not_built(
        &["roles_to_train", "train_on_eos", "train_on_eot", "roles", "mask_history", "efficient_eos"],
        "all answers are learned, unless a turn has `\"train\": false`",
    ),
];
