"""Extensions that are wrong in one way each, and the law that says so."""

import pytest

from mono_quant import (
    CheckpointError,
    PerGroup,
)
from mono_quant.testing import Broken, KernelCase, check, checks_for
from tests.testing.broken import (
    Averaged,
    Beyond,
    Blind,
    Block,
    Careless,
    Changeable,
    Coarse,
    Distrusting,
    Dithered,
    Forgetful,
    Halved,
    Hasty,
    InPlace,
    Keeping,
    LastSeen,
    Lost,
    Narrow,
    Needy,
    NoBlocks,
    Numb,
    OneScale,
    Overflowing,
    Overreaching,
    Pathlike,
    Raising,
    Rounded,
    Scribbling,
    Shifted,
    Skimming,
    Sorting,
    Stingy,
    Trusting,
    Uneven,
    Unhashable,
    Vague,
    WholeRange,
    Writing,
)
from tests.testing.broken_parts import (
    Credulous,
    Edits,
    Knowing,
    Nameless,
    Pickling,
    Picky,
    Product,
    Scaling,
    Spoiling,
    Stamped,
    Untying,
    doubling,
    scorer,
)


def shown(value: object) -> str:
    """Return what a case is called, the same in every process: without an address."""
    own = type(value).__repr__ is not object.__repr__
    return str(value) if own else type(value).__name__


def broken_law(subject: object, law: str) -> str:
    """Return what a law says of a subject that breaks it."""
    (one,) = (one for one in checks_for(subject) if one.name == law)
    with pytest.raises(Broken) as raised:
        one()
    return str(raised.value)


BROKEN: list[tuple[object, str, str]] = [
    (Pathlike(), "it_has_a_kind_that_is_no_path", "tests/pathlike"),
    (Forgetful(), "every_field_is_written_down", "share"),
    (Forgetful(0.25), "it_comes_back_from_json", "came back"),
    (Careless(), "every_field_tells_it_apart", "another share"),
    (Changeable(), "it_cannot_be_changed", "setting share is not refused"),
    (Unhashable(), "it_is_a_value", "cannot be hashed"),
    (Rounded(), "it_comes_back_from_json", "came back"),
    (Shifted(4), "no_other_grid_point_is_nearer", "is nearer"),
    (Overflowing(4), "codes_lie_within_their_width", "beyond -8 to 7"),
    (Narrow(4), "values_come_back_near", "of the largest in its block"),
    (Dithered(4), "the_same_comes_out_each_time", "codes differ"),
    (Shifted(4), "quantizing_again_changes_nothing", "values moved"),
    (Writing(4), "nothing_handed_in_is_changed", "the stack was written to"),
    (Stingy(4), "bytes_are_those_foretold", "nbytes says 48"),
    (Trusting(4), "what_is_not_finite_is_refused", "is not refused: InputError"),
    (Numb(4), "the_dtype_of_the_weight_is_remembered", "became a QTensor of torch.float32"),
    (Halved(4), "rows_are_decoded_alone", "decode otherwise"),
    (Skimming(4), "rows_are_quantized_as_in_the_whole", "codes of many rows are others"),
    (Hasty(4, granularity=PerGroup(4)), "columns_are_quantized_as_in_the_whole", "has other"),
    (Vague(4), "approximations_leave_about_the_same_error", "the error of a block is off by"),
    (OneScale(4), "there_is_one_scale_for_each_block", "the scale is"),
    (Uneven(), "granularities_cut_without_remainder", "do not tile"),
    (Averaged(), "merging_is_associative", "differ"),
    (Averaged(), "where_order_is_free_no_cut_or_order_matters", "differ"),
    (LastSeen(), "where_order_is_free_no_cut_or_order_matters", "the other order"),
    (Keeping(), "a_state_does_not_grow_with_the_data", "after 32"),
    (Distrusting(), "states_of_inputs_are_accepted", "is refused: 8 peaks for 3 columns"),
    (InPlace(), "observing_and_merging_change_nothing", "changed by merging"),
    (WholeRange(), "a_weight_has_a_range_for_each_block", "was expected"),
    (Overreaching(), "a_range_lies_within_what_is_there_and_zero", "passes the extremes"),
    (Sorting(), "estimating_changes_nothing_and_is_repeatable", "the weight was written to"),
    (Blind(), "what_is_not_finite_is_refused", "a tensor with nan is not refused"),
    (Blind(1.5), "the_range_lies_within_what_was_seen_and_zero", "passes what was seen"),
    (Blind(0.5), "values_that_are_all_alike_are_covered", "the range is"),
    (Coarse(), "half_precision_is_computed_in_float32", "of float32"),
    (Lost(), "products_stay_near", "products are at"),
    (Scribbling(), "rounding_changes_nothing_and_is_repeatable", "the weight was written to"),
    (Beyond(), "codes_lie_on_the_grid", "codes are not integers from"),
    (Needy(), "it_says_what_it_needs", "which is no Statistic"),
    (Block("counts"), "it_says_what_it_needs", "batches is negative"),
    (Block("forgets"), "every_weight_of_a_block_is_fitted", "were asked for"),
    (Block("writes"), "only_what_is_free_changes", "the block was written to"),
    (Block("takes"), "only_what_is_free_changes", "4.bias changed, which is not free"),
    (Block("worsens"), "the_block_is_no_worse_than_to_nearest", "times that of rounding"),
    (doubling("matches all"), "it_matches_its_layer_and_no_other", "it matches nn.Identity"),
    (doubling("reshapes"), "layouts_lead_to_the_stack_and_back", "its layout is of"),
    (doubling("reads"), "layouts_touch_no_tensor", "on the meta device"),
    (doubling("no words"), "refusals_are_words", "False is no reason"),
    (doubling("writes"), "the_source_layer_stays_float", "was written to"),
    (doubling("no bias"), "it_computes_with_its_decoded_weights", "of the largest output"),
    (doubling("no bias"), "in_half_precision_it_is_nearly_the_float_layer", "off by"),
    (doubling("another class"), "it_is_dequantized_to_the_float_layer", "it becomes a Linear"),
    (doubling("misnames"), "inputs_are_those_of_its_weights", "inputs names kernel"),
    (doubling("columns"), "inputs_are_those_of_its_weights", "those of its matrix have 64"),
    (doubling("not on grids"), "inputs_are_put_on_grids_as_when_quantized", "of the largest"),
    (doubling("stays on grids"), "inputs_are_put_on_grids_as_when_quantized", "something else"),
    (scorer("matches all"), "it_matches_its_module_and_no_other", "it matches nn.Identity"),
    (scorer("no words"), "refusals_are_words", "False is no reason"),
    (scorer("reads"), "quantized_children_are_called", "is quantized, and never called"),
    (scorer("adapts otherwise"), "adapting_changes_no_output", "before it was adapted"),
    (Untying(), "a_file_gives_back_every_bit", "ties"),
    (Stamped(), "the_same_checkpoint_makes_the_same_bytes", "other bytes"),
    (Scaling(), "saving_changes_nothing", "a tensor was written to"),
    (Credulous(), "a_damaged_file_is_refused", "is not refused: CheckpointError"),
    (Pickling(), "code_in_a_file_is_never_run", "code in a file written by pickle was run"),
    (Pickling(), "a_failed_save_leaves_what_stood", "the old file is gone"),
    (Knowing(), "unknown_kinds_are_refused_by_name", "an unknown kind is not refused"),
    (Picky(), "what_it_cannot_express_it_does_not_write", "tied weights is not refused"),
    (Nameless(), "it_says_what_its_files_are_called", "its suffixes are ('bin',)"),
    (Edits("inexact"), "outputs_stay_what_they_were", "of its largest output after: 0 was"),
    (Edits("writes"), "old_tensors_are_not_written_into", "a tensor of the source"),
    (Edits("silent"), "changes_say_what_and_where", "named no change"),
    (Edits("nowhere"), "changes_say_what_and_where", "there is no such module"),
    (Edits("hooks"), "it_leaves_nothing_behind", "a hook stays on 0"),
    (Spoiling(), "a_correction_brings_the_outputs_nearer", "dB with it"),
    (Spoiling("writes"), "a_correction_changes_only_the_quantized_model", "a float model was"),
    (KernelCase(Product("no bias")), "products_are_those_of_the_decoded_weight", "off by"),
    (KernelCase(Product("drops")), "products_are_those_of_the_decoded_weight", "off by"),
    (KernelCase(Product("wide")), "products_are_those_of_the_decoded_weight", "comes out"),
    (KernelCase(Product("writes")), "it_changes_nothing_and_is_repeatable", "the input was"),
    (KernelCase(Product("flat")), "inputs_of_any_shape_are_rows", "of (2, 3, 1024) comes"),
    (KernelCase(Product("no words")), "it_says_what_it_supports", "supports returns False"),
]


@pytest.mark.parametrize(("subject", "law", "words"), BROKEN, ids=shown)
def test_a_fault_breaks_the_law_that_names_it(subject: object, law: str, words: str) -> None:
    assert words in broken_law(subject, law)


@pytest.mark.parametrize(
    ("subject", "law", "error"),
    [
        (NoBlocks(), "empty_weights_have_ranges", RuntimeError),
        (Raising(), "refusals_are_words", AttributeError),
        (doubling("unpicklable"), "copies_and_pickles_are_the_same", Exception),
        (Edits("needs"), "without_data_it_works_or_says_so", AssertionError),
        (Edits("structure"), "a_model_changed_by_it_is_saved_and_loaded", CheckpointError),
    ],
    ids=shown,
)
def test_a_fault_that_raises_breaks_the_law_in_which_it_does(
    subject: object, law: str, error: type[Exception]
) -> None:
    (one,) = (one for one in checks_for(subject) if one.name == law)
    with pytest.raises(error):
        one()


@pytest.mark.parametrize(
    "subject", [doubling(""), scorer(""), Edits(), KernelCase(Product()), Block()], ids=repr
)
def test_without_its_fault_each_keeps_every_law(subject: object) -> None:
    verdict = check(subject)
    assert verdict, str(verdict)
