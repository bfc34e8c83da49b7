"""What is run of PEFT's suite, and what is expected to fail: data, and how it is matched with tests.

Tests are named `module.py::Class::test`, without parameters; `*` stands for anything.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import NamedTuple


# Modules with tests that need no download. Others can be named on the command line.
MODULES = (
    "test_config",
    "test_custom_models",
    "test_hub_features",
    "test_initialization",
    "test_low_level_api",
    "test_mapping",
    "test_other",
    "test_tuners_utils",
)

# Modules that are not run, and why.
NOT_RUN = {
    "test_decoder_models, test_encoder_decoder_models, test_feature_extraction_models, test_seq_classifier, "
    "test_target_parameters, test_token_classification_qa, test_vision_models, test_auto, test_integrations, "
    "test_torch_compile": "their models and adapters are downloaded from the hub; name them on the command line where the "
    "cache has them",
    "test_stablediffusion": "needs diffusers and its models",
    "test_common_gpu, test_gpu_examples, test_gptqmodel, test_quantization": "need a GPU, or quantised bases, which DST "
    "refuses",
    "test_mixed": "PeftMixedModel takes a closed list of PEFT's own methods",
    "test_<method>, test_lora_*, test_trainable_tokens, test_helpers": "are about one other method",
}

# Tests that are written with LoRA and about any method: DST stands in for LoRA.
STAND_INS = (
    "test_custom_models.py::TestPeftCustomModel::test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_custom_models.py::TestPeftCustomModel::test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_custom_models.py::TestPeftCustomModel::test_delete_adapter_with_multiple_adapters_works",
    "test_custom_models.py::TestPeftCustomModel::test_existing_model_card",
    "test_custom_models.py::TestPeftCustomModel::test_non_existing_model_card",
    "test_custom_models.py::TestPeftCustomModel::test_weight_bias_attributes",
    "test_hub_features.py::TestLocalModel::*",
    "test_hub_features.py::TestModelCard::*",
    "test_initialization.py::TestCustomModelConfigWarning::*",
    "test_initialization.py::TestLoadAdapterOfflineMode::*",
    "test_initialization.py::TestLowCpuMemUsage::*",
    "test_initialization.py::TestNamingConflictWarning::*",
    "test_low_level_api.py::TestLowLevelFunctional::test_get_peft_model_state_dict",
    "test_low_level_api.py::TestPeftStateDict::test_get_and_set_*",
    "test_low_level_api.py::TestPeftStateDict::test_set_peft_model_state_dict_preserves_input",
    "test_low_level_api.py::TestPeftStateDict::test_trained_modules_to_save_module_named_like_peft_prefix_round_trip",
    "test_low_level_api.py::TestStateDictFsdpShapeValidation::test_save_pretrained_succeeds_for_normal_lora",
    "test_mapping.py::*",
    "test_other.py::TestModulesToSave*",
    "test_other.py::TestTargetingAuxiliaryTrainingWrapper::test_nested_ignores_modules_to_save",
    "test_other.py::test_modules_to_save_targets_module_dict_raises",
    "test_tuners_utils.py::TestExcludedModuleNames::*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_active_adapters_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_available_adapters_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_base_model_type_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_enabled_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_merge_adapters_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_active_adapters_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_available_adapters_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_devices_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_disabled_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_enabled_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_merged_adapters_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_requires_irregular_with_modules_to_save",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_num_adapter_layers_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_with_modules_to_save",
    "test_tuners_utils.py::TestTargetedModuleNames::*",
    "test_tuners_utils.py::TestTargetedParameterNames::*",
    "test_tuners_utils.py::TestTunerStateDictKeyPrefixes::test_prefixes_auxiliary_modules_not_included",
)

# Tests that those lists or a parametrisation over methods would take in, and that are not about DST.
LEFT_OUT = {
    "*ia3*": "about IA3",
    "test_custom_models.py::TestPeftCustomModel::*dora*": "about DoRA",
    "test_initialization.py::TestHotSwapping::*": "PEFT hot-swaps LoRA only; DST's own swaps are `set_adapter`",
    "test_initialization.py::TestLoraInitialization::*": "about LoRA's matrices",
    "test_initialization.py::TestLowCpuMemUsage::test_mixed_*": "about PeftMixedModel, which takes PEFT's own methods only",
    "test_low_level_api.py::*rejects_shared_state_tuners": "about methods that share state between layers",
    "test_low_level_api.py::*test_base_model_module_named_like_peft_prefix": "knows the prefixes of two methods by heart",
    "test_tuners_utils.py::TestExcludedModuleNames::test_all_modules_excluded": "compares the wording of an error",
    "test_tuners_utils.py::TestExcludedModuleNames::test_second_adapter_only_modules_to_save_raises": "compares the "
    "wording of an error",
    "test_tuners_utils.py::TestExcludedModuleNames::test_some_modules_excluded_some_unmatched": "compares the "
    "wording of an error",
    "test_tuners_utils.py::TestExcludedModuleNames::test_targeted_module_names_unique_across_adapters": "DST lists "
    "modules in the model's order, not in that of the adapters",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_*_adapters_irregular": "calls methods of LoRA's wrapper",
    "test_tuners_utils.py::TestModelAndLayerStatus::*trainable_tokens*": "about trainable tokens",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_enabled_irregular_with_modules_to_save": "calls methods of "
    "LoRA's wrapper",
}


class Failure(NamedTuple):
    """A test that is expected to fail.

    Attributes:
        test: its name, or a pattern of names.
        reason: what it assumes that is not so with DST.
        ours: node id of the test of ours that covers what it stands for.
        where: regular expression, searched in its parameters; all of them if empty.
        everywhere: whether it fails on every machine; rounding may be another on another CPU.
    """

    test: str
    reason: str
    ours: str
    where: str = ""
    everywhere: bool = True


_CUSTOM = "test_custom_models.py::TestPeftCustomModel::"
_MIXED = "test_custom_models.py::TestMixedAdapterBatches::"
_GRAD = "test_custom_models.py::TestRequiresGrad::"

FAILURES = (
    Failure(
        _CUSTOM + "test_only_params_are_updated",
        "asserts that only parameters with the method's prefix move: DST trains the base's own",
        "tests/test_constraint.py::test_exactly_the_budget_differs",
    ),
    Failure(
        _CUSTOM + "test_training_custom_models",
        "asserts that only parameters with the method's prefix get gradients: DST trains the base's own",
        "tests/test_constraint.py::test_equals_the_dense_reference_after_every_step",
        r"^DST-(?!random)",
    ),
    Failure(
        _CUSTOM + "test_adapter_dtype_autocast",
        "asserts adapter weights in float32 on a half-precision base: values of the base's own weights have its dtype "
        "(PEFT exempts LN tuning for that reason)",
        "tests/test_saving.py::test_other_dtypes_come_back",
        r"-True-dtype[01]-DST-|-False-dtype[01]-DST-random",
    ),
    Failure(
        _CUSTOM + "test_adding_multiple_adapters_with_bias_raises",
        "trains all biases densely: with DST biases compete for the budget, and bias='all' is refused",
        "tests/test_config.py::test_bad_values_are_named",
    ),
    Failure(
        "test_custom_models.py::TestPeftFsdpStateDict::test_save_load_roundtrip_fsdp_wrapped_learnable_bias",
        "overwrites biases behind the constraint's back, which is refused when saving",
        "tests/test_config.py::test_unconstrained_training_cannot_be_saved",
        # An embedding has no bias.
        r"^(?!bias_peft_method_only-DST-EmbConv1D-target_modules=\[\"emb\"\]$)",
    ),
    Failure(
        "test_custom_models.py::TestPeftFsdpStateDict::test_save_load_roundtrip_fsdp_wrapped",
        "saves from within FSDP, which fixed subsets do not support",
        "tests/training/test_fixed_errors.py::test_data_parallelism_is_refused",
        r"^DST-random",
    ),
    Failure(
        _CUSTOM + "test_get_base_model_state_dict",
        "changes adapter and base alike, and expects the base's own values while the adapter is active: in place they "
        "are the tuned ones",
        "tests/test_peft.py::test_full_state_dicts_round_trip",
        r"^DST-random",
    ),
    Failure(
        _CUSTOM + "test_save_pretrained_targeting_lora_to_embedding_layer",
        "expects the embedding saved whole, under a wrapper's name",
        "tests/test_saving.py::test_embeddings_that_peft_saves_whole",
        r"auto|True",
    ),
    Failure(
        _CUSTOM + "test_set_adapter_non_overlapping_modules*",
        "reads `active_adapters` of a wrapper in the module's place: nothing is wrapped, the marker has it",
        "tests/test_placing.py::test_adapters_with_different_targets",
    ),
    Failure(
        _CUSTOM + "test_set_requires_grad",
        "looks for adapter tensors on a wrapper in the module's place: nothing is wrapped",
        "tests/test_robustness.py::test_freezing_after_the_backward_pass",
    ),
    Failure(
        _GRAD + "test_loading_model_requires_grad_set_correctly",
        "asserts that parameters are trainable by their adapter's name: DST trains the base's own",
        "tests/test_placing.py::test_everything_is_tuned_by_default",
    ),
    Failure(
        _GRAD + "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
        "asserts that parameters are trainable by their adapter's name: DST trains the base's own",
        "tests/test_placing.py::test_everything_is_tuned_by_default",
        r"True",
    ),
    Failure(
        "test_custom_models.py::TestDefaultTargetModules::*",
        "expects default target modules, or an error without any: without them DST tunes everything",
        "tests/test_placing.py::test_everything_is_tuned_by_default",
    ),
    Failure(
        _CUSTOM + "test_add_adapter_rejects_duplicate_name_without_mutation",
        "makes a PeftMixedModel, which takes a closed list of PEFT's own methods",
        "tests/test_peft_contract.py::test_mixed_models_refuse_dst",
        r"True",
    ),
    Failure(
        _MIXED + "test_mixed_adapter_batches_mlp",
        "compares logits to 1e-5 of inputs up to 89: base product and correction, summed in float32, differ from one "
        "product by more, depending on the CPU",
        "tests/test_mixed.py::test_equals_one_sample_at_a_time",
        everywhere=False,
    ),
    Failure(
        _MIXED + "test_mixed_adapter_batches_unsupported_layer_raises",
        "expects LoRA's refusal of a GRU's dense copy, which works",
        "tests/test_mixed.py::test_dense_copies_of_each_adapter",
    ),
    Failure(
        _MIXED + "test_mixed_adapter_batches_mha_raises",
        "expects LoRA's refusal of attention, which works with batches first; otherwise, as here, it is refused in other "
        "words",
        "tests/test_mixed.py::test_attention_without_batches_first_is_refused",
    ),
)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.partition("[")[0], pattern)


def is_stand_in(name: str) -> bool:
    """Whether DST stands in for LoRA in a test (`module.py::Class::test[parameters]`)."""
    return any(_matches(name, pattern) for pattern in STAND_INS)


def left_out(name: str) -> bool:
    """Whether a test is not about DST."""
    return any(_matches(name, pattern) for pattern in LEFT_OUT)


def failure(name: str) -> Failure | None:
    """The expected failure of a test, if it has one."""
    parameters = name.partition("[")[2].removesuffix("]")
    return next((f for f in FAILURES if _matches(name, f.test) and re.search(f.where, parameters)), None)


def table() -> str:
    """The expected failures as a Markdown table."""
    lines = ["| PEFT's test | fails because it | ours |", "|---|---|---|"]
    for f in FAILURES:
        where = f" where `{f.where}`" if f.where else ""
        lines.append(f"| `{f.test.removesuffix('*')}`{where.replace('|', chr(92) + '|')} | {f.reason} | `{f.ours}` |")
    return "\n".join(lines) + "\n"
