"""Which cases are not worth their time, and which are left to the full run.

`pytest -m "not slow"` is the daily run. It leaves out the tests of SLOW. A test with several
parameters runs there in few cases, in which each value of each parameter occurs once.
"""

import torch

from fastpe.backends import native

# whole files, or tests with all their cases: those that take seconds each
SLOW = {
    "tests/attention/test_decoding.py::test_ten_thousand_steps",
    "tests/attention/test_memory.py",
    "tests/attention/test_numerics.py::test_a_hundred_thousand_steps",
    "tests/attention/test_numerics.py::test_a_million_equal_keys",
    "tests/attention/test_numerics.py::test_a_million_repeated_keys",
    "tests/attention/test_properties.py::test_any_arguments",
    "tests/attention/test_properties.py::test_any_strides",
    "tests/attention/test_robustness.py::test_no_leak",
    "tests/backends/test_processes.py::test_data_loader",
    "tests/benchmarks/test_baselines.py::test_transformers_own_lsh_attention_is_not_causal",
    "tests/benchmarks/test_seq_scaling.py::test_rows_are_measured",
    "tests/encodings/test_orthogonal.py::test_variance",
    "tests/feature_maps/test_omega.py::test_compiled",
    "tests/feature_maps/test_omega.py::test_one_stage_expectation",
    "tests/music/test_generate.py::test_speed",
    "tests/music/test_harmonize.py::test_structure_is_learned",
    "tests/music/test_harmonize.py::test_study",
    "tests/nn/test_stacks.py::test_compiled_by_inductor",
    "tests/nn/test_stacks.py::test_one_graph_for_every_length",
    "tests/ops/test_causal_dot.py::test_many_heads_many_times",
    "tests/scripts/test_gpu_check.py::test_a_step_starts_and_finds_its_work",
    "tests/scripts/test_gpu_check.py::test_a_step_that_does_nothing_fails",
    "tests/test_import.py::test_a_folder_named_fastpe_does_not_hide_it",
    "tests/test_import.py::test_broken_library",
    "tests/test_import.py::test_show_config_without_library",
}

# tests of the Triton kernels that run in its interpreter, at half a second a case
_THOROUGH = {
    "test_output_state_and_every_gradient",
    "test_shapes",
    "test_gradient_of_the_state_alone",
    "test_ranges_of_heads_that_share",
}
_INTERPRETED = _THOROUGH | {
    "test_any_width",
    "test_default_positions_count_from_the_state",
    "test_dtypes_of_the_results",
    "test_empty_batch_and_sequence",
    "test_every_number_is_philox",
    "test_expanded_inputs",
    "test_features_elsewhere",
    "test_feature_maps_and_normalizers",
    "test_gradient_of_a_scan_elsewhere",
    "test_gradient_of_features_elsewhere",
    "test_gradient_of_frequencies_far_out",
    "test_gradient_of_frequencies_with_a_state",
    "test_heads_that_share",
    "test_integer_positions_beyond_24_bits",
    "test_kernels_are_the_same_to_rounding",
    "test_known_answers",
    "test_last_key_does_not_move_past_outputs",
    "test_negative_views",
    "test_no_token_is_of_a_sequence",
    "test_noise_elsewhere",
    "test_odd_width",
    "test_parameters_in_any_layout",
    "test_sine_features_of_heads_that_share",
    "test_ranges_are_sequences_alone",
    "test_ranges_of_heads_with_frequencies_of_their_own",
    "test_relu_has_no_slope_at_zero",
    "test_rows_from_any_on",
    "test_scan_elsewhere",
    "test_second_derivative_is_never_dropped",
    "test_shapes_of_positions",
    "test_split_and_resume",
    "test_split_denominator",
}


# one for each path through the kernels
_DISTINCT = ("none", "rope", "rope-before", "ropepool", "sinespe", "fstripe-pooled")


# tests that list every encoding, of which _DISTINCT and one more run here; all of them run in
# test_output_state_and_every_gradient
_OF_EACH_PATH = {
    "test_default_positions_count_from_the_state",
    "test_odd_width",
}


# the files whose tests run on every code path of the CPU's kernels, and on the CUDA kernels; in
# others they stand behind arguments and modules, for which the best path does
_EVERY_PATH = {
    "test_attention",
    "test_causal_dot",
    "test_cuda",
    "test_encodings",
    "test_errors",
    "test_noise",
    "test_numerics",
    "test_packing",
    "test_properties",
    "test_ranges",
    "test_robustness",
    "test_spe",
}


def left_out(item):
    """Return whether a test would take too long for what it adds, in the interpreter above all."""
    spec = getattr(item, "callspec", None)
    params = spec.params if spec else {}
    name, path = params.get("backend", params.get("kernels", ("", 0)))
    if name == "cpu" and item.path.stem not in _EVERY_PATH:
        return path != native.CPU.functions.fastpe_best_isa()
    if name != "triton":
        return False
    return _left_out_by_the_interpreter(item, spec, path)


def _left_out_by_the_interpreter(item, spec, segments):
    """Return the same of a test on Triton; `segments`: whether each chunk is one."""
    test, dtype = item.originalname, spec.params.get("dtype", torch.float64)
    distinct = spec.id.startswith("triton") or spec.id.split("-triton")[0] in _DISTINCT
    if test in _THOROUGH:
        # shapes have met every dtype in one piece, and float16 reads segments as bfloat16 does
        met = dtype != torch.float64 if test == "test_shapes" else dtype == torch.float16
        if segments and met:
            return True
        # everything in float64 and in one piece, the rest once
        return not (distinct or (dtype == torch.float64 and not segments))
    if test in _OF_EACH_PATH:
        encoding = spec.id.removeprefix("triton-").removesuffix("-start").removesuffix("-resumed")
        distinct = encoding in (*_DISTINCT, "fstripe-unpooled")
    if test == "test_split_and_resume" and not spec.params["given"]:
        # test_default_positions_count_from_the_state has these
        return True
    narrow = dtype not in (torch.float64, torch.bfloat16)
    return segments or narrow or not distinct or test not in _INTERPRETED


def mark_slow(items):
    """Mark what the daily run leaves out."""
    tests = {}
    for item in items:
        file, _, name = item.nodeid.partition("[")[0].partition("::")
        if file in SLOW or f"{file}::{name}" in SLOW:
            item.add_marker("slow")
        tests.setdefault((file, name), []).append(item)
    for cases in tests.values():
        daily = _each_value_once(cases)
        for item in cases:
            if item not in daily:
                item.add_marker("slow")


def _values(item):
    spec = getattr(item, "callspec", None)
    # the cases of a test have the very same objects
    return {(name, id(x)) for name, x in spec.params.items()} if spec else {()}


def _each_value_once(cases):
    """Return cases of a test in which each value of each parameter occurs: the fullest first."""
    values = {item: _values(item) for item in cases}
    missing, chosen = set().union(*values.values()), set()
    while missing:
        best = max(cases, key=lambda item: len(values[item] & missing))
        missing -= values[best]
        chosen.add(best)
    return chosen
