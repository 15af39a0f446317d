"""Rows in TRL's formats."""

from row_samples import converted

from perlcli.data import Preference


def test_a_completion_of_a_pair_starts_with_the_assistant() -> None:
    """If conversations first differ in a user turn, their shared prompt ends before the previous answer."""
    opening = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ends = [[{"role": "user", "content": said}, {"role": "assistant", "content": "sure"}] for said in ("tea", "milk")]
    pair = {"chosen": opening + ends[0], "rejected": opening + ends[1]}
    assert converted(pair, use="reward").rows == [Preference(opening[:1], opening[1:] + ends[0], opening[1:] + ends[1])]
