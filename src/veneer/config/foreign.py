"""Names our setting for those of TRL, PEFT, Transformers, Axolotl, LLaMA-Factory and Unsloth; the file is a long table.

CALLED has those with the same meaning and scale under another name. INSTEAD has all others: what serves the purpose
here, or that there is nothing and why. A guess by likeness would send `min_length` to `max_length`; so only a
misspelling of one of our own names is answered with that name (`misspelt`).
"""

from collections.abc import Iterable

CALLED: dict[str, str] = {
    # the base
    "base_model": "model.base",
    "base_model_name_or_path": "model.base",
    "model_id": "model.base",
    "model_name": "model.base",
    "model_name_or_path": "model.base",
    "model_path": "model.base",
    "pretrained_model_name_or_path": "model.base",
    "model_revision": "model.revision",
    # quantization
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "double_quantization": "quantization.double_quant",
    "use_double_quant": "quantization.double_quant",
    # the adapter
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_target_modules": "adapter.target_modules",
    "peft_use_rslora": "adapter.use_rslora",
    # data
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "sample_packing": "data.packing",
    "default_system_message": "data.system_prompt",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "dataset_num_proc": "data.workers",
    "dataset_processes": "data.workers",
    "preprocessing_num_workers": "data.workers",
    # the loop
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "micro_batch_size": "train.per_device_train_batch_size",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "clip_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "max_gradient_norm": "train.max_grad_norm",
    "output_path": "train.output_dir",
}

_FOUR_BITS = "write the section `quantization: {bits: 4}`, or leave it out for 16 bits"
_EIGHT_BITS = f"nothing: weights are not stored in 8 bits; {_FOUR_BITS}"
_PRECISION = "`model.dtype` says what is computed in; auto is bfloat16 where the machine has it"
_TF32 = "nothing: float32 products are exact; `model.dtype: bfloat16` is the fast way"
_ATTENTION = "`model.attn_implementation` chooses for the reference engine; the fused engine has its own"
_ENGINE = "`train.engine: auto` takes the hand-written kernels wherever they cover the model"
_ONE_GPU = "nothing: a run takes one GPU; `veneer plan` says what makes it fit there"
_RECORDS = "nothing: numbers are in metrics.jsonl and loss.png of the run's folder"
_HUB = "`veneer push RUN --repo OWNER/NAME` sends a finished adapter"
_TOKEN = "the hub's own login is used: `hf auth login`, or HF_TOKEN in the environment"
_REMOTE = "nothing: code from a hub is never run; the architecture must be one that Transformers has"
_WARMUP = "`train.warmup_ratio` is the share of all steps in which the rate rises"
_EVALS = "`train.eval_steps` is the number of steps between held-out losses; null: only at the end"
_SAVES = "`train.save_steps` is the number of steps between checkpoints; null: only on interruption"
_BEST = "nothing: the adapter is that of the last step; `train.save_total_limit` keeps earlier checkpoints, which "
_BEST += "generate and merge take too"
_FROZEN = "nothing: all but the adapter's matrices stays frozen"
_ADAPTER = "the section is called `adapter` here"
_TRAIN = "the section is called `train` here"
_PLAIN_LORA = "nothing: the adapter is plain LoRA; `adapter.use_rslora` is its one variant"
_ONE_RANK = "nothing: `adapter.r` and `adapter.lora_alpha` hold for all adapted modules"
_LAYERS = "name modules by the end of their paths in `adapter.target_modules`, as [layers.0.self_attn.q_proj]"
_ADAM = "nothing: AdamW has betas 0.9 and 0.999 and epsilon 1e-8; `train.optim` chooses its kind"
_GROUPED = "nothing: batches hold rows of like length as it is, and are padded to their longest row"
_LOADER = "nothing: batches are cut from tokens that lie ready on disk; `data.workers` makes those"
_TARGETS = "`data.loss_on` says which tokens are trained: assistant, last, completion or all"
_FILES = "`data.train` takes files, globs, folders or a hub id, and `data.validation` those that are held out"
_TEMPLATE = "`data.chat_template` takes auto, a name such as chatml or llama-3, or a Jinja file"
_RESUME = "`veneer train ... --resume` goes on from the run's last checkpoint"
_CHECKPOINTING = "`train.gradient_checkpointing` takes true, false or auto, and is never the reentrant kind"
_TOKENIZER = "nothing: the tokenizer is the base's own, in its fast form"
_VOCABULARY = "nothing: tokenizer and embeddings stay as they are; add tokens to the base and save it first"
_PREFERENCE = "nothing: training learns from single answers; `data.format: chosen` takes the preferred ones of pairs"
_REGULAR = "nothing: the loss is the plain cross-entropy of the trained tokens"
_SCHEDULE = "nothing: `train.lr_scheduler_type` decays to 0 (constant stays)"
_SEED = "`train.seed` is one for the adapter's initial values, the order of the rows and dropout"
_HELD_OUT = "`evaluate.batch_size` is the number of held-out rows at a time, for their loss and for answers"

INSTEAD: dict[str, str] = {
    # precision and quantization
    "load_in_4bit": _FOUR_BITS,
    "load_in_8bit": _EIGHT_BITS,
    "quantization_bit": _FOUR_BITS,
    "quantization_method": "nothing: 4 bits are always bitsandbytes'; `quantization.quant_type` is nf4 or fp4",
    "quantization_config": _FOUR_BITS,
    "bnb_config": _FOUR_BITS,
    "bnb_4bit_compute_dtype": _PRECISION,
    "gptq": _FOUR_BITS,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "float16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_dtype": _PRECISION,
    "mixed_precision": _PRECISION,
    "pure_bf16": _PRECISION,
    "compute_dtype": _PRECISION,
    "fp8": "nothing: products in 8 bits lie outside the error that is allowed here",
    "tf32": _TF32,
    # the base
    "trust_remote_code": _REMOTE,
    "tokenizer": _TOKENIZER,
    "tokenizer_name": _TOKENIZER,
    "tokenizer_config": _TOKENIZER,
    "tokenizer_type": _TOKENIZER,
    "use_fast_tokenizer": _TOKENIZER,
    "tokenizer_use_fast": _TOKENIZER,
    "model_type": "nothing: the architecture is read from the base's config.json",
    "base_model_config": "nothing: the configuration is read from the base's config.json",
    "special_tokens": _VOCABULARY,
    "tokens": _VOCABULARY,
    "resize_vocab": _VOCABULARY,
    "resize_token_embeddings": _VOCABULARY,
    "rope_scaling": "nothing: positions are as the base's config.json says; change them there",
    "device_map": _ONE_GPU,
    "max_memory": "`veneer plan --gpu 24GiB` says what fits; a run takes what memory its GPU has",
    "low_cpu_mem_usage": "nothing: weights always go to the device as they are read",
    "cache_dir": "HF_HOME in the environment says where the hub's files are kept",
    "token": _TOKEN,
    "hf_token": _TOKEN,
    "use_auth_token": _TOKEN,
    "hf_use_auth_token": _TOKEN,
    # attention and kernels
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "use_flash_attention": _ATTENTION,
    "use_flash_attention_2": _ATTENTION,
    "attention_implementation": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "eager_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "use_liger_kernel": _ENGINE,
    "use_liger": _ENGINE,
    "liger_kernel": _ENGINE,
    "use_unsloth": _ENGINE,
    "lora_mlp_kernel": _ENGINE,
    "lora_qkv_kernel": _ENGINE,
    "lora_o_kernel": _ENGINE,
    "plugins": _ENGINE,
    "torch_compile": _ENGINE,
    # the adapter
    "lora": _ADAPTER,
    "lora_config": _ADAPTER,
    "peft": _ADAPTER,
    "peft_config": _ADAPTER,
    "use_peft": "nothing: the base itself is never trained; the section `adapter` says how",
    "finetuning_type": f"{_PLAIN_LORA}; with the section `quantization` it is QLoRA",
    "peft_type": f"{_PLAIN_LORA}; with the section `quantization` it is QLoRA",
    "full_finetuning": f"{_FROZEN}; `adapter.r` up to 4096 comes nearest",
    "lora_target": "`adapter.target_modules` takes all-linear or a list, as [q_proj, v_proj]",
    "lora_target_linear": "`adapter.target_modules: all-linear`, which is the default",
    "modules_to_save": _FROZEN,
    "lora_modules_to_save": _FROZEN,
    "additional_target": _FROZEN,
    "unfrozen_parameters": _FROZEN,
    "bias": f"{_FROZEN}, biases too",
    "lora_bias": f"{_FROZEN}, biases too",
    "task_type": "nothing: it is always CAUSAL_LM",
    "init_lora_weights": "nothing: A begins random (by `train.seed`) and B at zero, as is PEFT's default",
    "peft_init_lora_weights": "nothing: A begins random (by `train.seed`) and B at zero, as is PEFT's default",
    "loftq_config": "nothing: A begins random (by `train.seed`) and B at zero, as is PEFT's default",
    "use_dora": _PLAIN_LORA,
    "peft_use_dora": _PLAIN_LORA,
    "pissa_init": _PLAIN_LORA,
    "layers_to_transform": _LAYERS,
    "peft_layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "exclude_modules": "name the modules that are adapted in `adapter.target_modules`, by the end of their paths",
    "target_parameters": "nothing: adapters go on linear layers and embeddings, by `adapter.target_modules`",
    "rank_pattern": _ONE_RANK,
    "alpha_pattern": _ONE_RANK,
    "fan_in_fan_out": "nothing: it follows from the kind of each layer",
    "lora_model_dir": f"nothing: a new run begins with a new adapter; {_RESUME}",
    "adapter_name_or_path": f"nothing: a new run begins with a new adapter; {_RESUME}",
    "merge_lora": "`veneer merge RUN --out FOLDER` makes one model of base and adapter",
    # data
    "dataset": _FILES,
    "datasets": _FILES,
    "dataset_name": _FILES,
    "dataset_path": _FILES,
    "dataset_dir": _FILES,
    "train_file": _FILES,
    "train_dataset": _FILES,
    "eval_dataset": _FILES,
    "test_datasets": _FILES,
    "validation_file": _FILES,
    "dataset_config": "`data.subset` is a hub dataset's configuration",
    "dataset_train_split": "`data.split` is the split of a hub dataset",
    "dataset_text_field": "`data.columns: {text: NAME}` says which column holds the text",
    "field_messages": "`data.columns: {messages: NAME}` says which column holds the turns",
    "formatting_func": "`data.columns` names the columns, and `data.chat_template` the template",
    "dataset_prepared_path": "nothing: tokens are always kept in Veneer's cache (VENEER_CACHE in the environment)",
    "template": _TEMPLATE,
    "chat_template_jinja": _TEMPLATE,
    "chat_template_path": _TEMPLATE,
    "conversation_template": _TEMPLATE,
    "cutoff_len": "`data.max_length` is the limit, and `data.overlong: truncate` cuts longer rows instead of leaving "
    "them out",
    "max_prompt_length": "`data.max_length` limits prompt and answer together",
    "excess_length_strategy": "`data.overlong` says what becomes of rows longer than `data.max_length`",
    "max_samples": "`data.limit` takes the first rows, `data.sample` as many by chance",
    "max_train_samples": "`data.limit` takes the first rows, `data.sample` as many by chance",
    "streaming": "nothing: files larger than memory are read in pieces and lie as tokens on disk",
    "shuffle_dataset": "nothing: rows are always shuffled, by `train.seed`",
    "pad_to_sequence_len": _GROUPED,
    "pad_to_multiple_of": _GROUPED,
    "padding_free": "`data.packing: true` fills sequences with rows that never see each other",
    "packing_strategy": "nothing: with `data.packing` whole rows are packed, none is cut",
    "eval_packing": "nothing: held-out rows are never packed",
    "group_by_length": _GROUPED,
    "length_column_name": _GROUPED,
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_drop_last": "nothing: every row is trained on; the last step of an epoch may be smaller",
    "remove_unused_columns": "nothing: columns that the format does not have are not read",
    "train_on_inputs": _TARGETS,
    "completion_only_loss": _TARGETS,
    "assistant_only_loss": _TARGETS,
    "train_on_prompt": _TARGETS,
    "mask_history": _TARGETS,
    "roles_to_train": _TARGETS,
    "train_on_eos": "nothing: the end-of-turn token after a trained answer is always trained",
    # the loop
    "training": _TRAIN,
    "trainer": _TRAIN,
    "training_args": _TRAIN,
    "training_arguments": _TRAIN,
    "eval": "the section is called `evaluate` here",
    "evaluation": "the section is called `evaluate` here",
    "batch_size": "rows of a micro-batch are `train.per_device_train_batch_size`, those of a step that times "
    "`train.gradient_accumulation_steps`; answers are generated by `evaluate.batch_size`",
    "train_batch_size": "rows of a micro-batch are `train.per_device_train_batch_size`, those of a step that times "
    "`train.gradient_accumulation_steps`",
    "auto_find_batch_size": "`veneer plan` says what fits before anything is loaded",
    "warmup_steps": _WARMUP,
    "warmup": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "lr_scheduler_kwargs": _SCHEDULE,
    "cosine_min_lr_ratio": _SCHEDULE,
    "min_lr": _SCHEDULE,
    "adam_beta1": _ADAM,
    "adam_beta2": _ADAM,
    "adam_epsilon": _ADAM,
    "optim_args": _ADAM,
    "loraplus_lr_ratio": "nothing: A and B have the same `train.learning_rate`",
    "embedding_learning_rate": "nothing: all of the adapter has the same `train.learning_rate`",
    "neftune_noise_alpha": _REGULAR,
    "noisy_embedding_alpha": _REGULAR,
    "label_smoothing_factor": _REGULAR,
    "use_reentrant": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "use_gradient_checkpointing": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "activation_offloading": f"nothing: activations are kept on the GPU or recomputed; {_CHECKPOINTING}",
    "deepspeed": _ONE_GPU,
    "fsdp": _ONE_GPU,
    "fsdp_config": _ONE_GPU,
    "ddp": _ONE_GPU,
    "ddp_backend": _ONE_GPU,
    "ddp_timeout": _ONE_GPU,
    "ddp_find_unused_parameters": _ONE_GPU,
    "local_rank": _ONE_GPU,
    "num_gpus": _ONE_GPU,
    "tensor_parallel_size": _ONE_GPU,
    "context_parallel_size": _ONE_GPU,
    "sequence_parallel_degree": _ONE_GPU,
    "evaluation_strategy": _EVALS,
    "eval_strategy": _EVALS,
    "evals_per_epoch": _EVALS,
    "do_eval": _EVALS,
    "do_train": "`veneer train` trains, `veneer evaluate` evaluates",
    "save_strategy": _SAVES,
    "saves_per_epoch": _SAVES,
    "logging_strategy": "`train.logging_steps` is the number of steps between lines of metrics.jsonl",
    "logging_first_step": "nothing: `train.logging_steps: 1`, the default, logs every step",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "early_stopping_patience": _BEST,
    "resume_from_checkpoint": _RESUME,
    "auto_resume_from_checkpoints": _RESUME,
    "overwrite_output_dir": "`veneer train ... --overwrite` replaces the run in `train.output_dir`",
    "save_safetensors": "nothing: weights are always written as safetensors",
    "report_to": _RECORDS,
    "run_name": "the run's name is its folder, `train.output_dir`",
    "logging_dir": _RECORDS,
    "wandb_project": _RECORDS,
    "use_wandb": _RECORDS,
    "mlflow_tracking_uri": _RECORDS,
    "use_tensorboard": _RECORDS,
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _TOKEN,
    "full_determinism": "nothing: the fused engine gives the same bits for the same step as it is",
    "random_state": _SEED,
    "data_seed": _SEED,
    # evaluation, generation, objectives
    "eval_batch_size": _HELD_OUT,
    "per_device_eval_batch_size": _HELD_OUT,
    "per_gpu_eval_batch_size": _HELD_OUT,
    "max_eval_samples": "`data.validation` says how many rows are held out, `evaluate.rows` how many are answered",
    "generation_max_length": "`evaluate.max_new_tokens` counts the tokens of the answer alone",
    "eval_max_new_tokens": "`evaluate.max_new_tokens` is the longest answer that `veneer evaluate` generates",
    "rl": _PREFERENCE,
    "stage": _PREFERENCE,
    "loss_type": _PREFERENCE,
    "beta": _PREFERENCE,
    "dpo_beta": _PREFERENCE,
    "num_generations": _PREFERENCE,
    "predict_with_generate": "nothing: `veneer evaluate` always generates answers, to `evaluate.rows` held-out rows",
    "temperature": "evaluation takes the likeliest answer; `veneer generate` samples (--temperature, --top-p, --top-k)",
    "top_p": "evaluation takes the likeliest answer; `veneer generate` samples (--temperature, --top-p, --top-k)",
}


def foreign(name: str) -> str | None:
    """Advice on what to write instead of another tool's setting; None: it is not known as one."""
    name = name.lower().replace("-", "_")
    if name in CALLED:
        return f"it is called `{CALLED[name]}` here"
    if name not in INSTEAD:
        return None
    instead = INSTEAD[name]
    if "is called" in instead:
        return instead
    kind, _, why = instead.partition("nothing: ")
    return f"not in Veneer: {why}" if not kind else f"not in Veneer; instead: {instead}"


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """The one of our names that this is a misspelling of, if any.

    A word may have a slip of one letter, a long one two: `lenght` is `length`, but `min_length` is not `max_length`.
    """
    near = [ours for ours in known if len(ours) >= 4 and _is_slip(name.lower(), ours)]
    return min(near, key=lambda ours: _distance(name, ours), default=None)


def _is_slip(name: str, ours: str) -> bool:
    if _distance(name.replace("_", "").replace("-", ""), ours.replace("_", "")) <= 1:
        return True
    words, our_words = name.split("_"), ours.split("_")
    return len(words) == len(our_words) and all(
        _distance(word, our) <= (0 if len(our) <= 2 else 1 if len(our) <= 6 else 2)
        for word, our in zip(words, our_words)
    )


def _distance(a: str, b: str) -> int:
    """Letters to insert, delete, replace, or swap with their neighbour, to make one word of the other."""
    before, last = list[int](), list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]
