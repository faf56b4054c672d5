"""Names of other libraries that begin with an underscore, and that we call, override or set nevertheless.

They may go with any release. This is the list of all of them; a test fails, naming the library and what we lose, when
one is gone, or when one is used that is not listed.
"""

PRIVATE_NAMES = {
    "argparse._ActionsContainer": {
        "_actions": "`hf-blockkd plan` takes every field of the configuration",
        "_add_action": "likewise, in a group of their own",
        "_option_string_actions": "a mistyped flag is answered with the nearest",
    },
    "transformers.Trainer": {
        "_finalize_training": "checkpoints of others stay when a run ends",
        "_get_collator_with_removed_columns": "rows that connectors are fitted to are collated as in training",
        "_get_grad_norm": "its value is looked at before an update, which must not write what is not finite",
        "_get_num_items_in_batch": "labels are counted as the task pairs them with logits, over all ranks",
        "_get_output_dir": "checkpoints are written where the stock trainer writes them",
        "_inner_training_loop": "where a run begins, also one that tries again with a smaller batch",
        "_load_best_model": "connectors come with the best student, and a torn checkpoint is refused",
        "_load_from_checkpoint": "connectors are loaded beside the student, which is read without them",
        "_globalstep_last_logged": "parts of the loss are averaged over ranks where `Trainer` logs its own",
        "_maybe_log_save_evaluate": "likewise",
        "_prepare_inputs": "bridges follow the size of the images, and decoder inputs are made of labels",
        "_push_from_checkpoint": "checkpoints go to the hub as ever",
        "_remove_unused_columns": "a column that a transform reads and no model takes is named",
        "_run_epoch": "a run that is through does not go on",
        "_save": "the student is saved without its connectors, which get a file of their own",
        "_save_checkpoint": "a checkpoint gets its name when it is whole",
        "_save_optimizer_and_scheduler": "part of a checkpoint",
        "_save_rng_state": "part of a checkpoint",
        "_save_scaler": "part of a checkpoint",
        "_set_signature_columns_if_needed": "columns that the teacher alone takes are kept",
        "_signature_columns": "likewise",
    },
    "transformers.PreTrainedModel": {
        "_can_set_experts_implementation": "stepping stones take part in every choice that their models may make",
        "_from_config": "models are built from a config alone for `plan`, `check` and students",
        "_get_dtype_plan": "a student in another dtype keeps in float32 what a reload puts there",
        "_is_hf_initialized": "a student's buffers are computed as a reload does it",
        "_keys_to_ignore_on_save": "connectors are no part of the student's weight file",
        "_supports_attention_backend": "stepping stones are made whatever attention their models have chosen",
        "_supports_flash_attn": "likewise",
        "_supports_flex_attn": "likewise",
        "_supports_sdpa": "likewise",
    },
    "transformers.GenerationMixin": {
        "_prepare_cache_for_generation": "the cache of a stepping stone has the layers that both of its models need",
        "_supports_default_dynamic_cache": "stepping stones of models with caches of another kind generate without one",
    },
    "transformers.Wav2Vec2PreTrainedModel": {
        "_get_feat_extract_output_lengths": "inputs are made for models of sounds whose config tells no convolutions",
        "_get_feature_vector_attention_mask": "frames of padding are not distilled",
    },
    "transformers.ParakeetPreTrainedModel": {"_get_output_attention_mask": "frames of padding are not distilled"},
    "accelerate.hooks": {"_hf_hook": "models that Accelerate has placed or offloaded stay where they are"},
    "datasets.Dataset": {"_fingerprint": "data that a teacher cache holds is not gone through again when a run begins"},
    "torch.Tensor": {"_version": "a model that writes into its attention mask gets another one in each forward"},
    "torch.UntypedStorage": {"_cdata": "tensors of one storage are counted once, also where they have no values"},
    "torch.nn.Module": {
        "_buffers": "modules that hold weights are told from containers",
        "_compiled_call_impl": "compiled models are refused",
        "_modules": "connectors leave the student while its weights are read and written",
        "_parameters": "modules that hold weights are told from containers",
    },
    "torch._dynamo.eval_frame.OptimizedModule": {"_orig_mod": "compiled models are refused"},
    "torch.nn.modules.batchnorm": {"_BatchNorm": "statistics stay as they are while the cost of a step is counted"},
    "torch.ops.aten": {
        "_local_scalar_dense": "models of any size are planned on shapes alone, where a value is looked at",
        "_scaled_dot_product_flash_attention_for_cpu": "its FLOPs are counted",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "its FLOPs are counted",
    },
}
"""Where a name is found -> the name -> what we need it for."""
